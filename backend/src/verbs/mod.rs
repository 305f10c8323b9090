//! The host's RDMA NIC: what the `verbs` path asks of one, and what gives it.
//!
//! * [`device`]: the layer: devices, protection domains, memory regions, completion queues, queue pairs. Work requests are posted and
//!   completions polled in batches. Nothing above it knows which NIC is behind.
//! * [`choice`]: which NIC is asked for.
//! * [`fabric`]: the NIC as workers share it; [`end`]: a guest's queue pair on it; [`grant`]: what a guest's key stands for there;
//!   [`quota`]: how much a virtual NIC may have of it; [`pair`]: what another host has said of a queue pair that is connected to one of its.
//! * `host`: a NIC of this host, by way of libibverbs; with the cargo feature `rdma`.
//! * [`fake`]: a NIC in software for tests, which does what a real one may do and hardly ever does.
//!
//! What becomes of guests' work requests is not here but in the engine.

pub mod choice;
pub mod device;
pub mod end;
pub mod fabric;
pub mod fake;
pub mod grant;
#[cfg(feature = "rdma")]
pub mod host;
pub mod pair;
pub mod quota;

pub use choice::DeviceChoice;
pub use device::{
    Access, Capacity, CompletionQueue, Connection, Device, DeviceError, Endpoint, Limits, MemoryRegion, PostError,
    PostedOp, ProtectionDomain, QueuePair, QueuePairSpec, RecvRequest, SendList, SendRequest, Sending, Trouble, Wc,
};
pub use end::{End, PostedRecv, Tag};
pub use fabric::{ConnectError, Fabric, Member, Target, Wish};
pub use grant::{Grant, GrantBudget, GrantCache, KeySide, Revocations, Terms, Use};
pub use pair::Pair;
pub use quota::{NicQuota, NicUsage, Share};
