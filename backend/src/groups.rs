//! The multicast groups of one tenant (IBA 10.5): which QPs take datagrams to a group.
//!
//! Every virtual NIC has the table of its tenant and no other: nothing in here can reach further. How many QPs a virtual NIC may
//! attach is the business of its control queue.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};

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
}

/// All QPs of a group at one moment. Immutable: workers go through it at leisure.
pub type Members = Arc<[Member]>;

/// The groups of a tenant.
#[derive(Debug, Default)]
pub struct Groups {
    by_gid: RwLock<HashMap<Gid, Members>>,
}

impl Groups {
    /// Who is in a group; `None` for nobody.
    pub fn members(&self, group: Gid) -> Option<Members> {
        self.by_gid.read().get(&group).cloned()
    }

    /// Adds a QP that is not in the group.
    pub fn attach(&self, group: Gid, member: Member) {
        let mut groups = self.by_gid.write();
        let before = groups.get(&group).map_or(&[][..], |members| &**members);
        let members = before.iter().cloned().chain([member]).collect();
        groups.insert(group, members);
    }

    /// Removes a QP of a virtual NIC, or all of them. A worker may still have it among the members of a message that is under way.
    pub fn detach(&self, group: Gid, nic: NicId, qpn: Option<u32>) {
        let mut groups = self.by_gid.write();
        let leaves = |m: &&Member| m.nic.id == nic && qpn.is_none_or(|n| n == m.qp.id.qpn);
        let Some(before) = groups.get(&group) else { return };
        let members: Members = before.iter().filter(|m| !leaves(m)).cloned().collect();
        if members.is_empty() {
            groups.remove(&group);
        } else {
            groups.insert(group, members);
        }
    }
}

/// The tables of all tenants that have a virtual NIC.
#[derive(Debug, Default)]
pub struct Tenants {
    by_name: Mutex<HashMap<String, Weak<Groups>>>,
}

impl Tenants {
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
