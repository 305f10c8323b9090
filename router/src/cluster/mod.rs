//! Other hosts: which there are and who lives where ([`directory`]), and how to talk to them.
//!
//! Only with `[cluster]` in the configuration; without it a router serves its own host and nothing of this runs.

pub mod directory;
pub mod name;
pub mod settings;

pub use self::name::HostName;
pub use self::settings::ClusterSettings;
