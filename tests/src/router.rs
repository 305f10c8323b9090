//! The router under test, in this process.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use freeflow_backend::{EngineConfig, Gid as BackendGid, Host, NicConfig, NicId, NicStatus, Overlay, Place, Profile};

use crate::bed::eventually;
use crate::guest::verbs::ip_gid;
use crate::guest::{Gid, Guest, GuestConfig};

pub use freeflow_backend::Objects;

/// Makes names of virtual NICs unique in this process.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// What a test asks of its router.
#[derive(Debug, Clone)]
pub struct RouterSpec {
    /// Number of virtual NICs, all of one tenant.
    pub nics: usize,
    /// Limits of each.
    pub profile: Profile,
    /// Completion vectors of each.
    pub vectors: u16,
    /// Workers and how they poll. Each virtual NIC uses all workers.
    pub engine: EngineConfig,
}

impl RouterSpec {
    /// This many virtual NICs with the usual limits, two vectors each, on two workers.
    pub fn of(nics: usize) -> Self {
        let engine = EngineConfig { workers: 2, ..EngineConfig::default() };
        Self { nics, profile: Profile::default(), vectors: 2, engine }
    }
}

/// Everybody is here and may talk to everybody.
#[derive(Debug)]
struct OneTenant(HashMap<BackendGid, NicId>);

impl Overlay for OneTenant {
    fn locate(&self, _from: NicId, gid: BackendGid) -> Option<Place> {
        self.0.get(&gid).copied().map(Place::Local)
    }
}

/// A router. Its sockets are in a directory that goes with it.
#[derive(Debug)]
pub struct TestRouter {
    host: Host,
    id: u32,
    dir: tempfile::TempDir,
}

impl TestRouter {
    /// Starts one.
    pub fn start(spec: RouterSpec) -> Self {
        let nics = 0..spec.nics;
        let mut places = HashMap::new();
        for nic in nics.clone() {
            let id = NicId(nic as u32);
            places.insert(BackendGid::link_local(mac_of(nic)), id);
            places.extend(addresses_of(nic).map(|ip| (BackendGid::of(ip), id)));
        }
        let workers = spec.engine.workers as u16;
        let host = Host::start(spec.engine, Arc::new(OneTenant(places))).expect("the engine starts");
        let dir = tempfile::tempdir().expect("a directory");
        let router = Self { host, id: COUNT.fetch_add(1, Relaxed), dir };
        for nic in nics {
            let config = NicConfig {
                name: router.name_of(nic),
                tenant: "test".to_owned(),
                addresses: addresses_of(nic).to_vec(),
                mac: mac_of(nic),
                num_vectors: spec.vectors,
                num_workers: workers,
                profile: spec.profile.clone(),
            };
            let socket = router.socket_of(nic);
            router.host.add_nic(NicId(nic as u32), config, &socket).expect("a virtual NIC");
        }
        router
    }

    /// The socket of a virtual NIC.
    pub fn socket_of(&self, nic: usize) -> PathBuf {
        self.dir.path().join(format!("nic{nic}"))
    }

    /// The name of a virtual NIC, which is unique in this process.
    pub fn name_of(&self, nic: usize) -> String {
        format!("r{}n{nic}", self.id)
    }

    /// A guest on a virtual NIC, with its IPv4 address as GID 1 and its IPv6 address as GID 2.
    pub fn guest(&self, nic: usize, config: GuestConfig) -> Guest {
        let config = GuestConfig { gids: Self::gids_of(nic), ..config };
        Guest::connect(&self.socket_of(nic), config).expect("the guest comes up")
    }

    /// A guest on a virtual NIC whose present guest is disconnected first.
    pub fn guest_after_end(&self, nic: usize, present: &Guest) -> Guest {
        present.disconnect();
        eventually("end of the session", Duration::from_secs(10), || !self.is_connected(nic));
        self.guest(nic, GuestConfig::default())
    }

    /// The GIDs of the addresses that a virtual NIC was given.
    pub fn gids_of(nic: usize) -> Vec<Gid> {
        addresses_of(nic).map(ip_gid).to_vec()
    }

    /// A virtual NIC at the moment.
    pub fn status(&self, nic: usize) -> NicStatus {
        let id = NicId(nic as u32);
        self.host.nics().into_iter().find(|status| status.id == id).expect("a virtual NIC of this router")
    }

    /// What a virtual NIC has at the moment.
    pub fn objects(&self, nic: usize) -> Objects {
        self.status(nic).objects
    }

    /// Waits until a virtual NIC has exactly these objects: what is reported follows what is so by a moment.
    #[track_caller]
    pub fn wait_objects(&self, nic: usize, expected: Objects) {
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while self.objects(nic) != expected && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.objects(nic), expected);
    }

    /// Whether a guest is connected to a virtual NIC.
    pub fn is_connected(&self, nic: usize) -> bool {
        self.status(nic).connected
    }

    /// The device side itself.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Stops it, as SIGTERM does.
    pub fn stop(self) {
        self.host.stop();
    }
}

fn mac_of(nic: usize) -> [u8; 6] {
    [0x02, 0, 0, 0, 0, nic as u8 + 1]
}

fn addresses_of(nic: usize) -> [IpAddr; 2] {
    let last = nic as u8 + 1;
    [Ipv4Addr::new(10, 0, 0, last).into(), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last.into()).into()]
}
