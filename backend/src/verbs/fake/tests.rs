//! What a fake NIC does, with two queue pairs over memory of this process.

use std::fs::File;

use virtio_rdma::ib::{QpType, SendFlags, WcOpcode};

use super::*;
use crate::mem::{Map, RegionId, write};
use crate::verbs::{Capacity, Endpoint, PostedOp};
use crate::wqe::Sge;

const SIZE: u64 = 1 << 16;
const IOVA: u64 = 0x7000_0000;

struct End {
    map: Map,
    layout: Arc<Layout>,
    mr: Arc<dyn MemoryRegion>,
    qp: Box<dyn QueuePair>,
    cq: Arc<dyn CompletionQueue>,
}

impl End {
    fn new(nic: &FakeNic, kind: QpType, cqes: u32) -> Self {
        let memory = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(SIZE).unwrap();
        let map = Map::default().with(RegionId { gpa: 0, size: SIZE, vmm_addr: 0, offset: 0 }, memory).unwrap();
        let mut layout = Layout::default();
        layout.append(&map, &[(0, SIZE)], SIZE, 16).unwrap();
        let layout = Arc::new(layout);
        let pd = nic.alloc_pd().unwrap();
        let cq = nic.create_cq(cqes).unwrap();
        let capacity = Capacity { sends: 8, recvs: 8, sges: 4, inline: 64 };
        let qp = pd.create_qp(&QueuePairSpec { kind, cq: &cq, capacity }).unwrap();
        let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ;
        let mr = pd.register(&layout, IOVA, access).unwrap();
        Self { map, layout, mr, qp, cq }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let mut segs = Vec::new();
        self.layout.segments(at, bytes.len() as u64, &mut segs);
        write(bytes, segs[0]);
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(self.map.read(at, &mut bytes));
        bytes
    }

    fn sge(&self, at: u64, length: u32) -> Sge {
        Sge { addr: IOVA + at, length, lkey: self.mr.lkey() }
    }

    fn connect_to(&self, peer: &Self) {
        let peer = Endpoint { qpn: peer.qp.number(), gid: Gid([0; 16]), psn: 1 };
        let access = Access::REMOTE_WRITE | Access::REMOTE_READ;
        self.qp.connect(&Connection { peer, access, mtu: 5, answers: 1 }).unwrap();
        self.qp.start_sending(Sending { psn: 1, timeout: 14, retry_cnt: 7, reads: 1 }).unwrap();
    }

    fn post(&self, id: u64, op: PostedOp, sge: Sge, remote: (u64, u32)) {
        let mut list = SendList::default();
        list.push(id, op, SendFlags::SIGNALED, remote);
        list.push_sge(sge);
        self.qp.post_send(&list).unwrap();
    }

    fn poll(&self) -> Vec<Wc> {
        let mut out = Vec::new();
        self.cq.poll(16, &mut out);
        out
    }

    fn statuses(&self) -> Vec<(u64, WcStatus)> {
        self.poll().iter().map(|wc| (wc.id, wc.status)).collect()
    }
}

fn pair(nic: &FakeNic, kind: QpType) -> (End, End) {
    let (a, b) = (End::new(nic, kind, 64), End::new(nic, kind, 64));
    a.connect_to(&b);
    b.connect_to(&a);
    (a, b)
}

#[test]
fn bytes_go_where_keys_say() {
    let nic = FakeNic::new(Script::default());
    let (a, b) = pair(&nic, QpType::Rc);
    a.put(100, b"from a");
    a.post(1, PostedOp::Write, a.sge(100, 6), (IOVA + 7, b.mr.rkey()));
    assert_eq!(b.get(7, 6), b"from a");
    b.put(500, b"of b");
    a.post(2, PostedOp::Read, a.sge(300, 4), (IOVA + 500, b.mr.rkey()));
    assert_eq!(a.get(300, 4), b"of b");
    b.qp.post_recv(&RecvRequest { id: 9, sges: &[b.sge(1000, 3), b.sge(2000, 50)] }).unwrap();
    a.post(3, PostedOp::SendImm(77), a.sge(100, 6), (0, 0));
    assert_eq!((b.get(1000, 3), b.get(2000, 3)), (b"fro".to_vec(), b"m a".to_vec()));
    assert_eq!(a.statuses(), [1, 2, 3].map(|id| (id, WcStatus::Success)));
    let wc = Wc { id: 9, status: WcStatus::Success, opcode: WcOpcode::Recv, byte_len: 6, imm: Some(77) };
    assert_eq!(b.poll(), [wc]);
    assert_eq!((nic.counts().sent, nic.counts().bytes), (3, 16));
}

#[test]
fn a_message_waits_for_its_receive() {
    let nic = FakeNic::new(Script::default());
    let (a, b) = pair(&nic, QpType::Rc);
    a.post(1, PostedOp::Send, a.sge(0, 5), (0, 0));
    assert_eq!((a.poll(), nic.counts().not_ready > 0), (vec![], true));
    b.qp.post_recv(&RecvRequest { id: 2, sges: &[b.sge(0, 5)] }).unwrap();
    assert_eq!((a.statuses(), b.statuses()), (vec![(1, WcStatus::Success)], vec![(2, WcStatus::Success)]));
}

#[test]
fn each_class_of_error_is_told_to_both_sides() {
    let long = |b: &End| (IOVA + SIZE - 2, b.mr.rkey());
    for (op, local, remote, status, receive) in [
        (PostedOp::Write, 0, None, WcStatus::RemAccessErr, WcStatus::WrFlushErr),
        (PostedOp::Read, 0, None, WcStatus::RemAccessErr, WcStatus::WrFlushErr),
        (PostedOp::Send, 0, None, WcStatus::RemInvReqErr, WcStatus::LocLenErr),
        (PostedOp::Write, SIZE, Some(0), WcStatus::LocProtErr, WcStatus::WrFlushErr),
    ] {
        let nic = FakeNic::new(Script::default());
        let (a, b) = pair(&nic, QpType::Rc);
        b.qp.post_recv(&RecvRequest { id: 5, sges: &[b.sge(0, 1)] }).unwrap();
        a.post(1, op, a.sge(local, 5), remote.map_or(long(&b), |at| (IOVA + at, b.mr.rkey())));
        a.post(2, op, a.sge(0, 5), (IOVA, b.mr.rkey()));
        assert_eq!(a.statuses(), [(1, status), (2, WcStatus::WrFlushErr)], "{op:?}");
        let mut trouble = Vec::new();
        nic.take_trouble(&mut trouble);
        if status == WcStatus::LocProtErr {
            assert_eq!((trouble, b.poll()), (vec![], vec![]), "the responder hears nothing");
        } else {
            assert_eq!(trouble, [Trouble::QueuePair(b.qp.number())], "{op:?}");
            assert_eq!(b.statuses(), [(5, receive)], "{op:?}");
        }
    }
}

#[test]
fn what_is_unreliable_gets_lost() {
    let nic = FakeNic::new(Script::default());
    let (a, b) = pair(&nic, QpType::Uc);
    a.post(1, PostedOp::Send, a.sge(0, 5), (0, 0));
    a.post(2, PostedOp::Write, a.sge(0, 5), (IOVA, 1));
    b.qp.fail();
    a.post(3, PostedOp::Write, a.sge(0, 5), (IOVA, b.mr.rkey()));
    assert_eq!(a.statuses(), [1, 2, 3].map(|id| (id, WcStatus::Success)));
    assert_eq!(b.poll(), []);
}

#[test]
fn a_key_that_went_gives_access_to_nothing() {
    let nic = FakeNic::new(Script::default());
    let (a, mut b) = pair(&nic, QpType::Rc);
    let key = b.mr.rkey();
    b.mr = a.mr.clone();
    a.post(1, PostedOp::Write, a.sge(0, 5), (IOVA, key));
    assert_eq!(a.statuses(), [(1, WcStatus::RemAccessErr)]);
    assert_eq!(nic.counts().mrs, 1);
}

#[test]
fn errors_can_be_asked_for() {
    let nic = FakeNic::new(Script::default());
    let (a, b) = pair(&nic, QpType::Rc);
    nic.fail_send(1, WcStatus::RetryExcErr);
    (1..4).for_each(|id| a.post(id, PostedOp::Write, a.sge(0, 5), (IOVA, b.mr.rkey())));
    let flushed = (3, WcStatus::WrFlushErr);
    assert_eq!(a.statuses(), [(1, WcStatus::Success), (2, WcStatus::RetryExcErr), flushed]);
    nic.break_qp(b.qp.number());
    let mut trouble = Vec::new();
    nic.take_trouble(&mut trouble);
    assert_eq!(trouble, [Trouble::QueuePair(b.qp.number())]);
}

#[test]
fn a_full_completion_queue_fails_its_queue_pairs() {
    let nic = FakeNic::new(Script::default());
    let (a, b) = (End::new(&nic, QpType::Rc, 2), End::new(&nic, QpType::Rc, 2));
    a.connect_to(&b);
    b.connect_to(&a);
    (1..4).for_each(|id| a.post(id, PostedOp::Write, a.sge(0, 5), (IOVA, b.mr.rkey())));
    let mut trouble = Vec::new();
    nic.take_trouble(&mut trouble);
    assert_eq!(trouble, [Trouble::CompletionQueue, Trouble::QueuePair(a.qp.number())]);
    assert_eq!(a.statuses(), [1, 2].map(|id| (id, WcStatus::Success)));
}

#[test]
fn late_completions_keep_the_order_of_each_queue_only() {
    let orders: Vec<Vec<u64>> = (0..4)
        .map(|seed| {
            let nic = FakeNic::new(Script::shuffled(seed));
            let (a, b) = pair(&nic, QpType::Rc);
            // A second pair that completes into the same queue.
            let (mut c, d) = (End::new(&nic, QpType::Rc, 1), End::new(&nic, QpType::Rc, 64));
            let pd = nic.alloc_pd().unwrap();
            let capacity = Capacity { sends: 8, recvs: 8, sges: 4, inline: 64 };
            c.qp = pd.create_qp(&QueuePairSpec { kind: QpType::Rc, cq: &a.cq, capacity }).unwrap();
            c.mr = pd.register(&c.layout, IOVA, Access::LOCAL_WRITE).unwrap();
            c.connect_to(&d);
            d.connect_to(&c);
            (0..6).for_each(|id| a.post(id, PostedOp::Write, a.sge(0, 5), (IOVA, b.mr.rkey())));
            (10..16).for_each(|id| c.post(id, PostedOp::Write, c.sge(0, 5), (IOVA, d.mr.rkey())));
            assert_eq!(nic.counts().sent, 0, "nothing is executed as it is posted");
            let mut all = Vec::new();
            while all.len() < 12 {
                all.extend(a.poll().iter().map(|wc| wc.id));
            }
            all
        })
        .collect();
    for order in &orders {
        assert!(order.iter().filter(|id| **id < 10).is_sorted() && order.iter().filter(|id| **id >= 10).is_sorted());
    }
    assert!(orders.iter().any(|order| order != &orders[0]), "seeds matter");
}

#[test]
fn limits_hold_and_nothing_stays() {
    let limits = Limits { qps: 2, mrs: 1, cqs: 3, cqes: 100, wrs: 8, ..Script::default().limits };
    let nic = FakeNic::new(Script { limits, ..Script::default() });
    let a = End::new(&nic, QpType::Rc, 64);
    let pd = nic.alloc_pd().unwrap();
    assert!(matches!(pd.register(&a.layout, 0, Access::empty()), Err(DeviceError::Limit(_))));
    assert!(matches!(nic.create_cq(101), Err(DeviceError::Limit(_))));
    let capacity = |sends| Capacity { sends, recvs: 8, sges: 4, inline: 0 };
    let make = |sends| pd.create_qp(&QueuePairSpec { kind: QpType::Rc, cq: &a.cq, capacity: capacity(sends) });
    assert!(matches!(make(9), Err(DeviceError::Limit(_))));
    let second = make(8).unwrap();
    assert!(matches!(make(8), Err(DeviceError::Limit(_))));
    drop((a, pd, second));
    assert_eq!(nic.counts(), Counts { registrations: 1, ..Counts::default() });
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&rustix::fs::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

#[test]
fn one_event_for_one_arming() {
    let nic = FakeNic::new(Script::default());
    let (a, b) = pair(&nic, QpType::Rc);
    let write = |id| a.post(id, PostedOp::Write, a.sge(0, 5), (IOVA, b.mr.rkey()));
    write(1);
    assert!(!is_readable(a.cq.events_fd()), "nobody has asked");
    a.cq.arm().unwrap();
    assert!(!is_readable(a.cq.events_fd()), "what was there before makes no event");
    write(2);
    assert!(is_readable(a.cq.events_fd()) && !is_readable(b.cq.events_fd()));
    a.cq.take_events();
    write(3);
    assert!(!is_readable(a.cq.events_fd()));
    assert!(!is_readable(nic.trouble_fd()));
    nic.break_qp(b.qp.number());
    assert!(is_readable(nic.trouble_fd()));
    nic.take_trouble(&mut Vec::new());
    assert!(!is_readable(nic.trouble_fd()));
}

/// A late one gets on by itself while somebody waits, and only then.
#[test]
fn who_waits_for_an_event_gets_one() {
    let nic = FakeNic::new(Script::shuffled(1));
    let (a, b) = pair(&nic, QpType::Rc);
    for id in 0..50 {
        a.cq.arm().unwrap();
        a.post(id, PostedOp::Write, a.sge(0, 5), (IOVA, b.mr.rkey()));
        let start = std::time::Instant::now();
        while !is_readable(a.cq.events_fd()) {
            assert!(start.elapsed().as_secs() < 10, "the event of {id}");
            std::thread::yield_now();
        }
        a.cq.take_events();
        let mut all = Vec::new();
        while all.is_empty() {
            all = a.statuses();
        }
        assert_eq!(all, [(id, WcStatus::Success)]);
    }
}
