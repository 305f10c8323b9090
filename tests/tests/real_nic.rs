//! A NIC that the kernel knows, at bad moments. Ignored: these make and break interfaces of the machine, which is to be a guest that plays the host
//! (`make nic`).
#![allow(missing_docs, reason = "a test program")]

use std::os::fd::BorrowedFd;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freeflow_backend::Gid;
use freeflow_backend::verbs::host::HostNic;
use freeflow_backend::verbs::{
    Access, Capacity, CompletionQueue, Connection, Device, DeviceError, Endpoint, Limits, PostedOp, ProtectionDomain,
    QueuePair, QueuePairSpec, SendList, Sending, Trouble,
};
use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::GuestConfig;
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{Mr, MrSpec, Op, QpSpec, Rc, RcOptions, SendWr};
use freeflow_tests::router::RouterSpec;
use virtio_rdma::PAGE_SIZE;
use virtio_rdma::ib::{AtomicCap, QpState, QpType, SendFlags, WcOpcode, WcStatus};

const SOON: Duration = Duration::from_secs(20);

/// An interface with rxe on it.
struct Rxe {
    number: u8,
}

fn run(words: &str) -> bool {
    let words: Vec<_> = words.split_whitespace().collect();
    Command::new(words[0]).args(&words[1..]).status().expect("ip and rdma are installed").success()
}

impl Rxe {
    fn new(number: u8) -> Self {
        let made = [
            format!("ip link add {} type dummy", Self::interface_of(number)),
            format!("ip address add 10.44.{number}.1/24 dev {}", Self::interface_of(number)),
            format!("ip link set {} up", Self::interface_of(number)),
            format!("rdma link add rxe{number} type rxe netdev {}", Self::interface_of(number)),
        ];
        assert!(made.iter().all(|command| run(command)), "a host with rxe");
        Self { number }
    }

    fn interface_of(number: u8) -> String {
        format!("rxenet{number}")
    }

    fn interface(&self) -> String {
        Self::interface_of(self.number)
    }

    fn name(&self) -> String {
        format!("rxe{}", self.number)
    }

    fn open(&self) -> Arc<HostNic> {
        let name = self.name().parse().unwrap();
        let deadline = Instant::now() + SOON;
        loop {
            // Its GIDs and its port follow the interface by a moment.
            match HostNic::open(&name) {
                Ok(nic) => return Arc::new(nic),
                Err(error) if Instant::now() > deadline => panic!("{error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn set(&self, state: &str) {
        assert!(run(&format!("ip link set {} {state}", self.interface())));
    }

    fn exists(&self) -> bool {
        std::fs::exists(format!("/sys/class/infiniband/{}", self.name())).unwrap()
    }
}

impl Drop for Rxe {
    fn drop(&mut self) {
        if self.exists() {
            run(&format!("rdma link delete {}", self.name()));
        }
        run(&format!("ip link delete {}", self.interface()));
    }
}

fn bed_on(nic: &Arc<HostNic>) -> Bed {
    Bed::with(&RouterSpec::of(2).over(nic.clone()), Placement::Contiguous)
}

fn pair(bed: &Bed, timeout: u8, retry_cnt: u8) -> (Rc, Rc) {
    let (a, b) = bed.two();
    Rc::pair_with(a, b, &QpSpec::rc(), 1 << 16, &RcOptions { timeout, retry_cnt, ..RcOptions::default() }).unwrap()
}

fn write(id: u64, a: &Rc, b: &Rc) {
    a.qp.post(SendWr::new(id, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 1 << 16)])).unwrap();
}

/// Four requests at a time, until one fails or so much time has passed.
fn traffic(a: &Rc, b: &Rc, time: Duration) -> WcStatus {
    let end = Instant::now() + time;
    (0..4).for_each(|id| write(id, a, b));
    let mut under_way = 4;
    for id in 4.. {
        let wc = a.cq.next();
        under_way -= 1;
        if wc.status() != WcStatus::Success {
            return wc.status();
        }
        if Instant::now() < end {
            write(id, a, b);
            under_way += 1;
        } else if under_way == 0 {
            return WcStatus::Success;
        }
    }
    unreachable!()
}

fn over_nic(bed: &Bed) -> u64 {
    bed.router.router().nics().iter().map(|nic| nic.counters.nic_wqes).sum()
}

#[test]
#[ignore = "changes interfaces"]
fn an_interface_that_is_down_fails_queue_pairs_until_it_is_up() {
    let rxe = Rxe::new(2);
    let nic = rxe.open();
    let bed = bed_on(&nic);
    let (a, b) = pair(&bed, 10, 2);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| traffic(&a, &b, SOON));
        eventually("traffic over the NIC", SOON, || over_nic(&bed) > 3);
        rxe.set("down");
        // rxe flushes at once; others try again until the guest's retries are used up.
        assert!(matches!(load.join().unwrap(), WcStatus::WrFlushErr | WcStatus::RetryExcErr));
    });
    assert!(a.cq.take(3).iter().all(|wc| wc.status() == WcStatus::WrFlushErr));
    assert_eq!(a.qp.state().unwrap(), QpState::Err);
    rxe.set("up");
    eventually("a GID", SOON, || nic.gid().0[15] == 1);
    let before = over_nic(&bed);
    let (c, d) = pair(&bed, 14, 7);
    assert_eq!(traffic(&c, &d, Duration::from_millis(100)), WcStatus::Success);
    assert!(over_nic(&bed) > before, "new queue pairs use it again");
}

/// rxe cannot be taken away from those who use it: the command waits for them, and hears nothing of it.
#[test]
#[ignore = "changes interfaces"]
fn a_nic_that_is_deleted_is_gone_when_the_router_is() {
    let rxe = Rxe::new(3);
    let nic = rxe.open();
    let bed = bed_on(&nic);
    let (a, b) = pair(&bed, 14, 7);
    let name = rxe.name();
    let deleted = std::thread::spawn(move || run(&format!("rdma link delete {name}")));
    assert_eq!(traffic(&a, &b, Duration::from_millis(300)), WcStatus::Success);
    drop((a, b));
    drop(bed);
    drop(nic);
    assert!(deleted.join().unwrap());
    assert!(!rxe.exists());
}

#[test]
#[ignore = "changes interfaces"]
fn an_interface_that_is_deleted_fails_its_queue_pairs() {
    let rxe = Rxe::new(7);
    let nic = rxe.open();
    let bed = bed_on(&nic);
    let (a, b) = pair(&bed, 10, 2);
    let interface = rxe.interface();
    let deleted = std::thread::scope(|scope| {
        let load = scope.spawn(|| traffic(&a, &b, SOON));
        eventually("traffic over the NIC", SOON, || over_nic(&bed) > 3);
        // As above, it waits for us.
        let deleted = std::thread::spawn(move || run(&format!("ip link delete {interface}")));
        assert_ne!(load.join().unwrap(), WcStatus::Success);
        deleted
    });
    assert!(a.cq.take(3).iter().all(|wc| wc.status() == WcStatus::WrFlushErr));
    drop((a, b));
    drop(bed);
    drop(nic);
    assert!(deleted.join().unwrap());
    eventually("the end of the device", SOON, || !rxe.exists());
}

/// A queue pair that is connected to itself and has four completions' room.
fn alone(nic: &Arc<HostNic>) -> (Box<dyn QueuePair>, Arc<dyn CompletionQueue>) {
    let cq = nic.create_cq(4).unwrap();
    let capacity = Capacity { sends: 64, recvs: 1, sges: 1, inline: 0 };
    let qp = nic.alloc_pd().unwrap().create_qp(&QueuePairSpec { kind: QpType::Rc, cq: &cq, capacity }).unwrap();
    let peer = Endpoint { qpn: qp.number(), gid: nic.gid(), psn: 5 };
    qp.connect(&Connection { peer, access: Access::REMOTE_WRITE, mtu: 5, answers: 1 }).unwrap();
    qp.start_sending(Sending { psn: 5, timeout: 14, retry_cnt: 7, reads: 1 }).unwrap();
    (qp, cq)
}

#[test]
#[ignore = "changes interfaces"]
fn a_completion_queue_that_overflows_is_heard_of() {
    let rxe = Rxe::new(4);
    let nic = rxe.open();
    let (qp, cq) = alone(&nic);
    let mut list = SendList::default();
    (0..32).for_each(|id| list.push(id, PostedOp::Write, SendFlags::SIGNALED, (0, 0)));
    qp.post_send(&list).unwrap();
    let mut trouble = Vec::new();
    eventually("an overflow", SOON, || {
        nic.take_trouble(&mut trouble);
        trouble.contains(&Trouble::CompletionQueue)
    });
    let mut seen = Vec::new();
    cq.poll(64, &mut seen);
    assert!((4..32).contains(&seen.len()), "{} of 32", seen.len());
}

#[test]
#[ignore = "changes interfaces"]
fn a_queue_pair_that_is_gone_completes_nothing() {
    let rxe = Rxe::new(5);
    let nic = rxe.open();
    let (qp, cq) = alone(&nic);
    let mut list = SendList::default();
    (0..3).for_each(|id| list.push(id, PostedOp::Write, SendFlags::SIGNALED, (0, 0)));
    cq.arm().unwrap();
    qp.post_send(&list).unwrap();
    let mut fds = [readable(cq.as_ref())];
    assert!(nix::poll::poll(&mut fds, 20_000u16).unwrap() > 0, "an event");
    cq.take_events();
    drop(qp);
    let mut seen = Vec::new();
    cq.poll(64, &mut seen);
    assert_eq!(seen, []);
}

/// How many mappings a process may have, lower for a while.
struct FewMappings(String);

const MAP_COUNT: &str = "/proc/sys/vm/max_map_count";

impl FewMappings {
    fn new(count: usize) -> Self {
        let before = std::fs::read_to_string(MAP_COUNT).unwrap();
        std::fs::write(MAP_COUNT, count.to_string()).unwrap();
        Self(before)
    }
}

impl Drop for FewMappings {
    fn drop(&mut self) {
        std::fs::write(MAP_COUNT, &self.0).unwrap();
    }
}

/// Regions in pieces need mappings of the process, half of which they get; what is beyond that is copied.
#[test]
#[ignore = "changes what processes may have"]
fn regions_in_too_many_pieces_go_without_the_nic() {
    const PIECES: usize = 1500;
    let _few = FewMappings::new(4000);
    let rxe = Rxe::new(8);
    let config = GuestConfig { memory_size: 64 << 20, ..GuestConfig::default() };
    let bed = Bed::guests(&RouterSpec::of(2).over(rxe.open()), &config);
    let (a, b) = bed.pair(1 << 16);
    let region = || {
        let buf = bed.guests[1].alloc_placed(PIECES * PAGE_SIZE, Placement::Fragmented).unwrap();
        b.pd.reg(&buf).unwrap()
    };
    // How many work requests went over the NIC.
    let write_to = |mr: &Mr, byte: u8| {
        let before = over_nic(&bed);
        a.mr.fill(0, 8, byte);
        let last = mr.remote((PIECES - 1) * PAGE_SIZE);
        a.qp.post(SendWr::new(1, Op::Write(last), &[a.mr.sge(0, 8)])).unwrap();
        a.cq.next().ok();
        assert_eq!(mr.read((PIECES - 1) * PAGE_SIZE, 8), [byte; 8]);
        over_nic(&bed) - before
    };
    let (first, second) = (region(), region());
    assert_eq!((write_to(&first, 1), write_to(&second, 2)), (1, 0));
    drop(first);
    let third = region();
    assert_eq!((write_to(&third, 3), write_to(&second, 4)), (1, 0), "what was given back can be had again");
}

/// A NIC whose atomics are so with those of processors, it says. No NIC that tests have does.
#[derive(Debug)]
struct Global(Arc<HostNic>);

impl Device for Global {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn limits(&self) -> Limits {
        Limits { atomics: AtomicCap::Glob, ..self.0.limits() }
    }

    fn gid(&self) -> Gid {
        self.0.gid()
    }

    fn alloc_pd(&self) -> Result<Arc<dyn ProtectionDomain>, DeviceError> {
        self.0.alloc_pd()
    }

    fn create_cq(&self, entries: u32) -> Result<Arc<dyn CompletionQueue>, DeviceError> {
        self.0.create_cq(entries)
    }

    fn take_trouble(&self, out: &mut Vec<Trouble>) {
        self.0.take_trouble(out);
    }

    fn trouble_fd(&self) -> BorrowedFd<'_> {
        self.0.trouble_fd()
    }
}

#[test]
#[ignore = "changes interfaces"]
fn atomics_go_to_a_nic_whose_atomics_are_everybodys() {
    const ROUNDS: u64 = 50;
    let rxe = Rxe::new(9);
    let bed = Bed::with(&RouterSpec::of(2).over(Arc::new(Global(rxe.open()))), Placement::Contiguous);
    let (a, b) = bed.pair(64);
    let (other, _end) = Rc::sibling((&a, &b), &QpSpec::rc(), 64).unwrap();
    let access = Access::LOCAL_WRITE | Access::REMOTE_ATOMIC;
    let region = b.pd.reg_spec(MrSpec::whole(b.mr.buf()).access(access)).unwrap();
    std::thread::scope(|scope| {
        for from in [&a, &other] {
            let word = region.remote(8);
            scope.spawn(move || {
                for id in 0..ROUNDS {
                    from.qp.post(SendWr::new(id, Op::FetchAdd(word, 3), &[from.mr.sge(0, 8)])).unwrap();
                    assert_eq!(from.cq.next().ok().opcode(), WcOpcode::FetchAdd);
                }
            });
        }
    });
    let sum = 2 * ROUNDS * 3;
    for (compare, swap, left) in [(sum + 1, 7, sum), (sum, 7, 7)] {
        a.qp.post(SendWr::new(1, Op::CompareSwap(region.remote(8), compare, swap), &[a.mr.sge(0, 8)])).unwrap();
        assert_eq!(a.cq.next().ok().opcode(), WcOpcode::CompSwap);
        assert_eq!((a.mr.read(0, 8), b.mr.read(8, 8)), (sum.to_ne_bytes().to_vec(), left.to_ne_bytes().to_vec()));
    }
    assert_eq!(over_nic(&bed), 2 * ROUNDS + 2);
}

fn readable(cq: &dyn CompletionQueue) -> nix::poll::PollFd<'_> {
    nix::poll::PollFd::new(cq.events_fd(), nix::poll::PollFlags::POLLIN)
}

#[test]
#[ignore = "changes interfaces"]
fn what_cannot_be_used_says_why() {
    let rxe = Rxe::new(6);
    drop(rxe.open());
    let why = |choice: &str| HostNic::open(&choice.parse().unwrap()).unwrap_err().to_string();
    assert!(why("mlx5_7").contains("only") && why("mlx5_7").contains("rxe6"));
    assert!(why("rxe6:9").contains("no port 9"));
    rxe.set("down");
    eventually("a port that is down", SOON, || HostNic::open(&"rxe6".parse().unwrap()).is_err());
    assert!(why("rxe6").contains("is down") || why("rxe6").contains("no RoCE v2 GID"), "{}", why("rxe6"));
}
