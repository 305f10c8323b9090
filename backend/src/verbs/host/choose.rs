//! Which device of the host, which port, and which of its GIDs.

use std::io;
use std::net::Ipv6Addr;

use super::super::choice::DeviceChoice;
use super::context::{self, Context, GidEntry, Port};
use crate::overlay::Gid;

/// Why no NIC can be used.
#[derive(Debug, thiserror::Error)]
pub enum NoNic {
    /// None at all.
    #[error(
        "this host has no RDMA device (`rdma link` lists them; `rdma link add rxe0 type rxe netdev IFNAME` makes one in software)"
    )]
    None,
    /// Not the one that was asked for.
    #[error("there is no RDMA device {wanted:?}, only {}", known.join(", "))]
    Unknown {
        /// What was asked for.
        wanted: String,
        /// What there is.
        known: Vec<String>,
    },
    /// None of those that were looked at can be used.
    #[error("no RDMA device can be used: {}", reasons.join("; "))]
    Unusable {
        /// Why, for each.
        reasons: Vec<String>,
    },
    /// They cannot be listed.
    #[error("cannot list RDMA devices")]
    List(#[source] io::Error),
    /// The device does not do what it is to do at the start.
    #[error("cannot use the RDMA device {name}")]
    Open {
        /// Its name.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// A device that is to be used.
#[derive(Debug)]
pub(super) struct Chosen {
    pub name: String,
    pub context: Context,
    pub port: u8,
    pub gid: (u8, Gid),
}

/// Opens what is asked for.
pub(super) fn find(wanted: &DeviceChoice) -> Result<Chosen, NoNic> {
    let known = context::names().or_else(none_without_kernel).map_err(NoNic::List)?;
    if known.is_empty() {
        return Err(NoNic::None);
    }
    let (names, only_port) = match wanted {
        DeviceChoice::Auto => (known, None),
        DeviceChoice::Named { device, port } if known.contains(device) => (vec![device.clone()], *port),
        DeviceChoice::Named { device, .. } => return Err(NoNic::Unknown { wanted: device.clone(), known }),
    };
    let mut reasons = Vec::new();
    for name in names {
        match open(&name, only_port) {
            Ok(chosen) => return Ok(chosen),
            Err(reason) => reasons.push(reason),
        }
    }
    Err(NoNic::Unusable { reasons })
}

/// A kernel without RDMA has no list, which is an empty one.
fn none_without_kernel(error: io::Error) -> io::Result<Vec<String>> {
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::ENOENT) => Ok(Vec::new()),
        _ => Err(error),
    }
}

fn open(name: &str, only_port: Option<u8>) -> Result<Chosen, String> {
    let cannot = |what: &'static str| move |error: io::Error| format!("{name} {what}: {error}");
    let context = Context::open(name).map_err(cannot("cannot be opened"))?.ok_or_else(|| format!("{name} is gone"))?;
    let gids = context.gids().map_err(cannot("does not show its GIDs"))?;
    let count = context.ports().map_err(cannot("does not answer"))?;
    let mut reasons = Vec::new();
    for port in (1..=count).filter(|port| only_port.is_none_or(|only| only == *port)) {
        let state = context.port(port).map_err(cannot("does not show its ports"))?;
        match gid_of(state, port, &gids) {
            Ok(gid) => return Ok(Chosen { name: name.to_owned(), context, port, gid }),
            Err(why) => reasons.push(format!("{name} port {port}: {why}")),
        }
    }
    let missing = || format!("{name} has {count} port(s), and no port {}", only_port.unwrap_or(1));
    Err(if reasons.is_empty() { missing() } else { reasons.join("; ") })
}

fn gid_of(state: Port, port: u8, gids: &[GidEntry]) -> Result<(u8, Gid), &'static str> {
    if !state.ethernet {
        return Err("it is InfiniBand, and only RoCE v2 is supported");
    }
    if !state.active {
        return Err("it is down (is its network interface up?)");
    }
    best_gid(port, gids).ok_or("it has no RoCE v2 GID (give its network interface an address)")
}

/// The GID of a port that peers are told: one for RoCE v2, made from an IPv4 address, else an IPv6 address, else link-local.
pub(super) fn best_gid(port: u8, gids: &[GidEntry]) -> Option<(u8, Gid)> {
    let usable = gids.iter().filter(|entry| entry.port == port && entry.roce_v2);
    let best = usable.min_by_key(|entry| (rank(entry.gid), entry.index))?;
    Some((best.index, best.gid))
}

fn rank(gid: Gid) -> u8 {
    let address = Ipv6Addr::from(gid.0);
    match address {
        _ if address.to_ipv4_mapped().is_some() => 0,
        _ if address.is_unicast_link_local() => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(port: u8, index: u8, address: &str, roce_v2: bool) -> GidEntry {
        GidEntry { port, index, gid: Gid::of(address.parse().unwrap()), roce_v2 }
    }

    #[test]
    fn an_ipv4_gid_of_roce_v2_is_best() {
        let mut gids = vec![
            entry(1, 0, "fe80::1", true),
            entry(1, 1, "10.0.0.1", false),
            entry(2, 0, "10.0.0.9", true),
            entry(1, 2, "fd00::1", true),
            entry(1, 3, "10.0.0.2", true),
            entry(1, 4, "10.0.0.1", true),
        ];
        for index in [3, 4, 2, 0] {
            assert_eq!(best_gid(1, &gids).unwrap().0, index);
            gids.retain(|entry| (entry.port, entry.index) != (1, index));
        }
        assert_eq!(best_gid(1, &gids), None);
    }

    #[test]
    fn a_port_that_cannot_be_used_says_why() {
        let up = Port { active: true, ethernet: true, mtu: 3 };
        let gids = [entry(1, 0, "10.0.0.1", true)];
        assert_eq!(gid_of(up, 1, &gids).unwrap().0, 0);
        for (port, gids, expected) in [
            (Port { ethernet: false, ..up }, &gids[..], "InfiniBand"),
            (Port { active: false, ..up }, &gids[..], "down"),
            (up, &[], "no RoCE v2 GID"),
        ] {
            assert!(gid_of(port, 1, gids).unwrap_err().contains(expected));
        }
    }
}
