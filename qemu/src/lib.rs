//! Boots throw-away guests with Freeflow's virtual RDMA NICs.
//!
//! A guest is a real Linux kernel with an unmodified Debian user space, either under QEMU or as a
//! User-mode Linux process. The layers, from the bottom:
//!
//! * [`cache`], [`progress`]: what takes long to make is made once, with progress shown.
//! * [`apt`], [`roots`], [`kernel`], [`driver`]: the things that are made.
//! * [`nic`], [`net`], [`sandbox`]: what connects a guest to its host and keeps it apart from it.
//! * [`guest`]: one run of one guest.
//!
//! It knows nothing of the router beyond the vhost-user sockets on which it listens.

#![allow(clippy::missing_errors_doc, reason = "errors here are messages for a person, made where the cause is known")]

pub mod accel;
pub mod apt;
pub mod cache;
pub mod cli;
pub mod commands;
pub mod cpio;
pub mod driver;
pub mod guest;
pub mod kernel;
pub mod net;
pub mod nic;
pub mod progress;
pub mod roots;
pub mod sandbox;
pub mod vmm;
