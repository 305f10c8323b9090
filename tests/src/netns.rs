//! Network namespaces, joined by a veth pair: two hosts on one machine.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::os::fd::AsFd;

/// A network namespace that goes when it is dropped, with every interface in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// An empty one, with loopback up.
    ///
    /// # Errors
    /// When `ip` fails: it needs to be root's.
    pub fn new(role: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        if number == 0 {
            remove_stale();
        }
        let name = format!("{PREFIX}{}-{number}-{role}", std::process::id());
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// What `ip netns exec` calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `ip` in it.
    ///
    /// # Errors
    /// When that fails.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], arguments].concat())
    }

    /// A command that runs in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Runs this on a thread that is in it.
    ///
    /// # Errors
    /// When the thread cannot get there, or what it returns.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = File::open(format!("/run/netns/{}", self.name)).context("the namespace's file")?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                    .context("cannot enter a namespace")?;
                work()
            });
            thread.join().expect("what runs in a namespace ends")
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "del", &self.name]) {
            log::warn!("{error:#}");
        }
    }
}

/// Not that of networks of guests, whose launcher removes what it does not know.
const PREFIX: &str = "ffhost-";

/// Removes namespaces of processes that were killed before they could.
fn remove_stale() {
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Another one may be at it, too.
            let _ = ip(&["netns", "del", &name]);
        }
    }
}

/// Two namespaces with a veth pair between them, and these addresses.
///
/// # Errors
/// When `ip` fails.
pub fn pair(addresses: [&str; 2]) -> Result<[Namespace; 2]> {
    let hosts = [Namespace::new("a")?, Namespace::new("b")?];
    hosts[0].ip(&["link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", hosts[1].name()])?;
    for (host, address) in hosts.iter().zip(addresses) {
        host.ip(&["address", "add", &format!("{address}/24"), "dev", "veth0"])?;
        host.ip(&["link", "set", "veth0", "up"])?;
    }
    Ok(hosts)
}

/// `ip`.
///
/// # Errors
/// When that fails.
pub fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("cannot run ip (Debian package iproute2)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", arguments.join(" "), said.trim());
    Ok(())
}
