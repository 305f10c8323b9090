//! Several hosts on this machine: a network namespace for each, joined by a bridge in one more, and certificates.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::child::Owned;
use super::interrupt::wait_for;
use super::router::{address_of, name_of};
use crate::netns::{self, Namespace};

/// Where routers listen.
const PORT: u16 = 7471;

/// Where etcd listens, if there is one: on the bridge.
const ETCD: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 254), 2379);

/// How guests are spread over hosts, and these joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Hosts; virtual NICs are on them in turn.
    pub hosts: usize,
    /// How hosts know of each other.
    pub directory: Source,
    /// What the guests' network interfaces are on.
    pub network: Network,
}

/// Where the directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Source {
    /// In a file of each host.
    File,
    /// In an etcd of their own.
    Etcd,
}

/// The guests' plain IP network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// One bridge, whatever hosts there are.
    Bridge,
    /// A bridge on each of two hosts, joined by VXLAN over the network between the hosts.
    Vxlan,
}

impl Layout {
    /// Everything on one host.
    pub const ONE: Self = Self::on(1);

    /// On so many hosts, in the usual way.
    pub const fn on(hosts: usize) -> Self {
        Self { hosts, directory: Source::File, network: Network::Bridge }
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let directory = if self.directory == Source::Etcd { ", etcd" } else { "" };
        write!(f, "{} hosts{directory}", self.hosts)
    }
}

/// The network between hosts. Dropping it removes it.
#[derive(Debug)]
pub struct Hosts {
    spaces: Vec<Namespace>,
    _etcd: Option<Owned>,
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
    pub fn new(dir: &Path, layout: Layout, nics: usize) -> Result<Self> {
        let hosts = layout.hosts;
        let switch = Namespace::new("switch")?;
        switch.ip(&["link", "add", "br0", "type", "bridge"])?;
        switch.ip(&["address", "add", &format!("{}/24", ETCD.0), "dev", "br0"])?;
        switch.ip(&["link", "set", "br0", "up"])?;
        let spaces = (0..hosts).map(|host| plug(&switch, host)).collect::<Result<_>>()?;
        let etcd = match layout.directory {
            Source::File => {
                fs::write(directory(dir), directory_of(hosts, nics)).context("cannot write the directory")?;
                None
            }
            Source::Etcd => Some(etcd(dir, &switch)?),
        };
        certify(dir, hosts).context("cannot make certificates")?;
        Ok(Self { spaces, _etcd: etcd, _switch: switch })
    }

    /// Joins the bridge that guests of a host have, in a namespace of that name, to that of the other host by VXLAN.
    pub fn join_by_vxlan(&self, host: usize, guests: &str) -> Result<()> {
        let (local, remote) = (host_address(host).to_string(), host_address(1 - host).to_string());
        let tunnel =
            ["type", "vxlan", "id", "42", "dstport", "4789", "dev", "eth0", "local", &local, "remote", &remote];
        // Made where the network between the hosts is, it keeps sending there.
        let space = &self.spaces[host];
        space.ip(&[&["link", "add", "vxlan0"], &tunnel[..]].concat())?;
        space.ip(&["link", "set", "vxlan0", "netns", guests])?;
        netns::ip(&["-n", guests, "link", "set", "vxlan0", "master", "br0", "up"])
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

/// An etcd, with its files in `dir`, that answers.
fn etcd(dir: &Path, switch: &Namespace) -> Result<Owned> {
    let url = format!("http://{}:{}", ETCD.0, ETCD.1);
    let log = fs::File::create(dir.join("etcd.log")).context("cannot make etcd's log")?;
    let mut command = switch.command("etcd");
    command.arg("--data-dir").arg(dir.join("etcd")).args([
        "--listen-client-urls",
        &url,
        "--advertise-client-urls",
        &url,
    ]);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let etcd = Owned::spawn(&mut command).context("no etcd (Debian's package etcd-server)")?;
    let answers = || Ok(switch.run(|| Ok(TcpStream::connect(ETCD).is_ok()))?.then_some(()));
    wait_for("etcd's start", Duration::from_secs(20), answers)?;
    Ok(etcd)
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
pub fn cluster_of(dir: &Path, source: Source, host: usize) -> String {
    let file = |name: &str| dir.join(name).display().to_string();
    let (name, address) = (host_name(host), host_address(host));
    let (cert, key) = (file(&format!("{name}.pem")), file(&format!("{name}.key")));
    let source = match source {
        Source::File => format!("directory = {:?}\n", directory(dir).display().to_string()),
        Source::Etcd => format!("[cluster.etcd]\nendpoints = [\"http://{}:{}\"]\n", ETCD.0, ETCD.1),
    };
    format!(
        "[cluster]\nname = {name:?}\nlisten = \"{address}:{PORT}\"\nadvertise = \"{address}:{PORT}\"\n{source}\
         [cluster.tls]\nca = {:?}\ncert = {cert:?}\nkey = {key:?}\n",
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
