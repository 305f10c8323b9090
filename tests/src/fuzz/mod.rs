//! What the fuzzer drives: each target turns bytes into something that guests, or other hosts, do, and panics when the device does what it must not.
//!
//! The programs for cargo-fuzz are in `tests/fuzz` and hold nothing but a call of these functions; `tests/tests/fuzz_corpus.rs` runs
//! the committed inputs through them without a fuzzer. The device is stepped ([`crate::stepped`]), so that an input does the same each
//! time.

mod commands;
mod operations;
mod rings;
mod stream;

pub use commands::commands;
pub use operations::operations;
pub use rings::rings;
pub use stream::stream;

use freeflow_backend::Profile;

use crate::guest::Guest;
use crate::stepped::Stepped;

/// A target by its name.
pub type Target = fn(&[u8]);

/// All targets.
pub const TARGETS: [(&str, Target); 4] =
    [("commands", commands), ("operations", operations), ("rings", rings), ("stream", stream)];

/// Small limits, so that inputs can reach them.
fn limits() -> Profile {
    Profile {
        max_qp: 64,
        max_cq: 32,
        max_srq: 8,
        max_mr: 32,
        max_mw: 32,
        max_pd: 8,
        max_ah: 16,
        max_gids: 8,
        max_extents: 256,
        max_qp_wr: 255,
        max_cqe: 255,
        ..Profile::default()
    }
}

/// Two guests on a new device.
fn bed() -> Stepped {
    Stepped::new(2, &limits()).expect("a device")
}

/// An input, taken from its front; zeroes follow its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// Below `end`, which is not zero.
    fn below(&mut self, end: usize) -> usize {
        (usize::from(self.byte()) | usize::from(self.byte()) << 8) % end
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now
    }
}

/// Resets a guest's device, which must leave nothing.
fn start_over(bed: &Stepped, nic: usize, guest: &Guest) {
    guest.reset().expect("RESET always works");
    assert_eq!(bed.nic(nic).counts(), [0; 4], "RESET leaves objects");
    guest.events().forget();
    guest.give_areas_and_gids().expect("areas and GIDs are taken after RESET");
}
