//! Multicast groups: QPs join and leave, within quotas.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_rdma::ctrl::Mcast;
use virtio_rdma::ib::QpType;

use super::{Answer, Control, Refusal, nothing};
use crate::groups::Member;
use crate::overlay::Gid;
use crate::qp::Qp;

/// The QPs of one virtual NIC in each group that it is in.
#[derive(Debug, Default)]
pub struct Memberships(HashMap<Gid, HashSet<u32>>);

impl Control {
    pub(super) fn attach_mcast(&mut self, args: &Mcast) -> Answer {
        let (group, qp) = self.mcast_args(args)?;
        let profile = &self.nic.config.profile;
        let groups = self.memberships.0.len();
        match self.memberships.0.get(&group) {
            // Once more changes nothing (so does rxe).
            Some(qps) if qps.contains(&qp.id.qpn) => return Ok(nothing()),
            Some(qps) if qps.len() >= profile.max_mcast_qp_attach as usize => {
                return Err(Refusal::Quota("queue pairs in a multicast group"));
            }
            None if groups >= profile.max_mcast_grp as usize => return Err(Refusal::Quota("multicast groups")),
            _ => {}
        }
        self.memberships.0.entry(group).or_default().insert(qp.id.qpn);
        qp.groups.fetch_add(1, Ordering::Relaxed);
        self.nic.groups.attach(group, Member::new(self.nic.clone(), qp));
        Ok(nothing())
    }

    pub(super) fn detach_mcast(&mut self, args: &Mcast) -> Answer {
        let (group, qp) = self.mcast_args(args)?;
        let qps = self.memberships.0.get_mut(&group).ok_or(Refusal::NotFound("multicast group"))?;
        if !qps.remove(&qp.id.qpn) {
            return Err(Refusal::NotFound("queue pair in the multicast group"));
        }
        if qps.is_empty() {
            self.memberships.0.remove(&group);
        }
        qp.groups.fetch_sub(1, Ordering::Relaxed);
        self.nic.groups.detach(group, self.nic.id, Some(qp.id.qpn));
        // What is on its way to it has arrived when this is answered.
        self.engine.quiesce().wait();
        Ok(nothing())
    }

    fn mcast_args(&self, args: &Mcast) -> Result<(Gid, Arc<Qp>), Refusal> {
        if args.reserved.get() != 0 {
            return Err(Refusal::Reserved);
        }
        let group = Gid(args.mgid);
        if !group.is_multicast() {
            return Err(Refusal::Value("multicast GID"));
        }
        let qp = self.qp(args.qpn.get())?;
        if qp.id.kind != QpType::Ud {
            return Err(Refusal::Value("type of a queue pair in a multicast group"));
        }
        Ok((group, qp))
    }

    /// All QPs leave all groups.
    pub(super) fn leave_groups(&mut self) {
        for group in std::mem::take(&mut self.memberships).0.into_keys() {
            self.nic.groups.detach(group, self.nic.id, None);
        }
    }
}
