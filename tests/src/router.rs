//! The router under test.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use crate::guest::verbs::ip_gid;
use crate::guest::{Gid, Guest, GuestConfig};

/// What a test asks of its router.
#[derive(Debug, Clone)]
pub struct RouterSpec {
    /// Number of virtual NICs, all of one tenant.
    pub nics: usize,
}

impl RouterSpec {
    /// This many virtual NICs with the usual limits.
    pub fn of(nics: usize) -> Self {
        Self { nics }
    }
}

/// Objects that a virtual NIC has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Objects {
    /// Protection domains.
    pub pds: u64,
    /// Memory regions.
    pub mrs: u64,
    /// Completion queues.
    pub cqs: u64,
    /// Queue pairs.
    pub qps: u64,
    /// Entries of the GID table.
    pub gids: u64,
}

/// A router in this process. Its sockets are in a directory that goes with it.
#[derive(Debug)]
pub struct TestRouter {
    dir: tempfile::TempDir,
}

impl TestRouter {
    /// Starts one.
    pub fn start(_spec: RouterSpec) -> Self {
        Self { dir: tempfile::tempdir().expect("a directory") }
    }

    /// The socket of a virtual NIC.
    pub fn socket_of(&self, nic: usize) -> PathBuf {
        self.dir.path().join(format!("nic{nic}"))
    }

    /// A guest on a virtual NIC, with its IPv4 address as GID 1 and its IPv6 address as GID 2.
    pub fn guest(&self, nic: usize, config: GuestConfig) -> Guest {
        let config = GuestConfig { gids: Self::gids_of(nic), ..config };
        Guest::connect(&self.socket_of(nic), config).expect("the guest comes up")
    }

    /// A guest on a virtual NIC whose present guest is disconnected first.
    pub fn guest_after_end(&self, nic: usize, present: &Guest) -> Guest {
        present.disconnect();
        let gone = || !self.is_connected(nic);
        crate::bed::eventually("end of the session", std::time::Duration::from_secs(10), gone);
        self.guest(nic, GuestConfig::default())
    }

    /// The GIDs of the addresses that a virtual NIC was given.
    pub fn gids_of(nic: usize) -> Vec<Gid> {
        let last = nic as u8 + 1;
        let (v4, v6) = (Ipv4Addr::new(10, 0, 0, last), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last.into()));
        vec![ip_gid(v4.into()), ip_gid(v6.into())]
    }

    /// What a virtual NIC has at the moment.
    pub fn objects(&self, _nic: usize) -> Objects {
        Objects::default()
    }

    /// Whether a guest is connected to a virtual NIC.
    pub fn is_connected(&self, _nic: usize) -> bool {
        false
    }

    /// Stops it, as SIGTERM does.
    pub fn stop(self) {}
}
