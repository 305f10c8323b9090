//! What Freeflow is tested and measured with.
//!
//! [`guest`] is a whole guest in this process: a vhost-user frontend and a driver over memfd memory, written from
//! `docs/device.md` and sharing nothing but the `virtio-rdma` ABI crate with the device. [`router`] starts the daemon under test.
//! [`stepped`] is a device with guests but without threads and sockets, under a virtual clock.
//! [`fuzz`] is what the fuzzer drives on it.
//! [`e2e`] is the program `freeflow-e2e`: real guests.
//! End-to-end tests are in `tests/`, the benchmark is the program `bench`.
#![allow(
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    reason = "a test bench: errors say themselves what failed, and panics are failed tests"
)]

pub mod attack;
pub mod bed;
pub mod bench;
#[cfg(test)]
mod clocks;
pub mod e2e;
pub mod fuzz;
pub mod guest;
pub mod logs;
pub mod mesh;
pub mod netns;
pub mod page;
pub mod relay;
pub mod rng;
pub mod router;
pub mod stepped;
pub mod sys;
