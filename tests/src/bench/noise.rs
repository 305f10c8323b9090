//! What a virtual NIC gets beside one that keeps their worker busy, by the clock. The same under a virtual clock, for every kind of
//! noise and on any machine, is `tests/tests/fairness.rs`.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::{Context, Result};

use super::alternate;
use super::path::{Cores, engine};
use super::table::{Bar, Row};
use super::traffic::{Kind, Traffic};
use crate::bed::Bed;
use crate::guest::GuestConfig;
use crate::router::RouterSpec;
use crate::sys::{allowed_cores, pin_thread};

/// Bytes of a noisy message.
const LARGE: usize = 64 << 10;
/// Lists of work requests in a run.
const LISTS: usize = 5_000;

/// Every row of this module.
///
/// # Errors
/// When a work request fails.
pub fn rows() -> Result<Vec<Row>> {
    let name = "8 B WRITE beside 64 KiB WRITEs of another virtual NIC on the same worker";
    let [poster, worker, noisy, _, ..] = allowed_cores()[..] else {
        return Ok(vec![Row::not_measurable(name, "two posters, the worker and the rest need a core each")]);
    };
    let (value, other, ratio) = measure(Cores { poster, worker }, noisy, LISTS)?;
    let against = format!("beside its own kind {other:.2} M/s");
    Ok(vec![Row::ratio(name, value, "M/s", &against, ratio, Bar::AtLeast(0.95))])
}

/// The rate beside large messages, that beside messages of the same kind, and their ratio.
fn measure(cores: Cores, noisy: usize, lists: usize) -> Result<(f64, f64, f64)> {
    let spec = RouterSpec { vectors: 1, engine: engine(cores), ..RouterSpec::of(4) };
    let bed = Bed::guests(&spec, &GuestConfig::default());
    let [a, b, c, d] = &bed.guests[..] else { unreachable!("four guests") };
    let (victim, other) = (Traffic::between(a, b, 4096)?, Traffic::between(c, d, LARGE)?);
    pin_thread(0, cores.poster)?;
    let beside = |noise: &(dyn Fn() -> Result<f64> + Sync)| {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let noise = scope.spawn(|| {
                pin_thread(0, noisy)?;
                while !stop.load(Relaxed) {
                    noise()?;
                }
                anyhow::Ok(())
            });
            let rate = victim.rate(Kind::Write, lists);
            stop.store(true, Relaxed);
            noise.join().ok().context("the noise has panicked")??;
            rate
        })
    };
    alternate(|| beside(&|| other.stream(Kind::Write, LARGE, 64)), || beside(&|| other.rate(Kind::Write, 64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On any number of cores: that it works, not what comes out.
    #[test]
    fn it_can_be_measured() {
        let cores = allowed_cores();
        let core = |i: usize| cores[i % cores.len()];
        let (value, other, ratio) = measure(Cores { poster: core(0), worker: core(1) }, core(2), 20).unwrap();
        assert!(value > 0.0 && other > 0.0 && ratio > 0.0);
    }
}
