//! Guests and VMMs that try to hang, block or flood the router rather than to break it.
#![allow(missing_docs, reason = "a test program")]
#![expect(unsafe_code, reason = "file flags and descriptors that are not what they seem")]

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::time::{Duration, Instant};

use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{Op, Rc, SendWr};
use freeflow_tests::guest::vhost::Connection;
use freeflow_tests::guest::virtq::{Desc, INDIRECT, NEXT, Virtq};
use freeflow_tests::guest::{Guest, GuestConfig};
use freeflow_tests::logs;
use freeflow_tests::router::{RouterSpec, TestRouter};
use vhost::VhostBackend;
use virtio_rdma::event::EventType;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

/// Long enough for anything that is not blocked.
const LONG: Duration = Duration::from_secs(10);
/// Longest stop of a router: what it waits for a virtual NIC that is blocked, and some.
const STOP: Duration = Duration::from_secs(15);
/// Most log lines of one virtual NIC in each window of its limit.
const A_WINDOW: usize = 10;
/// How long such a window is, at the least: the next begins with the first line that is wanted after it.
const WINDOW: Duration = freeflow_backend::log_window::PER;
/// Lines about one virtual NIC that nothing limits, since it has no part in them: those of its start.
const OF_ITS_START: usize = 10;

/// This many virtual NICs that all depend on one worker.
fn on_one_worker(nics: usize) -> RouterSpec {
    let mut spec = RouterSpec::of(nics);
    spec.engine.workers = 1;
    spec
}

/// The attacker's guest, and a pair of two others.
fn victims() -> (Bed, Rc, Rc) {
    let bed = Bed::with(&on_one_worker(3), Placement::Contiguous);
    let (v, w) = Rc::pair(&bed.guests[1], &bed.guests[2], 64).unwrap();
    (bed, v, w)
}

#[track_caller]
fn assert_served(v: &Rc, w: &Rc) {
    v.qp.post(SendWr::inline(1, Op::Write(w.mr.remote(0)), b"well")).unwrap();
    v.cq.poll_for(LONG).expect("a completion for the other guests").ok();
}

/// Makes the device raise an event on queue 0.
fn provoke_event(a: &Rc) {
    a.qp.sq().producer().store(0xffff_fff0, SeqCst);
    a.qp.doorbell().ring();
}

/// What a vCPU does that offers the same chains over and over.
fn offer(q: &Virtq, stop: &AtomicBool) {
    let (avail, used) = (q.avail_word(), q.used_word());
    while !stop.load(Relaxed) {
        let taken = (used.load(Acquire) >> 16) as u16;
        avail.store(u32::from(taken.wrapping_add(q.size())) << 16, Release);
    }
}

/// Runs `f` while chains are offered without end.
fn while_offering(q: &Virtq, f: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| offer(q, &stop));
        // Also when `f` panics, or the scope would wait for ever.
        let end = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
        stop.store(true, SeqCst);
        if let Err(panic) = end {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Makes each chain of a virtqueue an indirect table that is as long as can be and takes long to read.
fn make_chains_long(guest: &Guest, q: &Virtq) {
    let table = guest.alloc(usize::from(u16::MAX) * size_of::<Desc>()).unwrap();
    for index in 0..u16::MAX {
        let desc = Desc { flags: NEXT.into(), next: (index + 1).into(), ..Desc::default() };
        table.write(size_of::<Desc>() * usize::from(index), desc.as_bytes());
    }
    for index in 0..q.size() {
        q.write_available(index, index);
        q.write_raw(index, table.gpa(0), table.len() as u32, INDIRECT, 0);
    }
}

#[track_caller]
fn assert_stops(router: &TestRouter) {
    let start = Instant::now();
    router.router().stop();
    assert!(start.elapsed() < STOP, "stopping took {:?}", start.elapsed());
}

#[test]
fn unusable_event_buffers_without_end_hang_no_worker() {
    let (bed, v, w) = victims();
    let (a, _b) = Rc::pair(&bed.guests[0], &bed.guests[0], 64).unwrap();
    let queue = bed.guests[0].events().queue(0);
    make_chains_long(&bed.guests[0], &queue.virtq);
    while_offering(&queue.virtq, || {
        provoke_event(&a);
        std::thread::sleep(Duration::from_millis(20));
        assert_served(&v, &w);
    });
}

#[test]
fn indirect_event_buffers_are_not_followed() {
    let (bed, v, w) = victims();
    let guest = &bed.guests[0];
    let (a, _b) = Rc::pair(guest, guest, 64).unwrap();
    let table = guest.alloc(4096).unwrap();
    // A table whose only descriptor would do.
    table.write(0, &table.gpa(2048).to_le_bytes());
    table.write(8, &[16, 0, 0, 0, 2, 0, 0, 0]);
    let queue = guest.events().queue(0);
    for index in 0..queue.virtq.size() {
        queue.virtq.write_raw(index, table.gpa(0), 16, INDIRECT, 0);
    }
    let start = queue.virtq.used_index();
    provoke_event(&a);
    let all = queue.virtq.size();
    eventually("return of all buffers", LONG, || queue.virtq.used_index().wrapping_sub(start) == all);
    assert!((0..all).all(|slot| queue.virtq.used_len(slot) == 0));
    assert_served(&v, &w);
}

#[test]
fn what_a_worker_leaves_is_given_out_later() {
    let bed = Bed::with(&on_one_worker(1), Placement::Contiguous);
    let guest = &bed.guests[0];
    let (a, _b) = Rc::pair(guest, guest, 64).unwrap();
    let number = a.qp.number();
    {
        let queue = guest.events().queue(0);
        let last = queue.virtq.available(queue.virtq.size() - 1);
        let bad = (0..queue.virtq.size()).filter(|&index| index != last);
        bad.for_each(|index| queue.virtq.write_len(index, 8));
        let start = queue.virtq.used_index();
        provoke_event(&a);
        // The one good buffer is the last of 64, and nobody kicks again.
        eventually("the event", LONG, || queue.virtq.used_index().wrapping_sub(start) == queue.virtq.size());
        assert_eq!(queue.virtq.used_len(queue.virtq.size() - 1), 16);
        assert_eq!(queue.last_event().kind.get(), EventType::QpFatal.to_wire());
        assert_eq!(queue.last_event().number.get(), number);
    }
}

#[test]
fn a_call_descriptor_that_blocks_holds_up_nobody() {
    let (bed, v, w) = victims();
    let (a, _b) = Rc::pair(&bed.guests[0], &bed.guests[0], 64).unwrap();
    {
        let queue = bed.guests[0].events().queue(0);
        let _ = queue.virtq.call.read();
        queue.virtq.call.write(u64::MAX - 1).unwrap();
        make_blocking(&queue.virtq.call);
    }
    provoke_event(&a);
    std::thread::sleep(Duration::from_millis(20));
    assert_served(&v, &w);
    assert_stops(&bed.router);
}

fn make_blocking(fd: &impl AsRawFd) {
    // SAFETY: commands without pointers, on a descriptor that is open.
    unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        assert_eq!(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK), 0);
    }
}

/// Replaces the call descriptor of event queue 0 by one end of a socket pair, as User-mode Linux does.
fn call_by_socket(guest: &Guest) -> (UnixStream, UnixStream) {
    let (reader, writer) = UnixStream::pair().unwrap();
    // SAFETY: a descriptor of its own; nothing is asked of the eventfd but its number.
    let call = unsafe { EventFd::from_raw_fd(writer.try_clone().unwrap().into_raw_fd()) };
    guest.with_connection(|c| Ok(c.frontend().set_vring_call(1, &call)?)).unwrap();
    (reader, writer)
}

#[test]
fn a_socket_interrupts() {
    let bed = Bed::with(&on_one_worker(1), Placement::Contiguous);
    let (a, _b) = Rc::pair(&bed.guests[0], &bed.guests[0], 64).unwrap();
    let (mut reader, _writer) = call_by_socket(&bed.guests[0]);
    provoke_event(&a);
    reader.read_exact(&mut [0; 8]).unwrap();
}

#[test]
fn a_full_socket_holds_up_nobody() {
    let (bed, v, w) = victims();
    let (a, _b) = Rc::pair(&bed.guests[0], &bed.guests[0], 64).unwrap();
    let (_reader, mut writer) = call_by_socket(&bed.guests[0]);
    writer.set_nonblocking(true).unwrap();
    while writer.write(&[0; 4096]).is_ok() {}
    make_blocking(&writer);
    provoke_event(&a);
    std::thread::sleep(Duration::from_millis(20));
    assert_served(&v, &w);
    assert_stops(&bed.router);
}

#[test]
fn descriptors_that_are_files_are_refused() {
    let bed = Bed::with(&on_one_worker(1), Placement::Contiguous);
    let file = || std::fs::File::open("/dev/null").unwrap().into_raw_fd();
    // SAFETY: descriptors of their own; nothing is asked of the eventfds but their numbers.
    let (call, kick) = unsafe { (EventFd::from_raw_fd(file()), EventFd::from_raw_fd(file())) };
    let try_both = |c: &mut Connection| {
        let call = c.frontend().set_vring_call(1, &call).is_err();
        Ok((call, c.frontend().set_vring_kick(1, &kick).is_err()))
    };
    assert_eq!(bed.guests[0].with_connection(try_both).unwrap(), (true, true));
}

#[test]
fn heads_beyond_the_queue_fill_no_log() {
    logs::collect();
    let bed = Bed::with(&on_one_worker(1), Placement::Contiguous);
    {
        let ctrl = bed.guests[0].ctrl();
        let size = ctrl.virtq.size();
        (0..size).for_each(|slot| ctrl.virtq.write_available(slot, 0xffff));
        for _ in 0..20 {
            let used = ctrl.virtq.avail_word().fetch_add(u32::from(size) << 16, SeqCst);
            ctrl.virtq.notify_always();
            std::thread::sleep(Duration::from_millis(2));
            assert!(used > 0);
        }
    }
    bed.guests[0].disconnect();
    assert!(logs::lines_with("out of bounds descriptor").is_empty());
}

#[test]
fn connecting_again_and_again_fills_no_log() {
    logs::collect();
    let start = Instant::now();
    let bed = Bed::with(&on_one_worker(1), Placement::Contiguous);
    bed.guests[0].disconnect();
    for _ in 0..500 {
        drop(UnixStream::connect(bed.router.socket_of(0)));
    }
    // Served after all of them.
    drop(bed.router.guest(0, GuestConfig::default()));
    let name = format!("{}:", bed.router.name_of(0));
    bed.router.stop();
    let lines = logs::lines_with(&name);
    // The limit is one of each window, the first of which began with the virtual NIC. All is over within one, but on a machine
    // that is busy or under a sanitizer.
    let windows = 1 + (start.elapsed().as_millis() / WINDOW.as_millis()) as usize;
    let most = OF_ITS_START + A_WINDOW * windows;
    assert!(lines.len() <= most, "{} lines in {windows} windows: {lines:#?}", lines.len());
}

#[test]
fn commands_without_end_keep_nobody_from_being_heard() {
    let bed = Bed::with(&on_one_worker(1), Placement::Contiguous);
    let guest = &bed.guests[0];
    let bases = guest.stop_queues().unwrap();
    let ctrl = guest.ctrl();
    make_chains_long(guest, &ctrl.virtq);
    while_offering(&ctrl.virtq, || {
        // The control queue is among those that the VMM starts and stops, and gets its answers.
        let start = Instant::now();
        guest.with_connection(|c| c.start_queue(0, &ctrl.virtq, bases[0])).unwrap();
        for index in 0..guest.events().count() {
            let queue = guest.events().queue(index);
            guest.with_connection(|c| c.start_queue(1 + index, &queue.virtq, bases[1 + index])).unwrap();
        }
        guest.start_doorbell_queues_at(&bases).unwrap();
        guest.with_connection(Connection::config).unwrap();
        assert!(start.elapsed() < LONG);
        assert_stops(&bed.router);
    });
}

/// A request of the VMM without an answer so far.
const GET_FEATURES: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

fn connect_raw(router: &TestRouter) -> UnixStream {
    let stream = UnixStream::connect(router.socket_of(0)).unwrap();
    eventually("the connection", LONG, || router.is_connected(0));
    stream
}

#[test]
fn a_vmm_that_does_not_read_is_disconnected() {
    let router = TestRouter::start(&on_one_worker(1));
    let mut stream = connect_raw(&router);
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    while stream.write_all(&GET_FEATURES).is_ok() {}
    eventually("the end of the connection", LONG + LONG, || !router.is_connected(0));
    // Another is served.
    drop(router.guest(0, GuestConfig::default()));
}

#[test]
fn a_vmm_that_does_not_read_does_not_hold_up_stop() {
    let router = TestRouter::start(&on_one_worker(1));
    let mut stream = connect_raw(&router);
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    while stream.write_all(&GET_FEATURES).is_ok() {}
    assert_stops(&router);
}

#[test]
fn half_a_message_does_not_hold_up_stop() {
    let router = TestRouter::start(&on_one_worker(1));
    let mut stream = connect_raw(&router);
    stream.write_all(&GET_FEATURES[..5]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_stops(&router);
}
