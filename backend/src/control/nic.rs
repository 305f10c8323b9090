//! What a guest's objects are on the host's NIC: a protection domain for each of its own, a region for each region of its memory, a queue pair
//! for each connected one.
//!
//! The NIC's room is shared by all guests and is not the guest's business: a region that does not fit is served without it, by copying.

use std::collections::HashMap;
use std::sync::Arc;

use virtio_rdma::ib::{Access, AtomicCap, QpState, QpType};

use super::{Control, Refusal};
use crate::mr::{Layout, Mr};
use crate::nic::PathChoice;
use crate::qp::{NicQueue, Qp, SendQueue};
use crate::verbs::fabric::remote_atomic;
use crate::verbs::{Device, ProtectionDomain};

/// Protection domains on the NIC, by those of the guest.
pub(super) type NicDomains = HashMap<u32, Arc<dyn ProtectionDomain>>;

/// What the NIC enforces of access flags; the rest is the router's.
const ON_NIC: Access =
    Access::LOCAL_WRITE.union(Access::REMOTE_WRITE).union(Access::REMOTE_READ).union(Access::RELAXED_ORDERING);

impl Control {
    /// The NIC, if this virtual NIC is to use it.
    fn device(&self) -> Option<&Arc<dyn Device>> {
        let fabric = self.engine.fabric()?;
        (self.nic.config.path == PathChoice::Nic).then(|| fabric.device())
    }

    /// A protection domain is made.
    pub(super) fn add_nic_domain(&mut self, pdn: u32) -> Result<(), Refusal> {
        let Some(device) = self.device() else { return Ok(()) };
        let domain = device.alloc_pd().map_err(|error| self.no_room("protection domain", &error))?;
        self.domains.insert(pdn, domain);
        Ok(())
    }

    /// A region that is complete, also on the NIC if that takes it.
    pub(super) fn with_nic(&self, mr: Mr, memory: &Arc<Layout>) -> Mr {
        let Some(domain) = self.domains.get(&mr.pdn) else { return mr };
        let atomics = self.device().map_or(AtomicCap::None, |device| device.limits().atomics);
        let access = mr.access & (ON_NIC | remote_atomic(atomics));
        let share = self.nic.usage.take_bytes(&self.nic.config.quota, mr.length);
        match share.and_then(|share| Ok((domain.register(memory, mr.iova, access)?, share))) {
            Ok((region, share)) => mr.on_nic(region, share),
            Err(error) => {
                self.no_room("memory region", &error);
                mr
            }
        }
    }

    /// A queue pair is about to be connected.
    pub(super) fn add_end(&self, qp: &Arc<Qp>, send: &mut SendQueue, to: QpState) -> Result<(), Refusal> {
        let connects = to == QpState::Rtr && matches!(qp.id.kind, QpType::Rc | QpType::Uc);
        let (Some(fabric), Some(domain)) = (self.engine.fabric(), self.domains.get(&qp.id.pdn)) else { return Ok(()) };
        if !connects || send.nic.is_some() {
            return Ok(());
        }
        let end = fabric.add(&self.nic, qp, domain, send.entries());
        let end = end.map_err(|error| self.no_room("queue pair", &error))?;
        // Its worker may have to wait for completions of another queue from now on.
        self.engine.wake(end.worker());
        qp.set_end(end.clone());
        send.nic = Some(Box::new(NicQueue::new(end, &self.nic.grants)));
        Ok(())
    }

    fn no_room(&self, what: &str, error: &dyn std::error::Error) -> Refusal {
        self.nic.warn(format_args!("no {what} on the host's NIC: {error}"));
        Refusal::Quota("the host's NIC")
    }
}
