//! The router under test, in this process.

use std::any::Any;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use freeflow_backend::Mac;
use freeflow_backend::verbs::fake::{FakeNic, Script};
use freeflow_backend::verbs::host::HostNic;
use freeflow_backend::verbs::{Device, DeviceChoice};
use freeflow_backend::{NicQuota, NicStatus, PathChoice, Profile, Rates};
use freeflow_router::config::{Config, EngineSettings, NicSettings};

use crate::bed::eventually;
use crate::guest::verbs::ip_gid;
use crate::guest::{Gid, Guest, GuestConfig};
use crate::mesh::{Mesh, Network};

pub use freeflow_backend::Objects;
pub use freeflow_router::Router;

/// Makes names of virtual NICs unique in this process.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// What a test asks of its router.
#[derive(Debug, Clone)]
pub struct RouterSpec {
    /// Number of virtual NICs.
    pub nics: usize,
    /// Tenants of the virtual NICs; those beyond the list are of the tenant `test`.
    pub tenants: Vec<String>,
    /// Limits of each.
    pub limits: Profile,
    /// Completion vectors of each.
    pub vectors: u16,
    /// Workers and how they poll.
    pub engine: EngineSettings,
    /// Workers that each virtual NIC uses; all if not given.
    pub nic_workers: Option<u16>,
    /// How fast each virtual NIC and its QPs may be.
    pub rates: Rates,
    /// The host's NIC, which virtual NICs are to use then.
    pub device: Option<Arc<dyn Device>>,
    /// So many of the last ones do without it all the same.
    pub off_nic: usize,
    /// How much of it each may have.
    pub quota: NicQuota,
    /// Where they are. A host's NIC is for those of one host.
    pub hosts: Hosts,
}

impl RouterSpec {
    /// This many virtual NICs with the usual limits, two vectors each, on two workers.
    pub fn of(nics: usize) -> Self {
        let engine = EngineSettings { workers: 2, ..EngineSettings::default() };
        Self {
            nics,
            tenants: Vec::new(),
            limits: Profile::default(),
            vectors: 2,
            engine,
            nic_workers: None,
            rates: Rates::default(),
            device: device_of_tests(),
            off_nic: 0,
            quota: NicQuota::default(),
            hosts: Hosts::of_tests(),
        }
    }

    /// The same, over this NIC of the host.
    #[must_use]
    pub fn over(self, device: Arc<dyn Device>) -> Self {
        Self { device: Some(device), hosts: Hosts::One, ..self }
    }

    /// The same, each virtual NIC on a host of its own, whose NICs are on a network with this one.
    #[must_use]
    pub fn between(self, nic: Arc<FakeNic>) -> Self {
        Self { hosts: Hosts::Each(Network::Good), ..self.over(nic) }
    }

    /// The NIC of a host. Those of several hosts are on the same network.
    fn device_of(&self, host: usize) -> Option<Arc<dyn Device>> {
        let device = self.device.as_ref()?;
        let any: &dyn Any = device.as_ref();
        Some(match any.downcast_ref::<FakeNic>() {
            _ if host == 0 => device.clone(),
            Some(fake) => Arc::new(fake.beside()),
            None => Arc::new(HostNic::open(&DeviceChoice::named(device.name())).expect("the NIC once more")),
        })
    }

    /// The router's configuration, with sockets in a directory.
    pub fn config(&self, dir: &Path, name: impl Fn(usize) -> String) -> Config {
        let nic = |nic: usize| NicSettings {
            name: name(nic),
            tenant: self.tenants.get(nic).cloned().unwrap_or_else(|| "test".to_owned()),
            ip: addresses_of(nic).to_vec(),
            mac: Some(Mac([0x02, 0, 0, 0, 0, nic as u8 + 1])),
            socket: socket_in(dir, nic),
            vectors: self.vectors,
            workers: self.nic_workers.unwrap_or(self.engine.workers as u16),
            limits: self.limits.clone(),
            rate: self.rates.clone(),
            quota: self.quota,
            path: if self.device.is_some() && nic + self.off_nic < self.nics {
                PathChoice::Nic
            } else {
                PathChoice::Auto
            },
        };
        Config { engine: self.engine.clone(), nic: (0..self.nics).map(nic).collect(), ..Config::default() }
    }
}

/// What the environment says: `FREEFLOW_TEST_PATH=verbs` has tests go over a fake NIC that executes at once, `=shuffled` over one that does so
/// late and in another order each time; `=tcp`, `=cut`, `=bad` and `=fabric` [between hosts](is_spread), the last over NICs that are fake, with `=fabric:rxe0` over this one of the machine, opened once for each host; `=nic` over one that this machine has, `=nic:rxe0` over this one.
pub fn device_of_tests() -> Option<Arc<dyn Device>> {
    let script = match std::env::var("FREEFLOW_TEST_PATH").as_deref() {
        Ok("verbs" | "fabric") => Script::default(),
        Ok("shuffled") => Script::shuffled(u64::from(COUNT.load(Relaxed)) ^ u64::from(std::process::id()) << 32),
        Ok(other) if other.starts_with("nic") || other.starts_with("fabric:") => return Some(device_of_host(other)),
        Ok("local" | "tcp" | "cut" | "bad") => return None,
        Ok(other) => {
            panic!("FREEFLOW_TEST_PATH is {other:?}, not local, tcp, cut, bad, fabric, verbs, shuffled or nic")
        }
        _ => return None,
    };
    Some(Arc::new(FakeNic::new(script)))
}

fn device_of_host(path: &str) -> Arc<dyn Device> {
    let choice = path.split_once(':').map_or(Ok(DeviceChoice::Auto), |(_, name)| name.parse());
    Arc::new(HostNic::open(&choice.expect("auto or a name")).expect("a NIC of this machine"))
}

/// Whether tests go over the fake NIC that works late. It executes a work request or two in a step, whoever's that is: what there is to share then
/// is the NIC's time, which is not ours to give, and how long something takes differs each time.
pub fn nic_is_late() -> bool {
    std::env::var("FREEFLOW_TEST_PATH").is_ok_and(|path| path == "shuffled")
}

/// Whether each virtual NIC of a test is on a host of its own: `FREEFLOW_TEST_PATH=tcp`, `=cut` and `=bad` for what is [between
/// them](network_of_tests), `=fabric` where hosts have NICs on the same network.
pub fn is_spread() -> bool {
    std::env::var("FREEFLOW_TEST_PATH")
        .is_ok_and(|path| ["tcp", "cut", "bad", "fabric"].contains(&path.as_str()) || path.starts_with("fabric:"))
}

/// What is between hosts then.
pub fn network_of_tests() -> Network {
    match std::env::var("FREEFLOW_TEST_PATH").as_deref() {
        Ok("cut") => Network::Cut,
        Ok("bad") => Network::Bad,
        _ => Network::Good,
    }
}

/// Where virtual NICs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hosts {
    /// All on one host.
    One,
    /// Each on one of its own, with this between them.
    Each(Network),
}

impl Hosts {
    /// What the environment says.
    fn of_tests() -> Self {
        if is_spread() { Self::Each(network_of_tests()) } else { Self::One }
    }
}

/// A router, or one for each virtual NIC. Its sockets are in a directory that goes with it.
#[derive(Debug)]
pub struct TestRouter {
    mesh: Option<Mesh>,
    routers: Vec<Arc<Router>>,
    id: u32,
    dir: tempfile::TempDir,
}

impl TestRouter {
    /// Starts one.
    pub fn start(spec: &RouterSpec) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let id = COUNT.fetch_add(1, Relaxed);
        let config = spec.config(dir.path(), |nic| format!("r{id}n{nic}"));
        let hosts = if spec.hosts == Hosts::One { vec![config] } else { spread(config) };
        let start = |(host, config)| Router::start_on(config, spec.device_of(host)).expect("the router starts");
        let routers: Vec<_> = hosts.iter().enumerate().map(start).map(Arc::new).collect();
        let mesh = match spec.hosts {
            Hosts::Each(network) if routers.len() > 1 => Some(Mesh::join(routers.clone(), network)),
            _ => None,
        };
        Self { mesh, routers, id, dir }
    }

    /// The socket of a virtual NIC.
    pub fn socket_of(&self, nic: usize) -> PathBuf {
        socket_in(self.dir.path(), nic)
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
        let mut all = self.routers.iter().flat_map(|router| router.nics());
        all.nth(nic).expect("a virtual NIC of this number")
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

    /// The router itself; of several, that of the first virtual NIC.
    pub fn router(&self) -> &Router {
        &self.routers[0]
    }

    /// What is between its hosts.
    ///
    /// # Panics
    /// If there is just one.
    pub fn mesh(&self) -> &Mesh {
        self.mesh.as_ref().expect("several hosts")
    }

    /// Stops it, as SIGTERM does.
    pub fn stop(self) {
        self.routers.iter().for_each(|router| router.stop());
    }
}

/// The same virtual NICs, each on a host of its own.
fn spread(config: Config) -> Vec<Config> {
    let Config { nic, engine, .. } = config;
    nic.into_iter().map(|nic| Config { engine: engine.clone(), nic: vec![nic], ..Config::default() }).collect()
}

/// The socket of a virtual NIC in a directory.
pub fn socket_in(dir: &Path, nic: usize) -> PathBuf {
    dir.join(format!("nic{nic}"))
}

fn addresses_of(nic: usize) -> [IpAddr; 2] {
    let last = nic as u8 + 1;
    [Ipv4Addr::new(10, 0, 0, last).into(), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last.into()).into()]
}
