//! Guest memory: what the VMM shared, and the few ways in which the engine touches it.
//!
//! All `unsafe` of the data path is in this folder. What leaves it are handles that were checked against
//! the memory table once ([`Extent`], [`Pages`]) and that keep their mapping alive, so that a pointer can be late (point into memory that the
//! VMM has meanwhile removed) but never dangling.

mod atomic;
mod copy;
mod extent;
mod fault;
mod map;
mod pages;
pub mod socket;

pub use atomic::{AtomicOp, atomic};
pub use copy::{Source, copy, copy_in_strides, copy_ordered, prefetch_own, read, read_all, touch, write};
pub use extent::{Extent, Seg};
pub use fault::Alarm;
pub use map::{Map, MapError, Region, RegionId};
pub use pages::Pages;
