//! Rate limits: how many bits and operations per second the work requests of a virtual NIC, and of each of its QPs, may move.
//!
//! The generic cell rate algorithm (ITU-T I.371): of each limit one number is kept, the time at which what was done so far would have been done at
//! the allowed rate. Work may start as long as that is not later than the burst from now, and is counted when it is done. So nothing is
//! measured beforehand, a message that is larger than the burst passes and is paid for afterwards, and the average is exact.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};

/// Bits per second, as people write them: `10G`, `2.5M`, `800k`, or a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BitRate(pub NonZeroU64);

/// Decimal, as everywhere with bits.
const SUFFIXES: [(char, u64); 4] = [('k', 1_000), ('M', 1_000_000), ('G', 1_000_000_000), ('T', 1_000_000_000_000)];

impl FromStr for BitRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a rate in bit/s: use a number with k, M, G or T, such as 10G");
        let suffix = SUFFIXES.iter().find(|(letter, _)| text.ends_with(*letter));
        let (digits, unit) =
            suffix.map_or((text, 1), |(letter, unit)| (&text[..text.len() - letter.len_utf8()], *unit));
        let (whole, part) = digits.split_once('.').map_or((digits, None), |(whole, part)| (whole, Some(part)));
        let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        if !is_number(whole) || part.is_some_and(|part| !is_number(part)) {
            return Err(bad());
        }
        // Of what is behind the point, in whole bits.
        let part = part.unwrap_or_default();
        let scale = 10u64.checked_pow(part.len() as u32).filter(|scale| *scale <= unit).ok_or_else(bad)?;
        let part = part.parse().unwrap_or(0) * (unit / scale);
        let value = whole.parse::<u64>().ok().and_then(|whole| whole.checked_mul(unit)?.checked_add(part));
        value.and_then(NonZeroU64::new).map(Self).ok_or_else(bad)
    }
}

impl TryFrom<String> for BitRate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for BitRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0.get();
        match SUFFIXES.iter().rev().find(|(_, unit)| value.is_multiple_of(*unit)) {
            Some((letter, unit)) => write!(f, "{}{letter}", value / unit),
            None => write!(f, "{value}"),
        }
    }
}

impl From<BitRate> for String {
    fn from(rate: BitRate) -> Self {
        rate.to_string()
    }
}

/// Limits of one virtual NIC. What is not given is not limited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rates {
    /// Payload that all of its work requests move, in either direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<BitRate>,
    /// Its work requests per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<NonZeroU64>,
    /// The same for each QP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qp_bits: Option<BitRate>,
    /// The same for each QP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qp_ops: Option<NonZeroU64>,
    /// Who was below its rate may be above it until what it missed in so many milliseconds is made up for.
    pub burst_ms: u32,
}

impl Default for Rates {
    fn default() -> Self {
        Self { bits: None, ops: None, qp_bits: None, qp_ops: None, burst_ms: Self::BURST_MS }
    }
}

impl Rates {
    /// Within 5 % of a second, with room for a worker that is woken late.
    const BURST_MS: u32 = 10;
    /// Longest burst: a limit that may be exceeded for longer is none.
    pub const MAX_BURST_MS: u32 = 10_000;

    /// Whether these limits can be kept.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        let most = Self::MAX_BURST_MS;
        if self.burst_ms <= most { Ok(()) } else { Err(format!("burst-ms must be at most {most}")) }
    }

    /// Whether anything is limited.
    pub fn is_limited(&self) -> bool {
        *self != Self { burst_ms: self.burst_ms, ..Self::default() }
    }

    fn nic(&self) -> Limit {
        Limit { bits: self.bits.map(|rate| rate.0), ops: self.ops, burst: self.burst() }
    }

    fn qp(&self) -> Limit {
        Limit { bits: self.qp_bits.map(|rate| rate.0), ops: self.qp_ops, burst: self.burst() }
    }

    fn burst(&self) -> u64 {
        u64::from(self.burst_ms) * TICKS_PER_SECOND / 1000
    }
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Bytes moved.
    pub bytes: u64,
    /// Work requests begun.
    pub ops: u64,
}

impl Work {
    /// As much as one likes.
    pub const MAX: Self = Self { bytes: u64::MAX, ops: u64::MAX };

    fn min(self, other: Self) -> Self {
        Self { bytes: self.bytes.min(other.bytes), ops: self.ops.min(other.ops) }
    }
}

impl std::ops::Sub for Work {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { bytes: self.bytes - before.bytes, ops: self.ops - before.ops }
    }
}

/// Sixteenths of a nanosecond, so that a small message at a high rate is not rounded to nothing; 36 years fit.
const TICKS_PER_SECOND: u64 = 16_000_000_000;

/// Smaller pieces are not made of a message.
const LEAST_BYTES: u64 = 4096;

/// Limits of one thing.
#[derive(Debug, Clone, Copy)]
struct Limit {
    bits: Option<NonZeroU64>,
    ops: Option<NonZeroU64>,
    burst: u64,
}

/// How much one thing has done: when that would be done at the allowed rate, in ticks.
#[derive(Debug, Default)]
pub struct Pace {
    bytes: AtomicU64,
    ops: AtomicU64,
}

impl Pace {
    /// When it may go on, if not now.
    fn held(&self, now: u64, limit: &Limit) -> Option<u64> {
        let due = |done: &AtomicU64, rate: Option<NonZeroU64>| rate.map_or(0, |_| done.load(Relaxed));
        let due = due(&self.bytes, limit.bits).max(due(&self.ops, limit.ops));
        (due > now + limit.burst).then(|| due - limit.burst)
    }

    /// How much of it may be begun now, when it is not held: less than one more is one more.
    fn room(&self, now: u64, limit: &Limit) -> Work {
        let room = |done: &AtomicU64, rate: Option<NonZeroU64>, least: u64| {
            let Some(rate) = rate else { return u64::MAX };
            let ticks = (now + limit.burst).saturating_sub(done.load(Relaxed));
            let units = u128::from(ticks) * u128::from(rate.get()) / u128::from(TICKS_PER_SECOND);
            u64::try_from(units).unwrap_or(u64::MAX).max(least)
        };
        Work { bytes: room(&self.bytes, limit.bits, 8 * LEAST_BYTES) / 8, ops: room(&self.ops, limit.ops, 1) }
    }

    fn count(&self, now: u64, limit: &Limit, work: Work) {
        let add = |done: &AtomicU64, units: u64, rate: Option<NonZeroU64>| {
            let Some(rate) = rate.filter(|_| units > 0) else { return };
            let ticks = u128::from(units) * u128::from(TICKS_PER_SECOND) / u128::from(rate.get());
            // A rate so low that this never ends is one that ends when the limits change.
            let ticks = u64::try_from(ticks).unwrap_or(u64::MAX);
            done.fetch_update(Relaxed, Relaxed, |done| Some(done.max(now).saturating_add(ticks)))
                .expect("it is always updated");
        };
        add(&self.bytes, work.bytes.saturating_mul(8), limit.bits);
        add(&self.ops, work.ops, limit.ops);
    }

    fn forgive(&self) {
        self.bytes.store(0, Relaxed);
        self.ops.store(0, Relaxed);
    }
}

/// The limits of one virtual NIC, which may change, and how much it has done, on whatever worker.
#[derive(Debug)]
pub struct Pacer {
    limited: AtomicBool,
    rates: RwLock<Rates>,
    pace: Pace,
    start: Instant,
}

impl Pacer {
    /// With these limits.
    pub fn new(rates: Rates) -> Self {
        let limited = AtomicBool::new(rates.is_limited());
        Self { limited, rates: RwLock::new(rates), pace: Pace::default(), start: Instant::now() }
    }

    /// The limits.
    pub fn rates(&self) -> Rates {
        self.rates.read().clone()
    }

    /// Changes them. What was done before does not count any more, so that a limit that is lifted holds nobody up.
    pub fn set(&self, rates: Rates) {
        let mut slot = self.rates.write();
        self.limited.store(rates.is_limited(), Relaxed);
        *slot = rates;
        self.pace.forgive();
    }

    /// Whether there are any; the only thing that is asked where there are not.
    pub fn is_limited(&self) -> bool {
        self.limited.load(Relaxed)
    }

    /// When the virtual NIC may go on, if not now.
    pub fn held(&self, now: Instant) -> Option<Instant> {
        let limit = self.limited().map(|rates| rates.nic())?;
        self.pace.held(self.ticks(now), &limit).map(|at| self.instant(at))
    }

    /// How much a QP that has done so much may do now.
    ///
    /// # Errors
    /// It may not now: when it may.
    pub fn room(&self, now: Instant, pace: &Pace) -> Result<Work, Instant> {
        let Some((nic, qp)) = self.limited().map(|rates| (rates.nic(), rates.qp())) else {
            return Ok(Work::MAX);
        };
        let now = self.ticks(now);
        match pace.held(now, &qp) {
            Some(at) => Err(self.instant(at)),
            None => Ok(self.pace.room(now, &nic).min(pace.room(now, &qp))),
        }
    }

    /// The virtual NIC has done this.
    pub fn count(&self, now: Instant, work: Work) {
        if let Some(limit) = self.limited().map(|rates| rates.nic()) {
            self.pace.count(self.ticks(now), &limit, work);
        }
    }

    /// A QP of it has.
    pub fn count_qp(&self, now: Instant, pace: &Pace, work: Work) {
        if let Some(limit) = self.limited().map(|rates| rates.qp()) {
            pace.count(self.ticks(now), &limit, work);
        }
    }

    fn limited(&self) -> Option<parking_lot::RwLockReadGuard<'_, Rates>> {
        self.is_limited().then(|| self.rates.read())
    }

    fn ticks(&self, now: Instant) -> u64 {
        let nanos = now.saturating_duration_since(self.start).as_nanos();
        u64::try_from(nanos * u128::from(TICKS_PER_SECOND) / 1_000_000_000).unwrap_or(u64::MAX)
    }

    /// Not before, and not in a hundred years.
    fn instant(&self, ticks: u64) -> Instant {
        self.start + Duration::from_nanos(ticks.div_ceil(TICKS_PER_SECOND / 1_000_000_000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(bits: &str, ops: u64) -> Rates {
        Rates { bits: bits.parse().ok(), ops: NonZeroU64::new(ops), ..Rates::default() }
    }

    /// How much gets through in a second of pieces that are offered as soon as they may.
    fn through(rates: Rates, piece: Work) -> Work {
        let pacer = Pacer::new(rates);
        let (mut now, mut done) = (pacer.start, Work::default());
        while now < pacer.start + Duration::from_secs(1) {
            if let Some(at) = pacer.held(now) {
                assert!(at > now);
                // Workers are woken late.
                now = at + Duration::from_micros(60);
            } else {
                pacer.count(now, piece);
                done = Work { bytes: done.bytes + piece.bytes, ops: done.ops + piece.ops };
            }
        }
        done
    }

    #[track_caller]
    fn assert_near(got: u64, wanted: u64) {
        assert!(got.abs_diff(wanted) * 100 <= wanted * 5, "{got}, not {wanted}");
    }

    #[test]
    fn a_second_is_kept_within_five_percent_whatever_the_pieces() {
        for (rate, bytes) in [("1G", 125_000_000), ("40G", 5_000_000_000), ("400G", 50_000_000_000)] {
            for piece in [8, 4096, 65_536, 1 << 20] {
                if bytes / piece < 100_000_000 {
                    assert_near(through(rates(rate, 0), Work { bytes: piece, ops: 1 }).bytes, bytes);
                }
            }
        }
        assert_near(through(rates("", 100_000), Work { bytes: 0, ops: 7 }).ops, 100_000);
    }

    #[test]
    fn the_lower_of_two_limits_holds() {
        assert_near(through(rates("8M", 100), Work { bytes: 1000, ops: 1 }).ops, 100);
        assert_near(through(rates("8k", 100), Work { bytes: 10, ops: 1 }).ops, 100);
    }

    #[test]
    fn a_burst_is_what_was_missed_and_no_more() {
        let pacer = Pacer::new(rates("8M", 0));
        let later = pacer.start + Duration::from_mins(1);
        // 10 ms at a million bytes a second, and the piece that goes beyond.
        let passed = (0..).take_while(|_| {
            let free = pacer.held(later).is_none();
            pacer.count(later, Work { bytes: 1000, ops: 1 });
            free
        });
        assert_eq!(passed.count(), 11);
    }

    #[test]
    fn a_message_larger_than_the_burst_passes_and_is_paid_for() {
        let pacer = Pacer::new(rates("8M", 0));
        assert_eq!(pacer.held(pacer.start), None);
        pacer.count(pacer.start, Work { bytes: 10_000_000, ops: 1 });
        assert_eq!(pacer.held(pacer.start), Some(pacer.start + Duration::from_millis(9_990)));
        assert_eq!(pacer.held(pacer.start + Duration::from_millis(9_991)), None);
    }

    #[test]
    fn a_limit_that_is_lifted_holds_nobody() {
        let pacer = Pacer::new(rates("1k", 0));
        pacer.count(pacer.start, Work { bytes: u64::MAX, ops: 1 });
        assert!(pacer.held(pacer.start).is_some());
        pacer.set(rates("1G", 0));
        assert_eq!(pacer.held(pacer.start), None);
        pacer.set(Rates::default());
        pacer.count(pacer.start, Work { bytes: u64::MAX, ops: 1 });
        assert_eq!(pacer.held(pacer.start), None);
    }

    #[test]
    fn a_visit_does_not_go_far_beyond_what_is_allowed() {
        let pacer = Pacer::new(Rates { qp_ops: NonZeroU64::new(2_000), ..rates("80M", 3_000) });
        let qp = Pace::default();
        // 10 ms of 10 million bytes and of the lower of two rates.
        assert_eq!(pacer.room(pacer.start, &qp), Ok(Work { bytes: 100_000, ops: 20 }));
        let work = Work { bytes: 99_999, ops: 19 };
        pacer.count(pacer.start, work);
        pacer.count_qp(pacer.start, &qp, work);
        assert_eq!(pacer.room(pacer.start, &qp), Ok(Work { bytes: LEAST_BYTES, ops: 1 }));
    }

    #[test]
    fn each_qp_has_its_own() {
        let pacer = Pacer::new(Rates { qp_ops: NonZeroU64::new(1), ..Rates::default() });
        let (busy, idle) = (Pace::default(), Pace::default());
        pacer.count_qp(pacer.start, &busy, Work { bytes: 0, ops: 1 });
        assert!(pacer.room(pacer.start, &busy).is_err());
        assert_eq!(pacer.room(pacer.start, &idle).map(|room| room.ops), Ok(1));
        assert_eq!(pacer.held(pacer.start), None);
    }

    #[test]
    fn rates_are_read_and_written_as_people_do() {
        for (text, bits) in [("10G", 10_000_000_000), ("2.5M", 2_500_000), ("800k", 800_000), ("7", 7), ("1T", 1 << 40)]
        {
            let rate: BitRate = text.parse().unwrap();
            let expected = if text == "1T" { 1_000_000_000_000 } else { bits };
            assert_eq!(rate.0.get(), expected, "{text}");
            assert_eq!(rate.to_string().parse(), Ok(rate));
        }
        assert_eq!("2500k".parse::<BitRate>().unwrap().to_string(), "2500k");
        for bad in ["", "0", "G", "10g", "-1", "1.5", "1.0001k", "1e9", "99999999999T", "1.G", ".5G", "1GG"] {
            assert!(bad.parse::<BitRate>().is_err(), "{bad}");
        }
    }
}
