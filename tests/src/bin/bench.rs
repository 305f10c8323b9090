//! `make bench`: measures and prints one table; the same goes to `target/bench.json`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use freeflow_tests::bench::{guests, hosts, idle, noise, overlay, path, peers, rxe, scale, table, verbs};
use freeflow_tests::e2e::guest::Vmm;
use freeflow_tests::e2e::interrupt;

/// Measure what Freeflow promises of speed, beside what it is compared with, in one run.
///
/// Figures wander on small machines: both sides run in turn, and medians of ratios count. Nothing else should run meanwhile.
#[derive(Debug, Parser)]
struct Args {
    /// Only the in-process guest: no virtual machines.
    #[arg(long)]
    no_guests: bool,
    /// Only these parts; all if not given.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Where the JSON goes.
    #[arg(long, value_name = "FILE", default_value = "target/bench.json")]
    json: PathBuf,
    /// Measure only this, on the NIC of this machine, and print the figure: what the part `rxe` runs in its guest.
    #[arg(long, value_enum, hide = true)]
    here: Option<rxe::Measure>,
}

/// What can be measured by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// The data path, in-process.
    Path,
    /// What idle QPs cost.
    Idle,
    /// A noisy virtual NIC.
    Noise,
    /// Thousands of objects.
    Scale,
    /// The path over the host's NIC.
    Verbs,
    /// The same over rxe, beside perftest, in a guest that plays the host.
    Rxe,
    /// Between two hosts.
    Hosts,
    /// Between guests of two hosts, beside their TCP over VXLAN.
    Overlay,
    /// UCX and libfabric.
    Peers,
    /// Perftest in real guests.
    Guests,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if let Some(measure) = args.here {
        println!("figure {}", measure.here()?);
        return Ok(());
    }
    interrupt::install()?;
    let cores = path::Cores::find();
    let wanted = |part| args.only.is_empty() || args.only.contains(&part);
    let mut rows = Vec::new();
    if wanted(Part::Path) {
        rows.extend(apart(|| path::rows(cores))?);
        eprintln!("the data path is measured");
    }
    if wanted(Part::Idle) {
        rows.extend(apart(|| idle::rows(cores))?);
        eprintln!("idle QPs are measured");
    }
    if wanted(Part::Noise) {
        rows.extend(apart(noise::rows)?);
        eprintln!("a noisy virtual NIC is measured");
    }
    if wanted(Part::Scale) {
        rows.extend(apart(|| scale::rows(cores))?);
        eprintln!("scale is measured");
    }
    if wanted(Part::Verbs) {
        rows.extend(apart(|| verbs::rows(cores))?);
        eprintln!("the path over the host's NIC is measured");
    }
    if wanted(Part::Hosts) {
        rows.extend(apart(|| hosts::rows(cores))?);
        eprintln!("the way to another host is measured");
    }
    if wanted(Part::Peers) {
        rows.extend(apart(|| peers::rows(cores))?);
        eprintln!("others' software is measured");
    }
    if wanted(Part::Rxe) && !args.no_guests {
        rows.extend(rxe_rows()?);
        eprintln!("the path over rxe is measured");
    }
    if wanted(Part::Overlay) && !args.no_guests {
        rows.extend(if_it_goes("between guests of two hosts", overlay::rows())?);
        eprintln!("the network without us is measured");
    }
    if wanted(Part::Guests) && !args.no_guests {
        for vmm in [Vmm::Uml, Vmm::Qemu] {
            rows.extend(guest_rows(vmm)?);
            eprintln!("{} guests are measured", vmm.name());
        }
    }
    println!("{}", table::render(&rows));
    table::save(&rows, &args.json)
}

/// Runs it on a thread of its own, so that the core it pins itself to is no matter for what comes after.
fn apart(measure: impl FnOnce() -> Result<Vec<table::Row>> + Send) -> Result<Vec<table::Row>> {
    std::thread::scope(|scope| scope.spawn(measure).join().expect("the measuring thread ends"))
}

fn guest_rows(vmm: Vmm) -> Result<Vec<table::Row>> {
    if_it_goes(vmm.name(), guests::rows(vmm))
}

fn rxe_rows() -> Result<Vec<table::Row>> {
    if_it_goes("verbs path over rxe", rxe::rows())
}

/// Without such guests the other figures still count; an interrupt ends it all.
fn if_it_goes(what: &str, measured: Result<Vec<table::Row>>) -> Result<Vec<table::Row>> {
    interrupt::check()?;
    Ok(measured.unwrap_or_else(|error| vec![table::Row::not_measurable(what, &format!("{error:#}"))]))
}
