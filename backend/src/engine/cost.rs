//! What work costs a worker, in nanoseconds of a nominal machine. The shares of virtual NICs are counted in it.
//!
//! The clock is not asked: that would cost more than a small work request does. So figures need not be exact, but a guest
//! must not find work that costs much more than it is charged with.

/// Looking at a QP.
pub const VISIT: u64 = 60;
/// A work request, whatever becomes of it.
pub const WQE: u64 = 120;
/// Each element of its list, and each extent of what it registers.
pub const LOOKUP: u64 = 20;
/// Writing a completion.
pub const CQE: u64 = 40;
/// A work request that fails: a line for the log, maybe, and events.
pub const FAILURE: u64 = 500;
/// An event for a guest, which may be a system call.
pub const EVENT: u64 = 1000;
/// A timer that is due.
pub const TIMER: u64 = 100;
/// A QP that another thread puts before the worker.
pub const POST: u64 = 60;
/// A word of doorbells.
pub const DOORBELL_WORD: u64 = 40;
/// A doorbell in it.
pub const DOORBELL: u64 = 10;
/// Looking everywhere and finding nothing.
pub const ROUND: u64 = 50;

/// Copying bytes.
pub const fn bytes(len: u64) -> u64 {
    len / 16
}

/// What a virtual NIC may use before others have their turn: about what a visit costs that uses its budget up.
pub const QUANTUM: i64 = 5_000;
/// What a virtual NIC is made to wait for at most. No visit costs more while others wait; one that went on because nobody did is not
/// held against it.
pub const MAX_DEBT: i64 = 64_000;
