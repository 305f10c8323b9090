//! What a host RDMA NIC is to the engine, in the terms of the verbs (IBA 11): a thin layer, with a thing of its own only where the engine's
//! work would be in the way of the NIC's.
//!
//! Objects free themselves when dropped. The one who has a queue pair has its completion queues and protection domain, and the one who
//! has a memory region its memory, so order does not matter.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use virtio_rdma::ib::Access;
use virtio_rdma::ib::{AtomicCap, QpType, SendFlags, WcOpcode, WcStatus};

use crate::mem::AtomicOp;
use crate::mr::Layout;
use crate::overlay::Gid;
use crate::wqe::Sge;

/// Why the NIC does not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// It has no more of these, or they may not be as large.
    #[error("the NIC has no room for {0}")]
    Limit(&'static str),
    /// Objects of different devices, or attributes that make no sense.
    #[error("the NIC does not know {0}")]
    Invalid(&'static str),
    /// It was taken away.
    #[error("the NIC is gone")]
    Gone,
    /// One virtual NIC may not have more of them.
    #[error("the virtual NIC's quota of {0} on the host's NIC is used up")]
    Quota(&'static str),
    /// The operating system does not let us pin as much memory.
    #[error("{bytes} bytes more cannot be pinned: RLIMIT_MEMLOCK is {limit} (LimitMEMLOCK= of the unit, ulimit -l)")]
    Memlock {
        /// What was to be pinned.
        bytes: u64,
        /// The limit.
        limit: u64,
        /// What it says.
        source: std::io::Error,
    },
    /// What the operating system says.
    #[error("{what}")]
    System {
        /// What failed.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

impl DeviceError {
    /// Why memory could not be registered, under this limit of what may be pinned: an implementation may be told no more than that there is
    /// not enough.
    pub fn pinning(bytes: u64, limit: Option<u64>, source: std::io::Error) -> Self {
        match (source.raw_os_error(), limit) {
            (Some(libc::ENOMEM | libc::EAGAIN), Some(limit)) => Self::Memlock { bytes, limit, source },
            _ => Self::System { what: "memory cannot be registered", source },
        }
    }
}

/// How much a device can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Queue pairs.
    pub qps: u32,
    /// Work requests of each queue.
    pub wrs: u32,
    /// SGEs of a work request.
    pub sges: u32,
    /// Bytes of inline data of a work request.
    pub inline: u32,
    /// Completion queues.
    pub cqs: u32,
    /// Entries of each.
    pub cqes: u32,
    /// Memory regions.
    pub mrs: u32,
    /// READs under way from and to a queue pair.
    pub reads: u8,
    /// Code of the port's MTU.
    pub mtu: u8,
    /// With whom its atomics are atomic.
    pub atomics: AtomicCap,
}

/// Sizes of a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Sends posted at a time.
    pub sends: u32,
    /// Receives posted at a time.
    pub recvs: u32,
    /// SGEs of either.
    pub sges: u32,
    /// Bytes of inline data.
    pub inline: u32,
}

/// What a queue pair is made with. Both queues complete into the same completion queue.
#[derive(Debug)]
pub struct QueuePairSpec<'a> {
    /// Transport.
    pub kind: QpType,
    /// Its completion queue.
    pub cq: &'a Arc<dyn CompletionQueue>,
    /// Sizes.
    pub capacity: Capacity,
}

/// What one end tells the other before they connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// Number of the queue pair at its NIC.
    pub qpn: u32,
    /// GID of the port.
    pub gid: Gid,
    /// First PSN that it sends with.
    pub psn: u32,
}

/// What a queue pair is connected with: attributes of INIT to RTR (IBA 11.2.5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// The other end.
    pub peer: Endpoint,
    /// What peers may do.
    pub access: Access,
    /// Code of the path MTU.
    pub mtu: u8,
    /// READs that it answers at a time.
    pub answers: u8,
}

/// What a queue pair sends with: attributes of RTR to RTS (IBA 11.2.5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sending {
    /// First PSN.
    pub psn: u32,
    /// Code of the ACK timeout.
    pub timeout: u8,
    /// Retries.
    pub retry_cnt: u8,
    /// READs that it may have under way; zero if it may not.
    pub reads: u8,
}

/// A NIC, opened.
pub trait Device: fmt::Debug + Send + Sync + Any {
    /// Its name on this host.
    fn name(&self) -> &str;

    /// How much it can do.
    fn limits(&self) -> Limits;

    /// GID by which its port is reached.
    fn gid(&self) -> Gid;

    /// A new protection domain.
    ///
    /// # Errors
    /// When there is no room for one.
    fn alloc_pd(&self) -> Result<Arc<dyn ProtectionDomain>, DeviceError>;

    /// A new completion queue.
    ///
    /// # Errors
    /// When there is no room for one, or it may not be as long.
    fn create_cq(&self, entries: u32) -> Result<Arc<dyn CompletionQueue>, DeviceError>;

    /// What has gone wrong since the last call, other than completions say. Does not wait.
    fn take_trouble(&self, out: &mut Vec<Trouble>);

    /// Readable while there may be some.
    fn trouble_fd(&self) -> BorrowedFd<'_>;
}

/// What goes wrong without a completion (IBA 11.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The queue pair of this number is in error.
    QueuePair(u32),
    /// The completion queue overflowed, and all its queue pairs are in error.
    CompletionQueue,
    /// The port is up or down.
    Port {
        /// Up.
        up: bool,
    },
    /// The device is gone.
    Removed,
}

/// A protection domain.
pub trait ProtectionDomain: fmt::Debug + Send + Sync + Any {
    /// Registers guest memory: its first byte has the address `iova` in work requests.
    ///
    /// # Errors
    /// When there is no room, or the memory cannot be pinned.
    fn register(&self, memory: &Arc<Layout>, iova: u64, access: Access) -> Result<Arc<dyn MemoryRegion>, DeviceError>;

    /// A queue pair in INIT: receives can be posted.
    ///
    /// # Errors
    /// When there is no room for one, or it may not be as large.
    fn create_qp(&self, spec: &QueuePairSpec<'_>) -> Result<Box<dyn QueuePair>, DeviceError>;
}

/// A memory region. When it has been dropped, the NIC does not touch the memory any more.
pub trait MemoryRegion: fmt::Debug + Send + Sync {
    /// Its key for work requests of its own protection domain.
    fn lkey(&self) -> u32;
    /// Its key for peers.
    fn rkey(&self) -> u32;
}

/// A completion queue.
pub trait CompletionQueue: fmt::Debug + Send + Sync + Any {
    /// Appends completions that there are, at most so many.
    fn poll(&self, most: usize, out: &mut Vec<Wc>);

    /// Asks for one event: the next completion makes [`events_fd`](Self::events_fd) readable. One that came before this call may not: look again
    /// after it.
    ///
    /// # Errors
    /// When the NIC does not do it: then there is no event.
    fn arm(&self) -> Result<(), DeviceError>;

    /// Takes the events that have come, so that the descriptor is quiet. Does not wait.
    fn take_events(&self);

    /// Readable once an event has come.
    fn events_fd(&self) -> BorrowedFd<'_>;
}

/// A queue pair. When it has been dropped, the NIC does not touch memory on its behalf any more, and nothing of it completes.
pub trait QueuePair: fmt::Debug + Send + Sync {
    /// Its number.
    fn number(&self) -> u32;

    /// Takes it from INIT to RTR. May take its time.
    ///
    /// # Errors
    /// When the NIC does not take the attributes.
    fn connect(&self, connection: &Connection) -> Result<(), DeviceError>;

    /// Takes it from RTR to RTS: sends can be posted. May take its time.
    ///
    /// # Errors
    /// When the NIC does not take the attributes.
    fn start_sending(&self, sending: Sending) -> Result<(), DeviceError>;

    /// Takes it to ERR: what is posted is flushed.
    fn fail(&self);

    /// Posts sends, in order.
    ///
    /// # Errors
    /// How many were posted before one was refused.
    fn post_send(&self, list: &SendList) -> Result<(), PostError>;

    /// Posts a receive.
    ///
    /// # Errors
    /// When it is refused.
    fn post_recv(&self, request: &RecvRequest<'_>) -> Result<(), PostError>;
}

/// A work request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a work request was refused after {posted} were posted")]
pub struct PostError {
    /// Those before it were posted.
    pub posted: usize,
}

/// A completion (IBA 11.4.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wc {
    /// Of the work request.
    pub id: u64,
    /// How it ended.
    pub status: WcStatus,
    /// What it was; with an error this is not known.
    pub opcode: WcOpcode,
    /// Bytes received, or read.
    pub byte_len: u32,
    /// Immediate data, as they stand in memory.
    pub imm: Option<u32>,
}

/// Kinds of send work requests that the engine gives to a NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostedOp {
    /// SEND.
    Send,
    /// SEND with immediate data.
    SendImm(u32),
    /// RDMA WRITE.
    Write,
    /// RDMA WRITE with immediate data.
    WriteImm(u32),
    /// RDMA READ.
    Read,
    /// An atomic; only for a NIC whose atomics are so with those of processors, too.
    Atomic(AtomicOp),
}

impl PostedOp {
    /// Whether something comes back from the peer.
    #[inline]
    pub fn fetches(self) -> bool {
        matches!(self, Self::Read | Self::Atomic(_))
    }

    /// Whether it takes a receive.
    #[inline]
    pub fn takes_receive(self) -> bool {
        !matches!(self, Self::Write | Self::Read | Self::Atomic(_))
    }

    /// What its completion names.
    #[inline]
    pub fn opcode(self) -> WcOpcode {
        match self {
            Self::Send | Self::SendImm(_) => WcOpcode::Send,
            Self::Write | Self::WriteImm(_) => WcOpcode::RdmaWrite,
            Self::Read => WcOpcode::RdmaRead,
            Self::Atomic(AtomicOp::CompareSwap { .. }) => WcOpcode::CompSwap,
            Self::Atomic(AtomicOp::FetchAdd(_)) => WcOpcode::FetchAdd,
        }
    }
}

/// A send work request.
#[derive(Debug, Clone)]
pub struct SendRequest {
    /// Comes back in the completion.
    pub id: u64,
    /// What to do.
    pub op: PostedOp,
    /// Modifiers.
    pub flags: SendFlags,
    /// First byte at the peer, for WRITE and READ.
    pub remote_addr: u64,
    /// The NIC's key of the peer's region.
    pub rkey: u32,
    /// Its part of the list's SGEs, or of its inline bytes if the flags say so.
    payload: Range<usize>,
}

/// Send work requests to be posted together. Used again and again, so that none of them costs an allocation.
#[derive(Debug, Default)]
pub struct SendList {
    requests: Vec<SendRequest>,
    sges: Vec<Sge>,
    inline: Vec<u8>,
}

impl SendList {
    /// Forgets all.
    pub fn clear(&mut self) {
        self.requests.clear();
        self.sges.clear();
        self.inline.clear();
    }

    /// Appends a work request with its payload in memory.
    #[inline]
    pub fn push(&mut self, id: u64, op: PostedOp, flags: SendFlags, (remote_addr, rkey): (u64, u32)) {
        let at = self.sges.len();
        let flags = flags - SendFlags::INLINE;
        self.requests.push(SendRequest { id, op, flags, remote_addr, rkey, payload: at..at });
    }

    /// One more SGE of the last work request.
    #[inline]
    pub fn push_sge(&mut self, sge: Sge) {
        self.sges.push(sge);
        if let Some(last) = self.requests.last_mut() {
            last.payload.end = self.sges.len();
        }
    }

    /// The payload of the last work request is not in memory but these bytes.
    pub fn set_inline(&mut self, bytes: &[u8]) {
        let at = self.inline.len();
        self.inline.extend_from_slice(bytes);
        if let Some(last) = self.requests.last_mut() {
            last.flags |= SendFlags::INLINE;
            last.payload = at..self.inline.len();
        }
    }

    /// Has the last work request make a completion.
    pub fn signal_last(&mut self) {
        if let Some(last) = self.requests.last_mut() {
            last.flags |= SendFlags::SIGNALED;
        }
    }

    /// Keeps the first ones.
    pub fn truncate(&mut self, len: usize) {
        self.requests.truncate(len);
        let end_of = |inline| {
            let with = self.requests.iter().filter(|r| r.flags.contains(SendFlags::INLINE) == inline);
            with.map(|r| r.payload.end).max().unwrap_or(0)
        };
        let (sges, bytes) = (end_of(false), end_of(true));
        self.sges.truncate(sges);
        self.inline.truncate(bytes);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// The work requests.
    pub fn requests(&self) -> &[SendRequest] {
        &self.requests
    }

    /// SGEs of one of them.
    pub fn sges(&self, request: &SendRequest) -> &[Sge] {
        if request.flags.contains(SendFlags::INLINE) { &[] } else { &self.sges[request.payload.clone()] }
    }

    /// Inline bytes of one of them.
    pub fn inline(&self, request: &SendRequest) -> &[u8] {
        if request.flags.contains(SendFlags::INLINE) { &self.inline[request.payload.clone()] } else { &[] }
    }
}

/// A receive work request.
#[derive(Debug, Clone, Copy)]
pub struct RecvRequest<'a> {
    /// Comes back in the completion.
    pub id: u64,
    /// Where to, with the NIC's keys.
    pub sges: &'a [Sge],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_pinned_says_under_which_limit() {
        let no_memory = || std::io::Error::from_raw_os_error(libc::ENOMEM);
        let text = DeviceError::pinning(4096, Some(65_536), no_memory()).to_string();
        assert!(text.contains("4096 bytes") && text.contains("RLIMIT_MEMLOCK is 65536"), "{text}");
        let unlimited = DeviceError::pinning(4096, None, no_memory());
        assert!(matches!(unlimited, DeviceError::System { .. }));
        let other = DeviceError::pinning(4096, Some(65_536), std::io::Error::from_raw_os_error(libc::EFAULT));
        assert!(matches!(other, DeviceError::System { .. }));
    }

    #[test]
    fn payloads_of_a_list_are_kept_apart() {
        let mut list = SendList::default();
        let sge = |addr| Sge { addr, length: 1, lkey: 2 };
        list.push(1, PostedOp::Send, SendFlags::INLINE, (0, 0));
        list.push_sge(sge(10));
        list.push_sge(sge(11));
        list.push(2, PostedOp::Write, SendFlags::empty(), (5, 6));
        list.set_inline(b"abc");
        list.push(3, PostedOp::Read, SendFlags::empty(), (7, 8));
        list.push_sge(sge(12));
        list.signal_last();
        let [one, two, three] = list.requests() else { panic!("three requests") };
        assert_eq!((list.sges(one), list.inline(one)), (&[sge(10), sge(11)][..], &[][..]));
        assert_eq!((list.sges(two), list.inline(two)), (&[][..], &b"abc"[..]));
        assert_eq!((list.sges(three), three.flags), (&[sge(12)][..], SendFlags::SIGNALED));
        list.truncate(2);
        list.push(4, PostedOp::Read, SendFlags::empty(), (7, 8));
        list.push_sge(sge(13));
        assert_eq!(list.requests().iter().flat_map(|r| list.sges(r)).map(|s| s.addr).collect::<Vec<_>>(), [10, 11, 13]);
        list.clear();
        assert!(list.is_empty());
    }
}
