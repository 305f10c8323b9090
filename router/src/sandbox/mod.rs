//! What the daemon gives up, since it works on bytes that hostile guests write: its user, its capabilities, and the system calls
//! that it does not need.
//!
//! In three steps. [`Sandbox::drop_privileges`] comes before any thread and any socket: the user and the capabilities go. The host's RDMA NIC is
//! opened then, which makes calls of its own. [`Sandbox::enter`] takes most of the system calls away. [`Sandbox::seal`] comes when everything runs:
//! opening files, connecting and listening are over. What virtual NICs that come later need of these is done by the [steward](crate::steward),
//! which gives up the rest ([`Sandbox::enter_steward`]).
//! Limits on memory, processors and files are not here: those are the service manager's.

mod filter;
mod user;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use self::filter::Stage;
use self::user::Target;

pub use self::filter::FilterError;
pub use self::user::UserError;

/// What happens at a system call that the daemon does not need.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seccomp {
    /// The kernel ends the daemon, and says so in the audit log.
    #[default]
    Enforce,
    /// The kernel writes it into the audit log and goes on.
    Log,
    /// Nothing: there is no filter.
    Off,
}

impl fmt::Display for Seccomp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enforce => "enforce",
            Self::Log => "log",
            Self::Off => "off",
        })
    }
}

impl FromStr for Seccomp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "enforce" => Ok(Self::Enforce),
            "log" => Ok(Self::Log),
            "off" => Ok(Self::Off),
            _ => Err("use enforce, log or off".to_owned()),
        }
    }
}

/// What to give up.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Security {
    /// User to go on as, by name or number.
    pub user: Option<String>,
    /// System calls.
    pub seccomp: Seccomp,
}

/// What could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// User and capabilities.
    #[error(transparent)]
    User(#[from] UserError),
    /// System calls.
    #[error("cannot filter system calls (--seccomp off goes without)")]
    Filter(#[from] FilterError),
}

/// What the daemon does beyond serving guests of one host, and needs system calls for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Uses {
    /// It uses the host's RDMA NIC.
    pub nic: bool,
    /// It connects to other hosts.
    pub network: bool,
}

/// What is given up, checked.
#[derive(Debug)]
pub struct Sandbox {
    user: Option<Target>,
    seccomp: Seccomp,
    uses: Uses,
}

impl Sandbox {
    /// Changes nothing yet.
    ///
    /// # Errors
    /// When the user does not exist.
    pub fn new(security: &Security, uses: Uses) -> Result<Self, SandboxError> {
        let user = security.user.as_deref().map(Target::find).transpose()?;
        Ok(Self { user, seccomp: security.seccomp, uses })
    }

    /// Gives up the user and the capabilities. `folders` were made for the user to come, and become its own.
    ///
    /// # Errors
    /// When the user may not be taken on.
    pub fn drop_privileges(&self, folders: &[PathBuf]) -> Result<(), SandboxError> {
        if self.stays_root() {
            log::warn!("running as root: name a user of its own with --user");
        }
        if let Some(user) = &self.user {
            user.own(folders)?;
        }
        Ok(user::drop_privileges(self.user.as_ref())?)
    }

    /// Gives up, in all threads, the system calls that the start does not need.
    ///
    /// # Errors
    /// When the kernel has no filters.
    pub fn enter(&self) -> Result<(), SandboxError> {
        Ok(filter::install(self.seccomp, Stage::Start, self.uses)?)
    }

    /// Gives up what the steward does not need.
    ///
    /// # Errors
    /// As [`enter`](Self::enter).
    pub fn enter_steward(&self) -> Result<(), SandboxError> {
        user::drop_privileges(self.user.as_ref())?;
        Ok(filter::install(self.seccomp, Stage::Steward, Uses::default())?)
    }

    fn stays_root(&self) -> bool {
        user::stays_root(self.user.as_ref())
    }

    /// Gives up, in all threads, what was needed for the start only.
    ///
    /// # Errors
    /// When the kernel refuses the filter.
    pub fn seal(&self) -> Result<(), SandboxError> {
        Ok(filter::install(self.seccomp, Stage::Running, self.uses)?)
    }
}
