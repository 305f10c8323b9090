//! The Freeflow virtio RDMA device ABI: every byte that travels between a guest driver and the device.
//!
//! This crate is the wire: layouts, numbers and the arithmetic of shared areas. It holds no policy
//! and touches no memory. `docs/device.md` is the specification in prose; the C driver's twin of this crate is
//! `driver/virtio_rdma_abi.h`, and `tests/c_header.rs` proves that the two agree field by field.
//!
//! All multi-byte fields are little-endian unless a field says otherwise.
#![no_std]
#![forbid(unsafe_code)]

mod wire;

pub mod area;
pub mod config;
pub mod ctrl;
pub mod event;
pub mod ib;
pub mod ring;

pub use wire::{Field, Wire};
pub use zerocopy;

/// Virtio device id of RDMA devices, reserved by the virtio specification (5 Device Types).
pub const VIRTIO_ID_RDMA: u32 = 42;
/// Virtio device id used with VMMs that have no name for 42 (QEMU's `vhost-user-test-device-pci`).
pub const VIRTIO_ID_RDMA_ALT: u32 = 38;
/// Version of this ABI; any change of a layout or of a meaning increments it.
pub const ABI_VERSION: u16 = 6;
/// Size of the pages in which rings and shared areas are described, in bytes.
pub const PAGE_SIZE: usize = 4096;
