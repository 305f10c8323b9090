//! The file of hosts: TOML that says which hosts there are, where, and which virtual NICs each has. No I/O.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use freeflow_backend::{Gid, Mac};
use serde::Deserialize;
use toml::Spanned;

use super::{Known, Owner};
use crate::cluster::HostName;
use crate::config::{default_mac, default_tenant};

/// What is wrong with a file of hosts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct BadFile {
    /// Where, counted from 1.
    pub line: usize,
    /// What.
    pub why: String,
}

/// A file of hosts, as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostsFile {
    #[serde(default)]
    host: Vec<Spanned<Host>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Host {
    name: HostName,
    address: SocketAddr,
    #[serde(default)]
    nic: Vec<Spanned<Nic>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nic {
    /// For people only.
    #[serde(default)]
    name: String,
    #[serde(default = "default_tenant")]
    tenant: String,
    ip: Vec<IpAddr>,
    mac: Option<Mac>,
}

impl HostsFile {
    /// What `text` says, if it makes sense as a whole.
    ///
    /// # Errors
    /// The first line that does not.
    pub fn parse(text: &str) -> Result<Known, BadFile> {
        let file: Self = toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            BadFile { line: line_of(text, start), why: error.message().trim_end().to_owned() }
        })?;
        let mut merge = Merge { text, known: Known::default(), lines: HashMap::new() };
        file.host.iter().try_for_each(|host| merge.host(host))?;
        Ok(merge.known)
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|&byte| byte == b'\n').count()
}

/// A file that is being understood.
struct Merge<'a> {
    text: &'a str,
    known: Known,
    /// Where each address was given away.
    lines: HashMap<(&'a str, Gid), usize>,
}

impl<'a> Merge<'a> {
    fn wrong<T>(&self, at: &Spanned<T>, why: String) -> BadFile {
        BadFile { line: line_of(self.text, at.span().start), why }
    }

    fn host(&mut self, entry: &'a Spanned<Host>) -> Result<(), BadFile> {
        let host = entry.get_ref();
        if self.known.host(host.name.as_str()).is_some() {
            return Err(self.wrong(entry, format!("host {} is there twice", host.name)));
        }
        let same = self.known.hosts().find(|(_, address)| *address == host.address);
        if let Some((other, address)) = same {
            return Err(self.wrong(entry, format!("hosts {other} and {} are both at {address}", host.name)));
        }
        if host.address.port() == 0 || host.address.ip().is_unspecified() {
            return Err(self.wrong(entry, format!("nobody can reach host {} at {}", host.name, host.address)));
        }
        self.known.set_host(host.name.clone(), host.address);
        host.nic.iter().try_for_each(|nic| self.nic(&host.name, nic))
    }

    fn nic(&mut self, host: &HostName, entry: &'a Spanned<Nic>) -> Result<(), BadFile> {
        let nic = entry.get_ref();
        if nic.ip.is_empty() {
            return Err(self.wrong(entry, "a virtual NIC has at least one address (ip = [\"10.0.0.1\"])".to_owned()));
        }
        let mac = nic.mac.unwrap_or_else(|| default_mac(nic.ip.first().copied()));
        let gids = nic.ip.iter().map(|&ip| Gid::of(ip)).chain([Gid::link_local(mac.0)]);
        let owner = Owner { host: host.clone(), nic: nic.name.as_str().into() };
        gids.into_iter().try_for_each(|gid| self.address(entry, gid, &owner))
    }

    fn address(&mut self, entry: &'a Spanned<Nic>, gid: Gid, owner: &Owner) -> Result<(), BadFile> {
        let tenant = entry.get_ref().tenant.as_str();
        let line = line_of(self.text, entry.span().start);
        if let Some(first) = self.lines.insert((tenant, gid), line) {
            let other = self.known.owner(tenant, gid).map_or_else(String::new, ToString::to_string);
            let why = format!("{owner} cannot have address {gid} of tenant {tenant:?}: {other} has it (line {first})");
            return Err(self.wrong(entry, why));
        }
        self.known.set_owner(tenant, gid, owner.clone());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = r#"
[[host]]
name = "host1"
address = "192.0.2.1:7471"

[[host.nic]]
name = "a"
tenant = "blue"
ip = ["10.32.0.5", "fd00::5"]

[[host.nic]]
ip = ["10.32.0.5"]
mac = "02:00:00:00:00:05"

[[host]]
name = "host2"
address = "[2001:db8::2]:7471"

[[host.nic]]
tenant = "blue"
ip = ["10.32.0.6"]
"#;

    fn owner_of(known: &Known, tenant: &str, address: &str) -> Option<String> {
        known.owner(tenant, Gid::of(address.parse().unwrap())).map(ToString::to_string)
    }

    #[test]
    fn a_file_says_who_has_what() {
        let known = HostsFile::parse(TWO).unwrap();
        assert_eq!(known.host("host2"), Some("[2001:db8::2]:7471".parse().unwrap()));
        for (tenant, address, owner) in [
            ("blue", "10.32.0.5", Some("virtual NIC \"a\" of host host1")),
            ("blue", "fd00::5", Some("virtual NIC \"a\" of host host1")),
            ("blue", "fe80::ff:aff:fe20:5", Some("virtual NIC \"a\" of host host1")),
            ("default", "10.32.0.5", Some("host host1")),
            ("default", "fe80::ff:fe00:5", Some("host host1")),
            ("blue", "10.32.0.6", Some("host host2")),
            ("default", "10.32.0.6", None),
        ] {
            assert_eq!(owner_of(&known, tenant, address).as_deref(), owner, "{tenant} {address}");
        }
        assert_eq!(known.addresses().count(), 7);
        assert_eq!(HostsFile::parse("").unwrap(), Known::default());
    }

    #[test]
    fn mistakes_are_named_with_their_lines() {
        for (from, to, line, expected) in [
            (
                "10.32.0.6",
                "10.32.0.5",
                19,
                "host host2 cannot have address 10.32.0.5 of tenant \"blue\": virtual NIC \"a\" of host host1 has it (line 6)",
            ),
            ("\"fd00::5\"", "\"10.32.0.5\"", 6, "address 10.32.0.5"),
            ("02:00:00:00:00:05\"", "02:ff:0a:20:00:05\"\ntenant = \"blue\"", 11, "has it (line 6)"),
            ("host2", "host1", 15, "host host1 is there twice"),
            ("[2001:db8::2]:7471", "192.0.2.1:7471", 15, "host1 and host2 are both at 192.0.2.1:7471"),
            ("[2001:db8::2]:7471", "[::]:7471", 15, "nobody can reach"),
            ("[2001:db8::2]:7471", "elsewhere:7471", 17, "socket address"),
            ("[\"10.32.0.6\"]", "[]", 19, "at least one address"),
            ("ip = [\"10.32.0.6\"]", "", 19, "missing field `ip`"),
            ("mac =", "macs =", 13, "unknown field `macs`"),
            ("name = \"host2\"", "name = \"host_2\"", 16, "not a host's name"),
            ("name = \"host2\"", "name = \"host2", 16, "string"),
        ] {
            let error = HostsFile::parse(&TWO.replacen(from, to, 1)).expect_err(to);
            assert!(error.line == line && error.why.contains(expected), "{to}: {error}");
        }
    }
}
