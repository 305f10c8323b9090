//! The plain IP network beside the virtual NICs: a bridge in a network namespace of its own.
//!
//! Guests that name the same network reach each other through it, whatever runs them. The namespace comes
//! with its first guest and goes with its last: every guest holds a shared lock on the network's lock file, which the
//! kernel releases however the holder ends, and whoever can lock it exclusively knows that nobody is left.
//! A lock on `/run` itself guards the moments of joining and leaving.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result};
use clap::ValueEnum;
use thiserror::Error;

use crate::progress::quiet;

const RUN: &str = "/run";
const PREFIX: &str = "freeflow-";
const BRIDGE: &str = "br0";

/// Why a network's name was refused.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("a network's name has 1 to 32 letters, digits, '-' or '_'")]
pub struct BadName;

/// Name of a network, such as `default`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetName(String);

impl FromStr for NetName {
    type Err = BadName;

    fn from_str(name: &str) -> Result<Self, BadName> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > 32 || !name.chars().all(allowed) {
            return Err(BadName);
        }
        Ok(Self(name.to_owned()))
    }
}

impl std::fmt::Display for NetName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl NetName {
    /// Name of the network namespace, as `ip netns` shows it.
    pub fn namespace(&self) -> String {
        format!("{PREFIX}{}", self.0)
    }

    /// The file through which a process can enter the namespace.
    pub fn namespace_file(&self) -> PathBuf {
        Path::new(RUN).join("netns").join(self.namespace())
    }
}

/// Name of the host's end of interface `index` of the guest whose launcher is `pid`.
pub fn port_name(pid: u32, index: usize) -> String {
    format!("ff{pid}n{index}")
}

/// What a guest's interface is plugged into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PortKind {
    /// A tap interface, for QEMU.
    Tap,
    /// One end of a veth pair, on which User-mode Linux opens a packet socket (7.2's tap transport crashes with SMP).
    Veth,
}

/// A folder of lock files, one for each network, that exist as long as the networks do.
#[derive(Debug, Clone)]
struct Registry {
    dir: PathBuf,
}

/// What joining a network found.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// Nobody: what may be left of an earlier one is stale.
    Nobody,
    /// Other members.
    Members,
}

impl Registry {
    /// Held while somebody joins or leaves; no file of its own, so none is left behind.
    fn gate(&self) -> Result<File> {
        let gate = File::open(&self.dir).with_context(|| format!("cannot open {}", self.dir.display()))?;
        gate.lock().with_context(|| format!("cannot lock {}", self.dir.display()))?;
        Ok(gate)
    }

    fn lock_file(&self, namespace: &str) -> PathBuf {
        self.dir.join(format!("{namespace}.lock"))
    }

    /// Joins, with the gate held; the membership lasts as long as the file returned is open.
    fn join(&self, namespace: &str) -> Result<(File, Found)> {
        let path = self.lock_file(namespace);
        let open = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let file = open.with_context(|| format!("cannot make {}", path.display()))?;
        let found = if file.try_lock().is_ok() { Found::Nobody } else { Found::Members };
        // Turns the exclusive lock into a shared one; the gate keeps others from getting in between.
        file.lock_shared().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok((file, found))
    }

    /// Gives a membership up, with the gate held, and tells whether it was the last.
    fn leave(&self, namespace: &str, member: &File) -> bool {
        let last = member.try_lock().is_ok();
        if last {
            // What stays without a lock is stale, and taken for that by the next user.
            drop(fs::remove_file(self.lock_file(namespace)));
        }
        last
    }

    /// Whether a network that exists has no members left, with the gate held.
    fn is_stale(&self, namespace: &str) -> bool {
        match File::open(self.lock_file(namespace)) {
            Ok(file) => file.try_lock().is_ok(),
            Err(error) => error.kind() == ErrorKind::NotFound,
        }
    }
}

/// Membership in a network, with this guest's ports in it.
#[derive(Debug)]
pub struct Membership {
    registry: Registry,
    name: NetName,
    member: File,
    ports: Vec<String>,
}

impl Membership {
    /// Joins the network, making it when this is its first guest, and adds `ports` to it.
    pub fn join(name: NetName, kind: PortKind, ports: Vec<String>) -> Result<Self> {
        let registry = Registry { dir: PathBuf::from(RUN) };
        let _gate = registry.gate()?;
        remove_stale(&registry);
        let (member, found) = registry.join(&name.namespace())?;
        let membership = Self { registry, name, member, ports };
        if found == Found::Nobody {
            create(&membership.name.namespace())?;
        }
        membership.add_ports(kind)?;
        Ok(membership)
    }

    fn add_ports(&self, kind: PortKind) -> Result<()> {
        let namespace = self.name.namespace();
        for port in &self.ports {
            let plugged = match kind {
                PortKind::Tap => {
                    ip(&namespace, &["tuntap", "add", "dev", port, "mode", "tap"])?;
                    port.clone()
                }
                PortKind::Veth => add_veth(&namespace, port)?,
            };
            ip(&namespace, &["link", "set", &plugged, "master", BRIDGE, "addrgenmode", "none", "up"])?;
        }
        Ok(())
    }
}

/// Makes a veth pair, its end `port` ready for the guest, and returns the other one.
fn add_veth(namespace: &str, port: &str) -> Result<String> {
    let other = format!("{port}b");
    ip(namespace, &["link", "add", port, "type", "veth", "peer", "name", &other])?;
    ip(namespace, &["link", "set", port, "addrgenmode", "none", "promisc", "on", "up"])?;
    Ok(other)
}

impl Drop for Membership {
    fn drop(&mut self) {
        let namespace = self.name.namespace();
        // Best effort: there is nobody to tell, and whoever comes next removes what is stale.
        let Ok(_gate) = self.registry.gate() else { return };
        for port in &self.ports {
            drop(ip(&namespace, &["link", "del", port]));
        }
        if self.registry.leave(&namespace, &self.member) {
            drop(delete(&namespace));
        }
    }
}

/// Removes every network of ours that has no guest left (all its launchers were killed).
fn remove_stale(registry: &Registry) {
    let namespaces = fs::read_dir(Path::new(RUN).join("netns")).into_iter().flatten().filter_map(Result::ok);
    for namespace in namespaces.filter_map(|entry| entry.file_name().into_string().ok()) {
        if namespace.starts_with(PREFIX) && registry.is_stale(&namespace) {
            drop(delete(&namespace));
            drop(fs::remove_file(registry.lock_file(&namespace)));
        }
    }
}

fn create(namespace: &str) -> Result<()> {
    quiet(Command::new("ip").args(["netns", "add", namespace]))?;
    ip(namespace, &["link", "add", BRIDGE, "type", "bridge", "forward_delay", "0", "mcast_snooping", "0"])?;
    ip(namespace, &["link", "set", BRIDGE, "addrgenmode", "none", "up"])
}

fn delete(namespace: &str) -> Result<()> {
    quiet(Command::new("ip").args(["netns", "del", namespace])).map(drop)
}

fn ip(namespace: &str, args: &[&str]) -> Result<()> {
    quiet(Command::new("ip").args(["-n", namespace]).args(args)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry { dir: dir.path().to_owned() };
        (dir, registry)
    }

    #[test]
    fn names_are_checked() {
        for bad in ["", "a b", "a/b", "..", &"x".repeat(33)] {
            assert_eq!(bad.parse::<NetName>(), Err(BadName), "{bad}");
        }
        assert_eq!("lab_1".parse::<NetName>().unwrap().namespace(), "freeflow-lab_1");
    }

    #[test]
    fn port_names_fit_an_interface_name() {
        assert!(port_name(4_194_304, 15).len() < 15);
    }

    #[test]
    fn the_last_member_is_told_so() {
        let (_dir, registry) = registry();
        let (first, found) = registry.join("n").unwrap();
        assert_eq!(found, Found::Nobody);
        let (second, found) = registry.join("n").unwrap();
        assert_eq!(found, Found::Members);
        assert!(!registry.leave("n", &first));
        drop(first);
        assert!(registry.leave("n", &second) && !registry.lock_file("n").exists());
    }

    #[test]
    fn a_crash_makes_it_stale() {
        let (_dir, registry) = registry();
        let (member, _) = registry.join("n").unwrap();
        assert!(!registry.is_stale("n"));
        drop(member);
        assert!(registry.is_stale("n") && registry.is_stale("never-there"));
        assert_eq!(registry.join("n").unwrap().1, Found::Nobody);
    }

    #[test]
    fn the_gate_admits_one() {
        let (_dir, registry) = registry();
        let gate = registry.gate().unwrap();
        assert!(File::open(&registry.dir).unwrap().try_lock().is_err());
        drop(gate);
        assert!(registry.gate().is_ok());
    }
}
