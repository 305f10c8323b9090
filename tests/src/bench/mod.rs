//! `make bench`: what the project promises of speed, measured side by side in one run.
//!
//! * [`path`]: the in-process guest against the device, with a core each for the poster and the worker.
//! * [`bulk`]: the same with many bytes; [`traffic`]: what both are driven with.
//! * [`idle`]: what QPs cost that do nothing.
//! * [`noise`]: what a virtual NIC gets beside a noisy one.
//! * [`scale`]: thousands of QPs, regions and virtual NICs.
//! * [`verbs`]: what the path over the host's NIC costs by itself.
//! * [`rxe`]: the same path over the kernel's rxe, beside perftest on that.
//! * [`hosts`]: between two hosts, beside TCP.
//! * [`overlay`]: what guests of two hosts have without us.
//! * [`guests`]: stock perftest in real guests, on our device and on the kernel's rxe.
//! * [`peers`]: UCX and libfabric on the same cores.
//! * [`table`]: the figures, for people and as JSON.

pub mod bulk;
pub mod guests;
pub mod hosts;
pub mod idle;
pub mod noise;
pub mod overlay;
pub mod path;
pub mod peers;
pub mod rxe;
pub mod scale;
pub mod table;
pub mod traffic;
pub mod verbs;

/// The middle one of some figures.
///
/// # Panics
/// Without figures.
pub fn median(figures: Vec<f64>) -> f64 {
    percentile(figures, 50)
}

/// The figure that this share of all is not above.
///
/// # Panics
/// Without figures.
pub fn percentile(mut figures: Vec<f64>, percent: usize) -> f64 {
    assert!(!figures.is_empty(), "no figures");
    figures.sort_by(f64::total_cmp);
    figures[(figures.len() - 1) * percent / 100]
}

/// Runs of each side, in turn.
pub const RUNS: usize = 5;

/// Measures two sides in turn, [`RUNS`] times each, and returns the median of the first and the median of the ratios first to second.
///
/// # Errors
/// The first failure of either.
pub fn alternate(
    mut one: impl FnMut() -> anyhow::Result<f64>,
    mut other: impl FnMut() -> anyhow::Result<f64>,
) -> anyhow::Result<(f64, f64, f64)> {
    let (mut values, mut others, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        crate::e2e::interrupt::check()?;
        let (a, b) = (one()?, other()?);
        values.push(a);
        others.push(b);
        ratios.push(a / b);
    }
    Ok((median(values), median(others), median(ratios)))
}
