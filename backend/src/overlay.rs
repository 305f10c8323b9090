//! What the device needs to know of the overlay network. The router implements it.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::tcp::PeerId;

/// A virtual NIC of this host; numbers are not used again while the router runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NicId(pub u32);

impl fmt::Display for NicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nic{}", self.0)
    }
}

/// A GID: an IPv6 address, or an IPv4 address mapped into one (`RoCEv2`, IBA annex A17).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// The GID of an address.
    pub fn of(addr: std::net::IpAddr) -> Self {
        match addr {
            std::net::IpAddr::V4(v4) => Self(v4.to_ipv6_mapped().octets()),
            std::net::IpAddr::V6(v6) => Self(v6.octets()),
        }
    }

    /// The link-local GID made from a MAC (RFC 4291 appendix A).
    pub fn link_local(mac: [u8; 6]) -> Self {
        let eui = eui64(mac);
        let mut raw = [0; 16];
        raw[..2].copy_from_slice(&[0xfe, 0x80]);
        raw[8..].copy_from_slice(&eui);
        Self(raw)
    }

    /// Whether it names a multicast group (as `rdma_is_multicast_addr` of Linux has it).
    pub fn is_multicast(self) -> bool {
        self.address().is_multicast()
    }

    /// As an address.
    pub fn address(self) -> std::net::IpAddr {
        std::net::Ipv6Addr::from(self.0).to_canonical()
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address().fmt(f)
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address().fmt(f)
    }
}

/// The EUI-64 of a MAC with the universal/local bit inverted.
pub fn eui64(mac: [u8; 6]) -> [u8; 8] {
    [mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]]
}

/// Where a GID lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On this host.
    Local(NicId),
    /// On that host.
    Remote(PeerId),
}

/// Answers of the overlay. Called from data-path workers when a QP looks for its peer, or a peer for one: it must not block.
///
/// What concerns other hosts has an answer here for an overlay of one host.
pub trait Overlay: Send + Sync + fmt::Debug {
    /// Where `gid` lives for a QP of `from`, or `None` if it does not exist or the two may not talk.
    fn locate(&self, from: NicId, gid: Gid) -> Option<Place>;

    /// The number by which other hosts are told the tenant of this virtual NIC.
    fn tenant(&self, _nic: NicId) -> Option<u32> {
        None
    }

    /// What a peer calls this tenant, if `source` is a virtual NIC of the tenant and lives there: a host does not speak for others.
    fn tenant_of(&self, _from: PeerId, _tenant: u32, _source: Gid) -> Option<Arc<str>> {
        None
    }

    /// The virtual NIC of this host that a tenant has this GID for.
    fn find(&self, _tenant: &str, _gid: Gid) -> Option<NicId> {
        None
    }

    /// Other hosts with virtual NICs of this one's tenant.
    fn hosts(&self, _nic: NicId) -> Arc<[PeerId]> {
        Arc::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gids_are_written_as_the_addresses_they_stand_for() {
        assert_eq!(Gid::of("10.1.2.3".parse().unwrap()).to_string(), "10.1.2.3");
        assert_eq!(Gid::of("fd00::7".parse().unwrap()).to_string(), "fd00::7");
        assert_eq!(Gid::link_local([0x02, 0, 0, 0, 0, 1]).to_string(), "fe80::ff:fe00:1");
    }

    #[test]
    fn multicast_groups_are_those_of_both_kinds_of_addresses() {
        let is = |s: &str| Gid::of(s.parse().unwrap()).is_multicast();
        assert!(is("224.0.0.1") && is("239.255.255.255") && is("ff0e::ffff:e000:1"));
        assert!(!is("223.255.255.255") && !is("240.0.0.0") && !is("fe80::1") && !is("::"));
    }
}
