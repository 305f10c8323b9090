//! `[cluster]` of the configuration.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::name::{BadName, HostName};

/// Default of [`ClusterSettings::listen`].
const DEFAULT_LISTEN: &str = "0.0.0.0:7471";

/// How this host is one of many.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ClusterSettings {
    /// This host's name among hosts; the system's own if left out.
    #[serde(default)]
    pub name: Option<HostName>,
    /// Where other hosts are listened for: one port for sessions and data.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Where other hosts reach this one; the directory's file says it, too, and etcd has it from here.
    #[serde(default)]
    pub advertise: Option<SocketAddr>,
    /// File that says which hosts there are and which virtual NICs each has.
    #[serde(default)]
    pub directory: Option<PathBuf>,
    /// etcd in place of the file.
    #[serde(default)]
    pub etcd: Option<EtcdSettings>,
    /// Certificates.
    pub tls: TlsSettings,
    /// A host that has not been heard of for so long is gone.
    #[serde(default = "default_dead_after", with = "humantime_serde")]
    pub dead_after: Duration,
}

/// Certificates, as files in PEM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TlsSettings {
    /// Who signs the certificates of hosts.
    pub ca: PathBuf,
    /// This host's certificate, and those between it and `ca`.
    pub cert: PathBuf,
    /// The key of `cert`.
    pub key: PathBuf,
}

/// Where etcd is, and as whom to go there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct EtcdSettings {
    /// `http://HOST:PORT` or `https://HOST:PORT` of some or all of its members.
    pub endpoints: Vec<String>,
    /// What all keys start with.
    #[serde(default = "default_prefix")]
    pub prefix: String,
    /// How long etcd keeps what this host said after it was last heard of.
    #[serde(default = "default_ttl", with = "humantime_serde")]
    pub ttl: Duration,
    /// Who signs etcd's certificate, for `https`.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// This host's certificate for etcd, if that asks for one.
    #[serde(default)]
    pub cert: Option<PathBuf>,
    /// The key of `cert`.
    #[serde(default)]
    pub key: Option<PathBuf>,
    /// User of etcd, if it has authentication.
    #[serde(default)]
    pub user: Option<String>,
    /// File with nothing but that user's password.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
}

fn default_listen() -> SocketAddr {
    DEFAULT_LISTEN.parse().expect("an address")
}

fn default_dead_after() -> Duration {
    Duration::from_secs(3)
}

fn default_prefix() -> String {
    "/freeflow".to_owned()
}

fn default_ttl() -> Duration {
    Duration::from_secs(30)
}

/// Least and most of [`EtcdSettings::ttl`].
const TTL: std::ops::RangeInclusive<Duration> = Duration::from_secs(5)..=Duration::from_hours(24);
/// Least and most of [`ClusterSettings::dead_after`].
const DEAD_AFTER: std::ops::RangeInclusive<Duration> = Duration::from_millis(200)..=Duration::from_hours(1);

impl ClusterSettings {
    /// This host's name among hosts, given or the system's.
    ///
    /// # Errors
    /// When the system's cannot be used.
    pub fn name(&self) -> Result<HostName, BadName> {
        self.name.clone().map_or_else(HostName::of_this_host, Ok)
    }

    /// Whether they make sense together.
    ///
    /// # Errors
    /// The first thing that does not.
    pub fn check(&self) -> Result<(), &'static str> {
        match (&self.directory, &self.etcd) {
            (None, None) => return Err("cluster: name the directory: directory = FILE, or [cluster.etcd]"),
            (Some(_), Some(_)) => return Err("cluster: directory = FILE and [cluster.etcd] exclude each other"),
            (None, Some(etcd)) => {
                if self.advertise.is_none() {
                    return Err("cluster: with etcd, advertise = \"ADDRESS:PORT\" says where others reach this host");
                }
                etcd.check()?;
            }
            (Some(_), None) => {}
        }
        if self.advertise.is_some_and(|address| address.port() == 0 || address.ip().is_unspecified()) {
            return Err("cluster: others cannot reach this host at the address that it advertises");
        }
        if !DEAD_AFTER.contains(&self.dead_after) {
            return Err("cluster: dead-after must be between 200 ms and an hour");
        }
        Ok(())
    }
}

impl EtcdSettings {
    fn check(&self) -> Result<(), &'static str> {
        if self.endpoints.is_empty() {
            return Err("cluster.etcd: endpoints = [\"http://ADDRESS:2379\"] is missing");
        }
        let secure = self.endpoints.iter().filter(|endpoint| endpoint.starts_with("https://")).count();
        if secure + self.endpoints.iter().filter(|endpoint| endpoint.starts_with("http://")).count()
            != self.endpoints.len()
        {
            return Err("cluster.etcd: an endpoint is http://HOST:PORT or https://HOST:PORT");
        }
        if ![0, self.endpoints.len()].contains(&secure) {
            return Err("cluster.etcd: endpoints are all http or all https");
        }
        if (secure != 0) != self.ca.is_some() {
            return Err(
                "cluster.etcd: ca = FILE says who signs the certificates of https endpoints, and is for these only",
            );
        }
        if self.cert.is_some() != self.key.is_some() || self.cert.is_some() && secure == 0 {
            return Err("cluster.etcd: cert and key belong together, and to https");
        }
        if self.user.is_some() != self.password_file.is_some() {
            return Err("cluster.etcd: user and password-file belong together");
        }
        if !self.prefix.starts_with('/') || self.prefix.ends_with('/') || self.prefix.len() > 256 {
            return Err("cluster.etcd: prefix starts with a slash and does not end with one, such as /freeflow");
        }
        if !TTL.contains(&self.ttl) || self.ttl.subsec_nanos() != 0 {
            return Err("cluster.etcd: ttl is in whole seconds between 5 s and a day");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "
        name = 'Host1'
        directory = '/etc/freeflow/hosts.toml'
        tls = { ca = 'ca', cert = 'cert', key = 'key' }
    ";
    const ETCD: &str = "
        advertise = '192.0.2.1:7471'
        tls = { ca = 'ca', cert = 'cert', key = 'key' }
        dead-after = '500ms'
        [etcd]
        endpoints = ['https://etcd1:2379', 'https://etcd2:2379']
        ca = 'etcd-ca'
        cert = 'cert'
        key = 'key'
        user = 'freeflow'
        password-file = 'password'
        ttl = '1m'
    ";

    fn parse(text: &str) -> Result<ClusterSettings, String> {
        let settings: ClusterSettings = toml::from_str(text).map_err(|error| error.to_string())?;
        settings.check().map(|()| settings).map_err(str::to_owned)
    }

    #[test]
    fn what_is_left_out_is_chosen() {
        let file = parse(FILE).unwrap();
        assert_eq!((file.name.unwrap().as_str(), file.listen.port()), ("host1", 7471));
        let etcd = parse(ETCD).unwrap();
        assert_eq!(
            (etcd.dead_after, etcd.etcd.as_ref().unwrap().ttl),
            (Duration::from_millis(500), Duration::from_mins(1))
        );
        assert_eq!(etcd.etcd.unwrap().prefix, "/freeflow");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, from, to, expected) in [
            (FILE, "Host1", "host_1", "not a host's name"),
            (FILE, "directory", "#", "name the directory"),
            (FILE, "name =", "advertise = '0.0.0.0:7471' #", "cannot reach"),
            (FILE, "name =", "dead-after = '1ms' #", "dead-after"),
            (FILE, "name =", "dead-after = 'soon' #", "expected"),
            (FILE, ", key = 'key'", "", "missing field `key`"),
            (ETCD, "advertise =", "directory = 'f' #", "exclude each other"),
            (ETCD, "advertise", "#", "where others reach"),
            (ETCD, "'https://etcd1:2379', 'https://etcd2:2379'", "", "endpoints"),
            (ETCD, "https://etcd1", "ftp://etcd1", "http://HOST:PORT"),
            (ETCD, "https://etcd1", "http://etcd1", "all https"),
            (ETCD, "ca = 'etcd-ca'", "", "who signs"),
            (ETCD, "user = ", "#", "password-file belong together"),
            (ETCD, "ttl = '1m'", "ttl = '1s'", "ttl"),
            (ETCD, "ttl = '1m'", "prefix = 'x'", "prefix"),
            (ETCD, "ttl = '1m'", "ttls = 'x'", "unknown field"),
        ] {
            let error = parse(&text.replace(from, to)).expect_err(to);
            assert!(error.contains(expected), "{to}: {error}");
        }
    }
}
