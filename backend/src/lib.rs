//! The Freeflow device backend: the vhost-user RDMA device, its objects, the data-path engine and its paths.
//!
//! * [`host`] is the front door: a [`Host`](host::Host) has an engine and virtual NICs.
//! * [`vhost`] talks to the VMM, [`control`] executes the guest's control commands on the objects of [`nic`], [`mr`], [`cq`] and [`qp`].
//! * [`engine`] moves the bytes: doorbells to work requests ([`ring`], [`wqe`]) to copies between guests' memories ([`mem`]) to completions.
//! * [`verbs`] is the host's RDMA NIC.
//! * [`tcp`] is the way to other hosts.
//! * [`rate`] holds virtual NICs and QPs to their rates.
//! * [`overlay`] is what it asks of the router.
//! * [`stepped`] is a host for simulations.
//!
//! Everything that a guest can write is hostile: it is copied once, checked, and only then used.

mod affinity;
pub mod control;
pub mod cq;
pub mod directory;
pub mod engine;
pub mod groups;
mod handshake;
pub mod host;
#[cfg(test)]
#[expect(unsafe_code, reason = "loom checks accesses to cells, which have no safe form")]
mod interleavings;
pub mod key_table;
pub mod log_window;
pub mod mem;
pub mod mr;
pub mod nic;
pub mod on_demand;
pub mod overlay;
pub mod profile;
pub mod qp;
pub mod rate;
pub mod ring;
mod slots;
mod srq;
pub mod stepped;
pub mod tcp;
pub mod verbs;
pub mod vhost;
pub mod wqe;

pub use engine::EngineConfig;
pub use host::{AddNicError, Host, NicStatus, Objects, QpStatus, WorkerStatus};
pub use nic::{Mac, NicConfig, PathChoice};
pub use overlay::{Gid, NicId, Overlay, Place};
pub use profile::Profile;
pub use rate::{BitRate, Rates};
pub use tcp::{Dialer, PeerId, Peering};
pub use verbs::NicQuota;
