//! Several hosts on this machine: a network namespace for each, joined by a bridge in one more, and certificates.

use std::fmt::Write as _;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::router::{address_of, name_of};
use crate::netns::Namespace;

/// Where routers listen.
const PORT: u16 = 7471;

/// The network between hosts. Dropping it removes it.
#[derive(Debug)]
pub struct Hosts {
    spaces: Vec<Namespace>,
    _switch: Namespace,
}

/// What other hosts call one.
fn host_name(host: usize) -> String {
    format!("host{}", host + 1)
}

/// Where other hosts reach it.
fn host_address(host: usize) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, host as u8 + 1)
}

impl Hosts {
    /// So many hosts. The files that their routers need go into `dir`: certificates, and a directory of virtual NICs, of which
    /// there are so many, one host after the other.
    pub fn new(dir: &Path, hosts: usize, nics: usize) -> Result<Self> {
        let switch = Namespace::new("switch")?;
        switch.ip(&["link", "add", "br0", "type", "bridge"])?;
        switch.ip(&["link", "set", "br0", "up"])?;
        let spaces = (0..hosts).map(|host| plug(&switch, host)).collect::<Result<_>>()?;
        fs::write(directory(dir), directory_of(hosts, nics)).context("cannot write the directory")?;
        certify(dir, hosts).context("cannot make certificates")?;
        Ok(Self { spaces, _switch: switch })
    }

    /// The namespace of one.
    pub fn space(&self, host: usize) -> &Namespace {
        &self.spaces[host]
    }
}

/// A namespace with an interface on the bridge.
fn plug(switch: &Namespace, host: usize) -> Result<Namespace> {
    let space = Namespace::new(&host_name(host))?;
    let port = format!("port{host}");
    space.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", &port, "netns", switch.name()])?;
    space.ip(&["address", "add", &format!("{}/24", host_address(host)), "dev", "eth0"])?;
    space.ip(&["link", "set", "eth0", "up"])?;
    switch.ip(&["link", "set", &port, "master", "br0", "up"])?;
    Ok(space)
}

fn directory(dir: &Path) -> PathBuf {
    dir.join("hosts.toml")
}

fn directory_of(hosts: usize, nics: usize) -> String {
    let mut text = String::new();
    for host in 0..hosts {
        let _ = writeln!(text, "[[host]]\nname = {:?}\naddress = \"{}:{PORT}\"", host_name(host), host_address(host));
        for nic in (host..nics).step_by(hosts) {
            let _ = writeln!(text, "[[host.nic]]\nname = {:?}\nip = [\"{}\"]", name_of(nic), address_of(nic));
        }
    }
    text
}

/// The part of a router's configuration that makes it one of many.
pub fn cluster_of(dir: &Path, host: usize) -> String {
    let file = |name: &str| dir.join(name).display().to_string();
    let (name, address) = (host_name(host), host_address(host));
    let (cert, key) = (file(&format!("{name}.pem")), file(&format!("{name}.key")));
    format!(
        "[cluster]\nname = {name:?}\nlisten = \"{address}:{PORT}\"\ndirectory = {:?}\n\
         [cluster.tls]\nca = {:?}\ncert = {cert:?}\nkey = {key:?}\n",
        directory(dir).display().to_string(),
        file("ca.pem"),
    )
}

/// An authority, and a certificate of it for each host.
fn certify(dir: &Path, hosts: usize) -> Result<()> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    fs::write(dir.join("ca.pem"), authority.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(authority, key);
    for name in (0..hosts).map(host_name) {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec![name.clone()])?.signed_by(&key, &issuer)?;
        fs::write(dir.join(format!("{name}.pem")), certificate.pem())?;
        fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}
