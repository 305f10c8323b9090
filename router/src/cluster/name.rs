//! Names of hosts.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use freeflow_tcp::frame::HostId;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Most bytes of a name (RFC 1035 section 2.3.4).
const MAX_NAME: usize = 253;

/// A host's name: what its certificate says, so it is written as names of hosts are (RFC 1123 section 2.1), in small letters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostName(Arc<str>);

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a host's name: letters, digits, '-' and '.' between them, at most 63 in a part and {MAX_NAME} in all"
)]
pub struct BadName(String);

impl HostName {
    /// The number by which frames between hosts name it: the first bytes of the SHA-256 of the name.
    pub fn id(&self) -> HostId {
        let digest = Sha256::digest(self.0.as_bytes());
        std::array::from_fn(|i| digest[i])
    }

    /// The system's own.
    ///
    /// # Errors
    /// When that is not one that can be used.
    pub fn of_this_host() -> Result<Self, BadName> {
        rustix::system::uname().nodename().to_string_lossy().parse()
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_label(label: &str) -> bool {
    let inside = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=63).contains(&label.len()) && label.bytes().all(inside) && !label.starts_with('-') && !label.ends_with('-')
}

impl FromStr for HostName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        if text.len() > MAX_NAME || !text.split('.').all(is_label) {
            // It may come from anywhere, and be anything.
            return Err(BadName(text.chars().take(MAX_NAME).collect()));
        }
        Ok(Self(text.to_ascii_lowercase().into()))
    }
}

impl TryFrom<String> for HostName {
    type Error = BadName;

    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<HostName> for String {
    fn from(name: HostName) -> Self {
        name.0.as_ref().to_owned()
    }
}

impl Borrow<str> for HostName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_hosts() {
        for good in ["a", "host1", "Host-1.example.org", &"a".repeat(63), "192"] {
            assert_eq!(good.parse::<HostName>().unwrap().as_str(), good.to_ascii_lowercase());
        }
        let long = ["a"; 128].join(".");
        for bad in ["", ".", "a.", ".a", "-a", "a-", "a_b", "a b", "a/b", "\u{e4}", &"a".repeat(64), &long] {
            bad.parse::<HostName>().expect_err(bad);
        }
    }

    /// It is part of the protocol: `printf host1 | sha256sum | cut -c1-32`.
    #[test]
    fn the_number_is_made_of_the_name_alone() {
        let id = |name: &str| name.parse::<HostName>().unwrap().id();
        assert_eq!(id("host1")[..], HEX_OF_HOST1);
        assert_eq!(id("HOST1"), id("host1"));
        assert_ne!(id("host1"), id("host2"));
    }

    const HEX_OF_HOST1: [u8; 16] =
        [0xc0, 0x36, 0x5b, 0x5a, 0x38, 0x67, 0xcc, 0x38, 0x2f, 0x68, 0x54, 0xfd, 0xc4, 0xf6, 0xf1, 0x0c];
}
