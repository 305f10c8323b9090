//! What a guest's objects are on the host's NIC: a protection domain for each of its own, a region for each region of its memory, a queue pair
//! for each connected one.
//!
//! The NIC's room is shared by all guests and is not the guest's business: a region that does not fit is served without it, by copying.

use std::collections::HashMap;
use std::sync::Arc;

use virtio_rdma::ib::{Access, AtomicCap, QpType};

use super::{Control, Refusal};
use crate::mr::{Layout, Mr};
use crate::nic::PathChoice;
use crate::overlay::Gid;
use crate::qp::{NicQueue, Qp, SendQueue};
use crate::verbs::fabric::remote_atomic;
use crate::verbs::{Device, ProtectionDomain, Share};

/// Protection domains on the NIC, by those of the guest.
pub(super) type NicDomains = HashMap<u32, NicDomain>;

/// One of them, and its part of the virtual NIC's quota.
#[derive(Debug)]
pub(super) struct NicDomain {
    domain: Arc<dyn ProtectionDomain>,
    _share: Share,
}

/// What the NIC enforces of access flags; the rest is the router's.
const ON_NIC: Access =
    Access::LOCAL_WRITE.union(Access::REMOTE_WRITE).union(Access::REMOTE_READ).union(Access::RELAXED_ORDERING);

impl Control {
    /// The NIC, if this virtual NIC is to use it.
    fn device(&self) -> Option<&Arc<dyn Device>> {
        let fabric = self.engine.fabric()?;
        let is_for_nic = self.nic.config.path == PathChoice::Nic || self.engine.config().spans_hosts;
        is_for_nic.then(|| fabric.device())
    }

    /// A protection domain is made.
    pub(super) fn add_nic_domain(&mut self, pdn: u32) -> Result<(), Refusal> {
        let Some(device) = self.device() else { return Ok(()) };
        let share = self.nic.usage.take_domain(&self.nic.config.quota);
        match share.and_then(|share| Ok(NicDomain { domain: device.alloc_pd()?, _share: share })) {
            Ok(domain) => drop(self.domains.insert(pdn, domain)),
            Err(error) => self.without_nic("protection domain", &error)?,
        }
        Ok(())
    }

    /// A region that is complete, also on the NIC if that takes it.
    pub(super) fn with_nic(&self, mr: Mr, memory: &Arc<Layout>) -> Mr {
        let Some(domain) = self.domains.get(&mr.pdn) else { return mr };
        let atomics = self.device().map_or(AtomicCap::None, |device| device.limits().atomics);
        let access = mr.access & (ON_NIC | remote_atomic(atomics));
        let shares = self.nic.usage.take_region(&self.nic.config.quota, mr.length, memory.extents().len());
        match shares.and_then(|shares| Ok((domain.domain.register(memory, mr.iova, access)?, shares))) {
            Ok((region, shares)) => mr.on_nic(region, shares),
            Err(error) => {
                self.no_room("memory region", &error);
                mr
            }
        }
    }

    /// A queue pair is about to be connected, for the first time in its life, to one with this GID.
    pub(super) fn add_end(&self, qp: &Arc<Qp>, send: &mut SendQueue, peer: Gid) -> Result<(), Refusal> {
        let (Some(fabric), Some(domain)) = (self.engine.fabric(), self.domains.get(&qp.id.pdn)) else { return Ok(()) };
        let is_for_nic = match self.nic.config.path {
            PathChoice::Nic => matches!(qp.id.kind, QpType::Rc | QpType::Uc),
            PathChoice::Auto => qp.id.kind == QpType::Rc && self.engine.find_host(self.nic.id, peer).is_some(),
        };
        if !is_for_nic {
            return Ok(());
        }
        let end = match fabric.add(&self.nic, qp, &domain.domain, send.entries()) {
            Ok(end) => end,
            Err(error) => return self.without_nic("queue pair", &error),
        };
        // Its worker may have to wait for completions of another queue from now on.
        self.engine.wake(end.worker());
        qp.set_end(end.clone());
        send.nic = Some(Box::new(NicQueue::new(end, &self.nic.grants)));
        Ok(())
    }

    /// The NIC does not do it: so it is done without, unless the virtual NIC is to use that NIC and nothing else.
    fn without_nic(&self, what: &str, error: &dyn std::error::Error) -> Result<(), Refusal> {
        let refusal = self.no_room(what, error);
        if self.nic.config.path == PathChoice::Nic { Err(refusal) } else { Ok(()) }
    }

    fn no_room(&self, what: &str, error: &dyn std::error::Error) -> Refusal {
        self.nic.warn(format_args!("no {what} on the host's NIC: {error}"));
        Refusal::Quota("the host's NIC")
    }
}
