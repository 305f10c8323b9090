//! Which NIC of the host is asked for.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first device with a port that can be used.
    #[default]
    Auto,
    /// This one.
    Named {
        /// Its name.
        device: String,
        /// Its port; the first that can be used if not given.
        port: Option<u8>,
    },
}

impl DeviceChoice {
    /// The device of this name.
    pub fn named(device: &str) -> Self {
        Self::Named { device: device.to_owned(), port: None }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (device, port) = match text.split_once(':') {
            Some((device, port)) => (device, Some(port)),
            None => (text, None),
        };
        let port = port.map(|port| port.parse().ok().filter(|port| *port > 0).ok_or("a port is a number from 1 on"));
        match (device, port.transpose()?) {
            ("", _) => Err("use auto, the name of a device (`rdma link` lists them), or NAME:PORT".to_owned()),
            ("auto", None) => Ok(Self::Auto),
            (device, port) => Ok(Self::Named { device: device.to_owned(), port }),
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Named { device, port: None } => f.write_str(device),
            Self::Named { device, port: Some(port) } => write!(f, "{device}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_understood() {
        let named = |device: &str, port| DeviceChoice::Named { device: device.to_owned(), port };
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        assert_eq!("mlx5_0".parse(), Ok(named("mlx5_0", None)));
        assert_eq!("mlx5_0:2".parse(), Ok(named("mlx5_0", Some(2))));
        assert_eq!(named("mlx5_0", Some(2)).to_string(), "mlx5_0:2");
        for bad in ["", ":1", "mlx5_0:", "mlx5_0:0", "mlx5_0:x"] {
            assert!(bad.parse::<DeviceChoice>().is_err(), "{bad}");
        }
    }
}
