//! MAC addresses, as people and files write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A MAC address, written `02:00:00:00:00:01`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a MAC address such as 02:00:00:00:00:01");
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        bytes.and_then(|b| b.try_into().ok()).map(Mac).ok_or_else(bad)
    }
}

/// Two hexadecimal digits.
fn byte(text: &str) -> Option<u8> {
    let digits = text.len() == 2 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
    digits.then(|| u8::from_str_radix(text, 16).ok()).flatten()
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: Vec<_> = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        f.write_str(&bytes.join(":"))
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_and_written() {
        let mac = Mac([2, 0, 0, 0, 0, 0x1f]);
        assert_eq!("02:00:00:00:00:1F".parse(), Ok(mac));
        assert_eq!(mac.to_string(), "02:00:00:00:00:1f");
        for bad in
            ["", "2:0:0:0:0:1", "02:00:00:00:00", "02:00:00:00:00:01:02", "02:00:00:00:00:0g", "02:00:00:00:00:+1"]
        {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
