//! What a send queue remembers whose peer is on another host.

use std::sync::Arc;

use crossbeam_queue::SegQueue;
use freeflow_tcp::frame::FlowId;

use crate::overlay::Gid;
use crate::tcp::{PeerId, Peering};

/// A flow to another host (`docs/tcp.md`, section 1). Dropping it says that it is not needed any more, to the worker whose link it is on.
#[derive(Debug)]
pub struct RemoteFlow {
    /// The other host.
    pub peer: PeerId,
    /// Its name.
    pub host: Arc<str>,
    /// Which link to it.
    pub link: u16,
    /// The flow.
    pub flow: FlowId,
    /// The sender's GID that it was opened with.
    pub source: Gid,
    /// [`Nic::gid_epoch`](crate::nic::Nic::gid_epoch) when that was last looked for.
    pub gid_epoch: u64,
    /// A message of it has arrived: the QP has no other peer in this life.
    pub used: bool,
    /// Bytes of messages that are on their way.
    pub bytes: u64,
    /// Flows that are not needed any more.
    closed: Arc<SegQueue<FlowId>>,
}

impl RemoteFlow {
    /// A flow that was opened on a link whose worker looks there for those that were closed.
    pub fn new(peering: &Peering, link: u16, flow: FlowId, source: (Gid, u64), closed: Arc<SegQueue<FlowId>>) -> Self {
        let (peer, host) = (peering.peer, peering.name.clone());
        Self { peer, host, link, flow, source: source.0, gid_epoch: source.1, used: false, bytes: 0, closed }
    }

    /// Whether another message may be on its way besides the `posted` that are: more would only wait, out of reach of the virtual NIC's rate.
    pub fn has_room(&self, posted: u32) -> bool {
        posted < 2 || self.bytes < Self::MOST_BYTES
    }

    const MOST_BYTES: u64 = 512 << 10;

    /// Whether it is this flow, of the link whose worker looks there.
    pub fn is(&self, flow: FlowId, closed: &Arc<SegQueue<FlowId>>) -> bool {
        self.flow == flow && Arc::ptr_eq(&self.closed, closed)
    }
}

impl Drop for RemoteFlow {
    fn drop(&mut self) {
        self.closed.push(self.flow);
    }
}
