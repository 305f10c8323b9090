//! The multicast groups of one tenant (IBA 10.5): which QPs take datagrams to a group.
//!
//! Every virtual NIC has the table of its tenant and no other: nothing in here can reach further. How many QPs a virtual NIC may
//! attach is the business of its control queue.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::nic::Nic;
use crate::overlay::{Gid, NicId};
use crate::qp::Qp;

/// A QP in a group.
#[derive(Debug, Clone)]
pub struct Member {
    /// Its virtual NIC.
    pub nic: Arc<Nic>,
    /// The QP.
    pub qp: Arc<Qp>,
    /// It is a member no more, whoever still goes through a list that it is in.
    left: Arc<AtomicBool>,
}

impl Member {
    /// To be attached.
    pub fn new(nic: Arc<Nic>, qp: Arc<Qp>) -> Self {
        Self { nic, qp, left: Arc::default() }
    }

    /// Whether it was detached.
    pub fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }
}

/// All QPs of a group at one moment. Immutable: workers go through it at leisure.
pub type Members = Arc<[Member]>;

/// The groups of a tenant.
#[derive(Debug, Default)]
pub struct Groups {
    by_gid: ArcSwap<HashMap<Gid, Members>>,
    /// Held by who makes a new list of members; workers never wait for it.
    change: Mutex<()>,
}

impl Groups {
    /// Who is in a group; `None` for nobody.
    pub fn members(&self, group: Gid) -> Option<Members> {
        self.by_gid.load().get(&group).cloned()
    }

    /// Adds a QP that is not in the group.
    pub fn attach(&self, group: Gid, member: Member) {
        let _alone = self.change.lock();
        let before = self.members(group);
        let known = before.as_deref().unwrap_or_default();
        self.publish(group, known.iter().cloned().chain([member]).collect());
    }

    /// Removes a QP of a virtual NIC, or all of them. A worker may still be about to give it a message, until
    /// [`Quiesce::wait`](crate::engine::quiesce::Quiesce::wait) returns.
    pub fn detach(&self, group: Gid, nic: NicId, qpn: Option<u32>) {
        let _alone = self.change.lock();
        let leaves = |m: &&Member| m.nic.id == nic && qpn.is_none_or(|n| n == m.qp.id.qpn);
        let Some(before) = self.members(group) else { return };
        before.iter().filter(leaves).for_each(|m| m.left.store(true, Ordering::Release));
        self.publish(group, before.iter().filter(|m| !leaves(m)).cloned().collect());
    }

    /// Makes these the members of a group.
    fn publish(&self, group: Gid, members: Members) {
        let mut groups = HashMap::clone(&self.by_gid.load());
        if members.is_empty() {
            groups.remove(&group);
        } else {
            groups.insert(group, members);
        }
        self.by_gid.store(Arc::new(groups));
    }
}

/// The tables of all tenants that have a virtual NIC.
#[derive(Debug, Default)]
pub struct Tenants {
    by_name: Mutex<HashMap<String, Weak<Groups>>>,
}

impl Tenants {
    /// The table of a tenant that has a virtual NIC here.
    pub fn known(&self, tenant: &str) -> Option<Arc<Groups>> {
        self.by_name.lock().get(tenant).and_then(Weak::upgrade)
    }

    /// The table of a tenant, for a virtual NIC of it.
    pub fn groups(&self, tenant: &str) -> Arc<Groups> {
        let mut tenants = self.by_name.lock();
        if let Some(groups) = tenants.get(tenant).and_then(Weak::upgrade) {
            return groups;
        }
        tenants.retain(|_, groups| groups.strong_count() > 0);
        let groups = Arc::default();
        tenants.insert(tenant.to_owned(), Arc::downgrade(&groups));
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_nics_of_a_tenant_share_a_table_and_others_do_not() {
        let tenants = Tenants::default();
        let (red, blue) = (tenants.groups("red"), tenants.groups("blue"));
        assert!(Arc::ptr_eq(&red, &tenants.groups("red")));
        assert!(!Arc::ptr_eq(&red, &blue));
        drop(blue);
        drop(tenants.groups("green"));
        drop(tenants.groups("yellow"));
        assert_eq!(tenants.by_name.lock().len(), 2, "tables that nobody has any more are forgotten");
    }
}
