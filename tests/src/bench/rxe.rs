//! The path over the host's NIC on the kernel's rxe, beside perftest on the same rxe: in a User-mode Linux guest that plays the host.
//!
//! There is no guest within that one. So our side is in-process guests, measured by this very program, which is started there to measure [one
//! thing](Measure).

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use freeflow_backend::verbs::host::HostNic;

use super::alternate;
use super::guests::{RXE, loopback};
use super::table::Row;
use super::traffic::{Kind as Operation, Traffic};
use crate::bed::Bed as Routed;
use crate::e2e::bed::Bed;
use crate::e2e::guest::{Distro, Guest, Kind, Vmm};
use crate::e2e::hosts::Layout;
use crate::e2e::pair::PATIENCE;
use crate::e2e::perf::{Perf, Program, READ_LAT, WRITE_BW};
use crate::guest::GuestConfig;
use crate::router::RouterSpec;

/// What is measured in the guest that plays the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Measure {
    /// MiB/s of WRITEs of 64 KiB.
    Bandwidth,
    /// The same of 1 MiB.
    LargeBandwidth,
    /// Microseconds that a READ of 64 B takes.
    Latency,
}

const BANDWIDTH_COUNT: u32 = 2000;
const LARGE_COUNT: u32 = 200;
const LATENCY_COUNT: u32 = 2000;

impl Measure {
    fn name(self) -> &'static str {
        match self {
            Self::Bandwidth => "bandwidth",
            Self::LargeBandwidth => "large-bandwidth",
            Self::Latency => "latency",
        }
    }

    fn perftest(self) -> Perf {
        match self {
            Self::Bandwidth => Perf::new(WRITE_BW, 64 << 10, BANDWIDTH_COUNT),
            Self::LargeBandwidth => Perf::new(WRITE_BW, 1 << 20, LARGE_COUNT),
            Self::Latency => Perf::new(READ_LAT, 64, LATENCY_COUNT),
        }
    }

    fn ours(self, traffic: &Traffic) -> Result<f64> {
        let bandwidth = |size: usize, count: u32| {
            // GB/s in MiB/s.
            Ok(traffic.stream(Operation::Write, size, count as usize)? * 1e9 / f64::from(1 << 20))
        };
        match self {
            Self::Bandwidth => bandwidth(64 << 10, BANDWIDTH_COUNT),
            Self::LargeBandwidth => bandwidth(1 << 20, LARGE_COUNT),
            Self::Latency => traffic.latency(Operation::Read, 64, LATENCY_COUNT as usize),
        }
    }

    /// Measures it on the first NIC of this machine that can be used.
    ///
    /// # Errors
    /// When there is none, or something does not go over it.
    pub fn here(self) -> Result<f64> {
        let nic = Arc::new(HostNic::open(&freeflow_backend::verbs::DeviceChoice::Auto)?);
        let spec = RouterSpec { vectors: 1, nic_workers: Some(1), ..RouterSpec::of(2) }.over(nic);
        let config = GuestConfig { memory_size: 64 << 20, ..GuestConfig::default() };
        let bed = Routed::guests(&spec, &config);
        let (a, b) = bed.two();
        let traffic = Traffic::between(a, b, 1 << 20)?;
        let figure = self.ours(&traffic)?;
        let copied: u64 = bed.router.router().nics().iter().map(|nic| nic.counters.copied_bytes).sum();
        let carried: u64 = bed.router.router().nics().iter().map(|nic| nic.counters.nic_wqes).sum();
        ensure!(copied == 0 && carried > 0, "{copied} bytes were copied, {carried} work requests went over the NIC");
        Ok(figure)
    }
}

/// Every row of this module.
///
/// # Errors
/// When the guest or a program in it fails.
pub fn rows() -> Result<Vec<Row>> {
    let bed = Bed::start(&[Kind::base(Vmm::Uml, Distro::Trixie)], 1, Layout::ONE)?;
    let host = bed.guest(0)?;
    host.must(RXE).context("rxe does not work in the guest")?;
    let own = std::env::current_exe().context("where is this program?")?;
    std::fs::copy(own, bed.share().join("bench")).context("cannot give the guest this program")?;
    let all = [
        ("WRITE 64 KiB", Measure::Bandwidth),
        ("WRITE 1 MiB", Measure::LargeBandwidth),
        ("READ 64 B, latency", Measure::Latency),
    ];
    all.map(|(name, measure)| compare(host, name, measure)).into_iter().collect()
}

fn compare(host: &Guest, name: &str, measure: Measure) -> Result<Row> {
    let program = Program::from(measure.perftest());
    let rxe = ("rxe0", "10.43.0.1".to_owned());
    let (value, other, ratio) = alternate(|| ours(host, measure), || loopback(host, &program, &rxe))?;
    let unit = program.unit();
    Ok(Row::versus(&format!("verbs path over rxe: {name}"), value, unit, &format!("perftest {other:.2} {unit}"), ratio))
}

fn ours(host: &Guest, measure: Measure) -> Result<f64> {
    let program = Path::new("/share/bench");
    let done = host.run(&format!("{} --here {}", program.display(), measure.name()), PATIENCE)?;
    ensure!(done.status == 0, "status {}:\n{}", done.status, done.output);
    let figure = done.output.lines().find_map(|line| line.strip_prefix("figure "));
    figure.with_context(|| format!("no figure in: {}", done.output))?.parse().context("not a figure")
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn names_are_those_of_the_command_line() {
        for measure in Measure::value_variants() {
            assert_eq!(Measure::from_str(measure.name(), false), Ok(*measure));
        }
    }
}
