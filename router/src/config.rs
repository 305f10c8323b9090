//! The router's configuration: a TOML file, checked as a whole before anything starts.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use freeflow_backend::verbs::DeviceChoice;
use freeflow_backend::{EngineConfig, Mac, NicConfig, NicQuota, PathChoice, Profile, Rates};
use serde::{Deserialize, Serialize};

use crate::cluster::ClusterSettings;
use crate::cluster::session::MAX_TENANT_NAME;
use crate::sandbox::Security;

/// Default of [`Config::control`].
pub const DEFAULT_CONTROL: &str = "/run/freeflow/control.sock";
/// Default of [`Config::state`].
pub const DEFAULT_STATE: &str = "/var/lib/freeflow/nics.toml";

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what we expect.
    #[error("{path} is not a valid configuration")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// Two virtual NICs want the same.
    #[error("virtual NICs {first:?} and {second:?} both have {what}")]
    Duplicate {
        /// One.
        first: String,
        /// The other.
        second: String,
        /// What they share.
        what: String,
    },
    /// A virtual NIC is not possible.
    #[error("virtual NIC {name:?}: {why}")]
    Nic {
        /// Its name.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// The router's own settings are not possible.
    #[error("{0}")]
    Setting(&'static str),
}

/// A router's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Unix socket for the `freeflow` command.
    pub control: Option<PathBuf>,
    /// Address and port at which Prometheus finds figures; nowhere if left out.
    pub metrics: Option<SocketAddr>,
    /// File that keeps the virtual NICs of `freeflow nic add` for the next start.
    pub state: Option<PathBuf>,
    /// The host's RDMA NIC, for virtual NICs with `path = "nic"`: `auto`, or NAME or NAME:PORT. If left out, it is opened only if there is such a
    /// virtual NIC at the start, as with `auto`.
    pub rdma_device: Option<DeviceChoice>,
    /// What the network is called that this NIC is on; `default` if left out. Hosts whose NICs are on the same reach each other's.
    pub rdma_fabric: Option<String>,
    /// Data-path workers.
    pub engine: EngineSettings,
    /// What the daemon gives up.
    pub security: Security,
    /// Other hosts; without it there are none.
    pub cluster: Option<ClusterSettings>,
    /// Virtual NICs.
    pub nic: Vec<NicSettings>,
}

/// Settings of the data path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct EngineSettings {
    /// Worker threads.
    pub workers: usize,
    /// Microseconds that a worker polls after the last work before it sleeps.
    pub poll_us: u64,
    /// Milliseconds that a datagram waits for a receive.
    pub datagram_patience_ms: u64,
    /// Cores that workers are pinned to, in order; others run anywhere.
    pub cores: Vec<usize>,
}

impl Default for EngineSettings {
    fn default() -> Self {
        let engine = EngineConfig::default();
        Self {
            workers: engine.workers,
            poll_us: engine.poll.as_micros() as u64,
            datagram_patience_ms: engine.datagram_patience.as_millis() as u64,
            cores: engine.cores,
        }
    }
}

impl Config {
    /// For the engine.
    pub fn to_engine(&self) -> EngineConfig {
        let engine = &self.engine;
        EngineConfig {
            workers: engine.workers,
            poll: Duration::from_micros(engine.poll_us),
            datagram_patience: Duration::from_millis(engine.datagram_patience_ms),
            cores: engine.cores.clone(),
            rdma_fabric: self.rdma_fabric.clone().unwrap_or_else(|| EngineConfig::default().rdma_fabric),
            spans_hosts: self.cluster.is_some(),
            ..EngineConfig::default()
        }
    }
}

/// One virtual NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NicSettings {
    /// Name, for people and commands.
    pub name: String,
    /// Tenant: NICs of different tenants do not see each other.
    #[serde(default = "default_tenant")]
    pub tenant: String,
    /// IPv4 and IPv6 addresses that its guest may use.
    pub ip: Vec<IpAddr>,
    /// MAC of the guest's ordinary interface that it rides beside; made from the first address if left out.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// Unix socket for the VMM.
    pub socket: PathBuf,
    /// Completion vectors.
    #[serde(default = "one")]
    pub vectors: u16,
    /// Data-path workers that serve it.
    #[serde(default = "one")]
    pub workers: u16,
    /// How bytes get to peers: `auto`, or `nic` for the host's RDMA NIC.
    #[serde(default)]
    pub path: PathChoice,
    /// How fast it and its QPs may be.
    #[serde(default)]
    pub rate: Rates,
    /// How much of the host's RDMA NIC it may have.
    #[serde(default)]
    pub quota: NicQuota,
    /// Limits, which are quotas at the same time.
    #[serde(default)]
    pub limits: Profile,
}

pub(crate) fn default_tenant() -> String {
    "default".to_owned()
}

fn one() -> u16 {
    1
}

impl NicSettings {
    /// Its MAC: the one given, or a locally administered one made from its first address.
    pub fn mac(&self) -> Mac {
        self.mac.unwrap_or_else(|| default_mac(self.ip.first().copied()))
    }

    /// For the device.
    pub fn to_nic(&self) -> NicConfig {
        NicConfig {
            name: self.name.clone(),
            tenant: self.tenant.clone(),
            addresses: self.ip.clone(),
            mac: self.mac(),
            num_vectors: self.vectors,
            num_workers: self.workers,
            profile: self.limits.clone(),
            path: self.path,
            rates: self.rate.clone(),
            quota: self.quota,
        }
    }

    /// What no other may have, each with the tenant within which that holds; none is all tenants.
    fn unique(&self) -> Vec<(String, String)> {
        let everywhere = [format!("name {:?}", self.name), format!("socket {}", self.socket.display())]
            .map(|what| (String::new(), what));
        let addresses = self.ip.iter().map(|ip| format!("address {ip}"));
        let in_tenant = [format!("MAC {}", self.mac())].into_iter().chain(addresses);
        everywhere.into_iter().chain(in_tenant.map(|what| (self.tenant.clone(), what))).collect()
    }

    fn check(&self, workers: usize) -> Result<(), ConfigError> {
        let wrong = |why: &str| Err(ConfigError::Nic { name: self.name.clone(), why: why.to_owned() });
        if self.name.is_empty() || self.name.contains(char::is_whitespace) {
            return wrong("a name has at least one character and no white space");
        }
        if self.tenant.len() > MAX_TENANT_NAME {
            return wrong("a tenant's name has at most 255 bytes");
        }
        if self.ip.is_empty() {
            return wrong("it needs at least one address (ip = [\"10.0.0.1\"])");
        }
        if let Some(ip) = self.ip.iter().find(|ip| !is_of_an_interface(**ip)) {
            return wrong(&format!("{ip} is no address that a guest's interface could have"));
        }
        if let Some(ip) = repeated(&self.ip) {
            return wrong(&format!("address {ip} is there twice"));
        }
        if self.socket.as_os_str().len() > LONGEST_SOCKET {
            return wrong(&format!("the path of its socket has more than {LONGEST_SOCKET} bytes"));
        }
        if self.mac().0[0] & 1 != 0 {
            return wrong("its MAC is a multicast address");
        }
        if !(1..=workers).contains(&usize::from(self.workers)) {
            return wrong("it uses at least one worker and no more than engine.workers");
        }
        self.rate.check().or_else(|bad| wrong(&bad))?;
        self.limits.check().or_else(|bad| wrong(&bad.to_string()))
    }
}

/// Most bytes of a Unix socket's path: `sun_path` less its end.
const LONGEST_SOCKET: usize = 107;

fn is_of_an_interface(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || broadcast)
}

fn repeated(addresses: &[IpAddr]) -> Option<&IpAddr> {
    let mut seen = HashSet::new();
    addresses.iter().find(|ip| !seen.insert(*ip))
}

/// A MAC that is unlikely to meet another: 02:ff and the last four bytes of the address.
pub(crate) fn default_mac(ip: Option<IpAddr>) -> Mac {
    let [a, b, c, d] = match ip {
        Some(IpAddr::V4(v4)) => v4.octets(),
        Some(IpAddr::V6(v6)) => *v6.octets().last_chunk().expect("16 bytes have a last 4"),
        None => [0; 4],
    };
    Mac([0x02, 0xff, a, b, c, d])
}

impl Config {
    /// Reads a file and checks it.
    ///
    /// # Errors
    /// When it cannot be read, is not TOML of the right shape, or contradicts itself.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        config.check()?;
        Ok(config)
    }

    /// The control socket, given or default.
    pub fn control(&self) -> &Path {
        self.control.as_deref().unwrap_or(Path::new(DEFAULT_CONTROL))
    }

    /// The file of the virtual NICs that were added, given or default.
    pub fn state(&self) -> &Path {
        self.state.as_deref().unwrap_or(Path::new(DEFAULT_STATE))
    }

    /// Checks everything that can be checked without starting anything.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.engine.workers == 0 {
            return Err(ConfigError::Setting("engine.workers must be at least 1"));
        }
        self.cluster.as_ref().map_or(Ok(()), ClusterSettings::check).map_err(ConfigError::Setting)?;
        check_nics(self.nic.iter(), self.engine.workers, self.control())
    }
}

/// Whether these virtual NICs are possible beside each other, in a router with so many workers and this control socket.
///
/// # Errors
/// The first thing that is wrong.
pub fn check_nics<'a>(
    nics: impl IntoIterator<Item = &'a NicSettings>,
    workers: usize,
    control: &Path,
) -> Result<(), ConfigError> {
    let mut seen: HashMap<(String, String), &str> = HashMap::new();
    for nic in nics {
        nic.check(workers)?;
        if nic.socket == control {
            let why = "its socket is the control socket, too".to_owned();
            return Err(ConfigError::Nic { name: nic.name.clone(), why });
        }
        for key in nic.unique() {
            if let Some(first) = seen.insert(key.clone(), &nic.name) {
                let (first, second) = (first.to_owned(), nic.name.clone());
                return Err(ConfigError::Duplicate { first, second, what: key.1 });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Seccomp;

    const TWO: &str = r#"
        [engine]
        workers = 2

        [security]
        user = "freeflow"

        [[nic]]
        name = "a"
        ip = ["10.0.0.1", "fd00::1"]
        socket = "/run/freeflow/a.sock"

        [[nic]]
        name = "b"
        tenant = "blue"
        ip = ["10.0.0.1"]
        mac = "02:00:00:00:00:0b"
        socket = "/run/freeflow/b.sock"
        rate = { bits = "10G", qp-ops = 1000 }
        limits = { max_qp = 10 }
    "#;

    fn parse(text: &str) -> Result<(), String> {
        let config: Config = toml::from_str(text).map_err(|e| e.to_string())?;
        config.check().map_err(|e| e.to_string())
    }

    #[test]
    fn tenants_may_use_the_same_addresses() {
        parse(TWO).unwrap();
        let config: Config = toml::from_str(TWO).unwrap();
        assert_eq!(config.security, Security { user: Some("freeflow".to_owned()), seccomp: Seccomp::Enforce });
        assert_eq!(config.nic[0].mac(), Mac([2, 0xff, 10, 0, 0, 1]));
        assert_eq!(config.nic[1].mac(), Mac([2, 0, 0, 0, 0, 0xb]));
        assert_eq!(config.nic[1].limits, Profile { max_qp: 10, ..Profile::default() });
    }

    #[test]
    fn a_duplicate_address_names_both_owners() {
        let error = parse(&TWO.replace("tenant = \"blue\"", "")).unwrap_err();
        assert!(error.contains("\"a\" and \"b\"") && error.contains("10.0.0.1"), "{error}");
    }

    #[test]
    fn mistakes_are_named() {
        for (from, to, expected) in [
            ("workers = 2", "workers = 0", "workers"),
            ("workers = 2", "worker = 2", "unknown field"),
            ("user = \"freeflow\"", "seccomp = \"kill\"", "unknown variant"),
            ("max_qp = 10", "max_qp = 0", "max_qp"),
            ("10G", "fast", "not a rate in bit/s"),
            ("qp-ops = 1000", "burst-ms = 10001", "burst-ms must be at most"),
            ("qp-ops = 1000", "qp-ops = 0", "nonzero"),
            ("[engine]", "rdma-device = \":1\"\n[engine]", "NAME:PORT"),
            ("[\"10.0.0.1\"]", "[]", "address"),
            ("\"blue\"", &format!("{:?}", "x".repeat(256)), "at most 255 bytes"),
            ("fd00::1", "10.0.0.1", "twice"),
            ("fd00::1", "::1", "no address"),
            ("fd00::1", "224.0.0.1", "no address"),
            ("fd00::1", "0.0.0.0", "no address"),
            ("/run/freeflow/b.sock", &"x".repeat(108), "more than 107 bytes"),
            ("02:00:00:00:00:0b", "03:00:00:00:00:0b", "multicast"),
            ("02:00:00:00:00:0b", "2:0:0:0:0:b", "not a MAC"),
            ("name = \"b\"", "name = \"a\"", "both have name"),
            ("/run/freeflow/b.sock", "/run/freeflow/a.sock", "both have socket"),
            ("/run/freeflow/b.sock", "/run/freeflow/control.sock", "control socket"),
        ] {
            let error = parse(&TWO.replace(from, to)).expect_err(to);
            assert!(error.contains(expected), "{to}: {error}");
        }
    }
}
