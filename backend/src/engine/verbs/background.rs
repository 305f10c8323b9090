//! What is done for the host's NIC beside the data path, since it may take long or nobody else would hear of it: queue pairs are connected,
//! and what no completion says finds its queue pairs. One thread does it; a host without threads does it between two steps.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use virtio_rdma::ib::QpState;

use super::super::Engine;
use super::poll::give_up;
use crate::verbs::fabric::{Failing, Side};
use crate::verbs::{ConnectError, Fabric, Member, Target, Trouble, Wish};

/// How soon a wish is looked at again that could not be fulfilled yet, and a queue pair that has failed.
const RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
/// How often the latter, until the NIC is not waited for any more.
const LOOKS: u32 = 100;

/// Starts the thread.
pub(in super::super) fn spawn(engine: Arc<Engine>) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("verbs".to_owned()).spawn(move || {
        let Some(fabric) = engine.fabric().cloned() else { return };
        while !engine.stop.load(Ordering::SeqCst) {
            see_to(&engine, &fabric);
            wait(&fabric);
        }
    })
}

/// Does what there is to do.
pub(in super::super) fn see_to(engine: &Engine, fabric: &Fabric) {
    for wish in fabric.take_wishes() {
        fulfil(engine, fabric, wish);
    }
    let mut trouble = Vec::new();
    fabric.device().take_trouble(&mut trouble);
    for what in trouble {
        suffer(engine, fabric, what);
    }
    fabric.look_at_failing(|failing| is_flushing(engine, failing));
}

fn wait(fabric: &Fabric) {
    let mut fds =
        [fabric.device().trouble_fd(), fabric.wished_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    let limit = fabric.is_unsettled().then_some(RETRY);
    if let Err(error) = poll(&mut fds, limit.as_ref())
        && error != rustix::io::Errno::INTR
    {
        log::error!("the host's NIC cannot be waited for: {error}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    // Before the next look, so that none is missed. Fails when it is zero.
    let _ = rustix::io::read(fabric.wished_fd(), &mut [0; 8]);
}

/// The two are connected, or it is known that they will not be: the sender is visited.
fn fulfil(engine: &Engine, fabric: &Fabric, wish: Wish) {
    let Wish { from, to, done } = &wish;
    let made = match to {
        // An end that was replaced may complete into another queue, which its worker is to wait for from now on.
        Target::Here(to) => fabric.connect(from, to).inspect(|()| engine.wake(to.end.worker())),
        Target::There(end) => fabric.connect_elsewhere(from, *end, true),
        Target::Answer(end, ..) => fabric.connect_elsewhere(from, *end, false),
    };
    match made {
        Ok(()) => {}
        Err(ConnectError::Busy) => return fabric.wish_later(wish),
        Err(error) => {
            from.nic.warn(format_args!("QP {:#x} does without the host's NIC: {error}", from.qp.id.qpn));
        }
    }
    done.store(true, Ordering::Release);
    match to {
        Target::Here(_) | Target::There(_) => engine.attend(&from.nic, &from.qp),
        Target::Answer(_, peer, link, pair) => engine.paired(*peer, *link, *pair),
    }
}

fn suffer(engine: &Engine, fabric: &Fabric, what: Trouble) {
    log::warn!("the host's NIC {}: {what:?}", fabric.device().name());
    match what {
        Trouble::QueuePair(number) => {
            let broken = fabric.sides().filter_map(|side| side.member_of_qp(number));
            broken.for_each(|member| fabric.note_failing(member));
        }
        Trouble::Removed => {
            fabric.set_up(false);
            let all = fabric.sides().flat_map(Side::members);
            all.for_each(|it| give_up(engine, &it.nic, &it.qp, &it.end));
        }
        Trouble::Port { up } => fabric.set_up(up),
        Trouble::CompletionQueue => {}
    }
}

/// Whether completions of a queue pair that has failed are still to come. One of them says why, if the NIC makes them, and the guest is to see that
/// one; if it makes none, what it has is flushed by us.
fn is_flushing(engine: &Engine, failing: &mut Failing) -> bool {
    let Member { nic, qp, end } = &failing.member;
    if end.is_destroyed() || end.incarnation != qp.incarnation() {
        return false;
    }
    end.fail();
    failing.looks += 1;
    let flushed = end.is_quiet() && end.num_recvs() == 0;
    if !flushed && failing.looks < LOOKS {
        return true;
    }
    if !flushed || qp.state() != QpState::Err {
        give_up(engine, nic, qp, end);
    }
    false
}
