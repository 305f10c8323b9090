//! Unmodified programs between real guests: `freeflow-e2e`.
//!
//! * [`bed`] is a [`router`] daemon with [`guest`]s on it; the script `agent` is the guests' end.
//! * [`perf`] knows the programs, [`pair`] runs one between two guests, [`report`] shows how it went.
//! * [`suite`] runs [`lists`] of checks: pairs, [`solo`] programs, and the ends at bad moments of [`life`].
//! * [`demo`] is the main job, [`conformance`] rdma-core's own tests beside rxe, [`apps`] what applications build on,
//!   [`probes`] what is not offered, [`processes`] forks and threads.
//!   [`nic`] is the path over a host's RDMA NIC,
//!   [`paging`] memory that is not pinned; [`mpi`], [`rdma_cm`], [`kernel_users`] and [`servers`] among it.

pub mod apps;
pub mod bed;
pub mod child;
pub mod cli;
pub mod conformance;
pub mod demo;
pub mod guest;
pub mod hosts;
pub mod interrupt;
pub mod kernel_users;
pub mod life;
pub mod lists;
pub mod mpi;
pub mod nic;
pub mod paging;
pub mod pair;
pub mod perf;
pub mod probes;
pub mod processes;
pub mod rdma_cm;
pub mod report;
pub mod router;
pub mod servers;
pub mod solo;
pub mod suite;
