//! Keys and values in etcd. Anybody may have written them: what is not exactly as we write it is not read.
//!
//! ```text
//! PREFIX/v1/host/NAME               {"address":"192.0.2.1:7471"}
//! PREFIX/v1/address/TENANT/ADDRESS  {"host":"host1","nic":"a"}
//! ```
//! So an address of a tenant is one key, which is there once or not at all. In TENANT everything but letters, digits, `-`, `_` and `.` is
//! written as `%` and two hexadecimal digits.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use freeflow_backend::Gid;
use serde::{Deserialize, Serialize};

use super::super::{Claim, Owner, Refused};
use crate::cluster::HostName;

/// Most bytes of the name of a tenant or a virtual NIC.
const MAX_NAME: usize = 255;
/// Most bytes of a value.
const MAX_VALUE: usize = 1024;
/// Most addresses of a virtual NIC: all are claimed in one transaction, of at most 128 operations or comparisons unless etcd is told otherwise, and
/// looking at one takes two.
const MAX_ADDRESSES: usize = 64;

/// What a key is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// Where a host is.
    Host(HostName),
    /// Who has an address.
    Address(Arc<str>, Gid),
}

/// What a key and its value say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// Where a host is.
    Host(HostName, SocketAddr),
    /// Who has an address.
    Address(Arc<str>, Gid, Owner),
}

#[derive(Debug, Serialize, Deserialize)]
struct HostValue {
    address: SocketAddr,
}

#[derive(Debug, Serialize, Deserialize)]
struct AddressValue {
    host: HostName,
    nic: String,
}

/// What all keys begin with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix(String);

impl Prefix {
    /// Of our keys under `prefix`, which does not end with a slash.
    pub fn new(prefix: &str) -> Self {
        Self(format!("{prefix}/v1/"))
    }

    /// As etcd has it.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The first key after all of ours.
    pub fn end(&self) -> Vec<u8> {
        // A slash is followed by a zero, as characters go.
        [&self.as_bytes()[..self.0.len() - 1], b"0"].concat()
    }

    /// As etcd has it.
    pub fn write(&self, key: &Key) -> String {
        match key {
            Key::Host(name) => format!("{}host/{name}", self.0),
            Key::Address(tenant, gid) => format!("{}address/{}/{gid}", self.0, escape(tenant)),
        }
    }

    /// What a key of etcd is about, if we wrote it.
    pub fn read(&self, key: &[u8]) -> Option<Key> {
        let text = std::str::from_utf8(key).ok()?;
        let key = match text.strip_prefix(&self.0)?.split_once('/')? {
            ("host", name) => Key::Host(name.parse().ok()?),
            ("address", rest) => {
                let (tenant, address) = rest.split_once('/')?;
                Key::Address(unescape(tenant)?.into(), Gid::of(address.parse::<IpAddr>().ok()?))
            }
            _ => return None,
        };
        // An address and a name can be written in more than one way; two keys for one of them would be two owners.
        (self.write(&key) == text).then_some(key)
    }
}

/// What a key and its value say, if they make sense.
pub fn read(prefix: &Prefix, key: &[u8], value: &[u8]) -> Option<Record> {
    if value.len() > MAX_VALUE {
        return None;
    }
    match prefix.read(key)? {
        Key::Host(name) => {
            let HostValue { address } = serde_json::from_slice(value).ok()?;
            (address.port() != 0 && !address.ip().is_unspecified()).then_some(Record::Host(name, address))
        }
        Key::Address(tenant, gid) => {
            let AddressValue { host, nic } = serde_json::from_slice(value).ok()?;
            is_name(&nic).then(|| Record::Address(tenant, gid, Owner { host, nic: nic.into() }))
        }
    }
}

/// The value that says where a host is.
pub fn host_value(address: SocketAddr) -> Vec<u8> {
    to_json(&HostValue { address })
}

/// The value that says who has an address.
pub fn address_value(owner: &Owner) -> Vec<u8> {
    to_json(&AddressValue { host: owner.host.clone(), nic: owner.nic.as_ref().to_owned() })
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("text and numbers can be written")
}

/// Whether a claim can be written.
pub fn check(claim: &Claim) -> Result<(), Refused> {
    let forbid = |why: String| Err(Refused::Forbidden(why));
    if !is_name(&claim.tenant) || claim.tenant.is_empty() {
        return forbid(format!("the name of tenant {:?} is too long for etcd, or not printable", claim.tenant));
    }
    if !is_name(&claim.nic) {
        return forbid(format!("the name {:?} of a virtual NIC is too long for etcd, or not printable", claim.nic));
    }
    if claim.gids().count() > MAX_ADDRESSES {
        return forbid(format!("with etcd a virtual NIC has at most {} addresses", MAX_ADDRESSES - 1));
    }
    Ok(())
}

/// It is shown to people: on terminals, too.
fn is_name(text: &str) -> bool {
    text.len() <= MAX_NAME && !text.chars().any(char::is_control)
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)
}

fn escape(text: &str) -> String {
    text.bytes().fold(String::new(), |mut escaped, byte| {
        if is_plain(byte) {
            escaped.push(char::from(byte));
        } else {
            // Nothing fails at writing to a string.
            let _ = write!(escaped, "%{byte:02x}");
        }
        escaped
    })
}

fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let (digits, tail) = rest.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = tail;
    }
    String::from_utf8(bytes).ok().filter(|text| is_name(text) && !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix() -> Prefix {
        Prefix::new("/freeflow")
    }

    #[test]
    fn keys_are_read_as_they_are_written() {
        let gid = |text: &str| Gid::of(text.parse().unwrap());
        for (key, text) in [
            (Key::Host("host1".parse().unwrap()), "/freeflow/v1/host/host1"),
            (Key::Address("blue".into(), gid("10.0.0.1")), "/freeflow/v1/address/blue/10.0.0.1"),
            (Key::Address("a/b %\u{e4}".into(), gid("fd00::1")), "/freeflow/v1/address/a%2fb%20%25%c3%a4/fd00::1"),
        ] {
            assert_eq!(prefix().write(&key), text);
            assert_eq!(prefix().read(text.as_bytes()), Some(key));
            assert!(text.as_bytes() < prefix().end().as_slice() && text.as_bytes() >= prefix().as_bytes());
        }
    }

    #[test]
    fn what_we_do_not_write_is_not_read() {
        let long = format!("address/{}/10.0.0.1", "a".repeat(MAX_NAME + 1));
        for key in [
            "host/Host1",
            "host/a/b",
            "host/",
            "host",
            "hosts/a",
            "address/blue/::ffff:10.0.0.1",
            "address/blue/fd00:0::1",
            "address/blue/10.0.0.1/",
            "address//10.0.0.1",
            "address/bl%75e/10.0.0.1",
            "address/bl%2Fe/10.0.0.1",
            "address/a%/10.0.0.1",
            "address/a%+1/10.0.0.1",
            "address/a%1b/10.0.0.1",
            "address/a%ff/10.0.0.1",
            "address/a b/10.0.0.1",
            &long,
        ] {
            assert_eq!(prefix().read(format!("/freeflow/v1/{key}").as_bytes()), None, "{key}");
        }
        assert_eq!(prefix().read(b"/other/v1/host/host1"), None);
        assert_eq!(prefix().read(b"/freeflow/v1/host/\xff"), None);
    }

    #[test]
    fn values_that_make_no_sense_are_not_read() {
        let owner = Owner { host: "host1".parse().unwrap(), nic: "a".into() };
        let address = b"/freeflow/v1/address/blue/10.0.0.1".as_slice();
        let host = b"/freeflow/v1/host/host1".as_slice();
        assert!(read(&prefix(), address, &address_value(&owner)).is_some());
        assert!(read(&prefix(), host, &host_value("192.0.2.1:1".parse().unwrap())).is_some());
        let long = format!("{{\"host\":\"host1\",\"nic\":\"{}\"}}", "a".repeat(MAX_NAME + 1));
        let large = [address_value(&owner), vec![b' '; MAX_VALUE]].concat();
        for (key, value) in [
            (address, b"".as_slice()),
            (address, b"{\"host\":\"host 1\",\"nic\":\"a\"}"),
            (address, b"{\"host\":\"host1\",\"nic\":\"\\u001b[2J\"}"),
            (address, b"{\"host\":\"host1\"}"),
            (address, b"\xff\xff"),
            (address, long.as_bytes()),
            (address, &large),
            (host, b"{\"address\":\"192.0.2.1\"}"),
            (host, b"{\"address\":\"192.0.2.1:0\"}"),
            (host, b"{\"address\":\"0.0.0.0:7471\"}"),
        ] {
            assert_eq!(read(&prefix(), key, value), None, "{}", String::from_utf8_lossy(value));
        }
    }

    #[test]
    fn claims_that_cannot_be_written_are_refused() {
        let claim = |nic: &str, tenant: &str, addresses: u8| Claim {
            nic: nic.into(),
            tenant: tenant.into(),
            ip: (0..addresses).map(|last| [10, 0, 0, last].into()).collect(),
            mac: freeflow_backend::Mac([2, 0, 0, 0, 0, 1]),
        };
        check(&claim("a", "blue", 63)).unwrap();
        for bad in [claim("a", "blue", 64), claim("a\n", "blue", 1), claim("a", "", 1), claim("a", &"b".repeat(256), 1)]
        {
            check(&bad).unwrap_err();
        }
    }
}
