//! Queue pairs (IBA 10.2.4, 10.3).
//!
//! A QP has one owner, the worker that serves its send queue; the `send` lock is how the control queue
//! gets a word in. The receive queue is taken from by whoever sends to the QP, under its own short lock. No thread takes a `send` lock
//! while it holds another lock, and no receive or completion lock is held while another is taken, except that of the SRQ behind a receive queue.

mod nic;
mod recv;
mod remote;
mod send;
pub mod state;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;
use virtio_rdma::ctrl::QpAttr;
use virtio_rdma::ib::{Access, QpState, QpType};

pub use nic::{Asked, Between, NicQueue, Posted};
pub use recv::{Flush, RecvQueue, RecvRing, RecvSource, Taken, Ticket};
pub use remote::RemoteFlow;
pub use send::{Binding, SendQueue, Wait, WaitKind};

use crate::cq::Cq;
use crate::srq::Srq;
use crate::tcp::PeerId;
use crate::verbs::End;

/// What never changes about a QP.
#[derive(Debug)]
pub struct Identity {
    /// QP number.
    pub qpn: u32,
    /// Transport.
    pub kind: QpType,
    /// Protection domain.
    pub pdn: u32,
    /// Shared receive queue, if its receives come from one.
    pub srq: Option<Arc<Srq>>,
    /// Doorbell queue, counted from 0.
    pub doorbell_queue: usize,
    /// Bit in that queue's doorbell area.
    pub doorbell: u32,
    /// Bytes of guest memory that its rings take.
    pub ring_bytes: u64,
    /// Every send work request makes a completion.
    pub signal_all: bool,
    /// CQ of the send queue.
    pub send_cq: Arc<Cq>,
    /// CQ of the receive queue.
    pub recv_cq: Arc<Cq>,
}

impl Identity {
    /// Protection domain that its receives are held to.
    pub fn recv_pdn(&self) -> u32 {
        self.srq.as_ref().map_or(self.pdn, |srq| srq.pdn)
    }
}

/// A queue pair.
#[derive(Debug)]
pub struct Qp {
    /// What never changes.
    pub id: Identity,
    state: AtomicU8,
    /// Attributes as the control queue set them.
    pub attrs: Mutex<Attrs>,
    /// The send queue.
    pub send: Mutex<SendQueue>,
    /// The receive queue.
    pub recv: Mutex<RecvQueue>,
    /// In a run queue of its worker; only that worker touches it.
    pub scheduled: AtomicBool,
    /// Somebody has put it before its worker, which has not taken it up yet.
    pub is_put: AtomicBool,
    /// Its earliest timer, `u64::MAX` for none; only its worker touches it.
    pub next_timer: AtomicU64,
    /// Multicast groups that it is in; only the control queue touches it.
    pub groups: AtomicU32,
    /// Names this life of the QP, from RESET to RESET; QP numbers and PSNs alone can come again.
    incarnation: AtomicU64,
    /// `access_flags` of the attributes, for peers' workers.
    access: AtomicU32,
    /// `qkey` of the attributes, for workers.
    qkey: AtomicU32,
    /// `max_rd_atomic` and `max_dest_rd_atomic` of the attributes are not zero.
    resources: AtomicU8,
    /// Its queue pair on the host's NIC, if it has one in this life. Peers' workers look at it.
    end: Mutex<Option<Arc<End>>>,
}

/// Bits of [`Qp::resources`].
const AS_INITIATOR: u8 = 1;
const AS_RESPONDER: u8 = 2;

/// Attributes of a QP, and who it is connected to.
#[derive(Debug, Default)]
pub struct Attrs {
    /// As `MODIFY_QP` set them; the state in here is not used.
    pub attr: QpAttr,
    /// The QP whose messages this one accepts, once the first has come.
    pub accepts: Option<Requester>,
}

/// One life of a QP that sends to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requester {
    /// Where it is, if on another host.
    pub host: Option<PeerId>,
    /// Which life of it.
    pub incarnation: u64,
}

/// A number that was never used for a QP's life before; hardly by an earlier life of this program either, which other hosts may remember.
fn new_incarnation() -> u64 {
    static NEXT: LazyLock<AtomicU64> = LazyLock::new(|| AtomicU64::new(rand::random()));
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Qp {
    /// A QP in RESET.
    pub fn new(id: Identity, send: SendQueue, recv: RecvQueue) -> Self {
        Self {
            id,
            state: AtomicU8::new(QpState::Reset.to_wire()),
            attrs: Mutex::default(),
            send: Mutex::new(send),
            recv: Mutex::new(recv),
            scheduled: AtomicBool::new(false),
            is_put: AtomicBool::new(false),
            next_timer: AtomicU64::new(u64::MAX),
            groups: AtomicU32::new(0),
            incarnation: AtomicU64::new(new_incarnation()),
            access: AtomicU32::new(0),
            qkey: AtomicU32::new(0),
            resources: AtomicU8::new(0),
            end: Mutex::default(),
        }
    }

    /// Which life of the QP this is.
    pub fn incarnation(&self) -> u64 {
        self.incarnation.load(Ordering::Acquire)
    }

    /// What peers may do.
    pub fn access(&self) -> Access {
        Access::from_bits_truncate(self.access.load(Ordering::Acquire))
    }

    /// Whether it may send READs and atomics.
    pub fn has_resources(&self) -> bool {
        self.resources.load(Ordering::Acquire) & AS_INITIATOR != 0
    }

    /// Whether it answers READs and atomics.
    pub fn lends_resources(&self) -> bool {
        self.resources.load(Ordering::Acquire) & AS_RESPONDER != 0
    }

    /// Its `Q_Key`.
    pub fn qkey(&self) -> u32 {
        self.qkey.load(Ordering::Acquire)
    }

    /// Changes the attributes.
    pub fn change_attrs(&self, change: impl FnOnce(&mut QpAttr)) {
        let mut attrs = self.attrs.lock();
        change(&mut attrs.attr);
        self.access.store(attrs.attr.access_flags.get(), Ordering::Release);
        self.qkey.store(attrs.attr.qkey.get(), Ordering::Release);
        let some = |count: u8, bit| if count > 0 { bit } else { 0 };
        let initiator = some(attrs.attr.max_rd_atomic, AS_INITIATOR);
        let resources = initiator | some(attrs.attr.max_dest_rd_atomic, AS_RESPONDER);
        self.resources.store(resources, Ordering::Release);
    }

    /// Starts a new life without attributes; the caller holds the `send` lock.
    pub fn start_over(&self) {
        let mut attrs = self.attrs.lock();
        *attrs = Attrs::default();
        self.incarnation.store(new_incarnation(), Ordering::Release);
        drop(attrs);
        self.access.store(0, Ordering::Release);
        self.qkey.store(0, Ordering::Release);
        self.resources.store(0, Ordering::Release);
    }

    /// Its state.
    pub fn state(&self) -> QpState {
        QpState::from_wire(self.state.load(Ordering::Acquire)).unwrap_or(QpState::Err)
    }

    /// Sets the state; the caller holds the `send` lock.
    pub fn set_state(&self, state: QpState) {
        self.state.store(state.to_wire(), Ordering::Release);
    }

    /// Sets the state unless it is no longer `from`: a peer's worker may have failed the QP. False then.
    pub fn change_state(&self, from: QpState, to: QpState) -> bool {
        let (from, to) = (from.to_wire(), to.to_wire());
        self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Moves a working QP to ERR; false if it was not working (RESET, INIT and ERR stay).
    pub fn fail(&self) -> bool {
        let to_error = |raw| match QpState::from_wire(raw) {
            Some(QpState::Rtr | QpState::Rts | QpState::Sqd | QpState::Sqe) => Some(QpState::Err.to_wire()),
            _ => None,
        };
        self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, to_error).is_ok()
    }

    /// Whether it takes messages from peers.
    pub fn responds(&self) -> bool {
        matches!(self.state(), QpState::Rtr | QpState::Rts | QpState::Sqd | QpState::Sqe)
    }

    /// Whether a work request was posted that can be started now. For its worker.
    pub fn has_posted(&self) -> bool {
        self.state() == QpState::Rts
            && self.send.try_lock().is_some_and(|mut send| send.wait.is_none() && !matches!(send.peek(), Ok(None)))
    }

    /// Its queue pair on the host's NIC.
    pub fn end(&self) -> Option<Arc<End>> {
        self.end.lock().clone()
    }

    /// Gives it one, for its present life.
    pub fn set_end(&self, end: Arc<End>) {
        *self.end.lock() = Some(end);
    }

    /// Gives it another in place of this one; false if it does not have this one.
    pub fn replace_end(&self, old: &Arc<End>, new: &Arc<End>) -> bool {
        let mut end = self.end.lock();
        let same = end.as_ref().is_some_and(|end| Arc::ptr_eq(end, old));
        if same {
            *end = Some(new.clone());
        }
        same
    }

    /// The NIC has nothing of it any more, and no memory of its guest through it, when this returns.
    pub fn leave_nic(&self) {
        let end = self.end.lock().take();
        if let Some(end) = end {
            end.destroy();
        }
    }

    /// Lets go of the rings; nothing is read or written any more. The caller has made sure that no worker serves it.
    pub fn close(&self) {
        self.set_state(QpState::Reset);
        self.leave_nic();
        self.send.lock().close();
        self.recv.lock().close();
    }
}
