//! `make bench`: measures and prints one table; the same goes to `target/bench.json`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use freeflow_tests::bench::{guests, idle, path, table};
use freeflow_tests::e2e::guest::Vmm;

/// Measure what Freeflow promises of speed, beside what it is compared with, in one run.
///
/// Figures wander on small machines: both sides run in turn, and medians of ratios count. Nothing else should run meanwhile.
#[derive(Debug, Parser)]
struct Args {
    /// Only the in-process guest: no virtual machines.
    #[arg(long)]
    no_guests: bool,
    /// Where the JSON goes.
    #[arg(long, value_name = "FILE", default_value = "target/bench.json")]
    json: PathBuf,
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
    // Asked before anything is pinned.
    let cores = path::Cores::find();
    let mut rows = path::rows(cores)?;
    eprintln!("the data path is measured");
    rows.extend(idle::rows(cores)?);
    eprintln!("idle QPs are measured");
    if !args.no_guests {
        for vmm in [Vmm::Uml, Vmm::Qemu] {
            let name = vmm.name();
            let measured = guests::rows(vmm);
            rows.extend(measured.unwrap_or_else(|error| vec![table::Row::not_measurable(name, &format!("{error:#}"))]));
            eprintln!("{name} guests are measured");
        }
    }
    println!("{}", table::render(&rows));
    table::save(&rows, &args.json)
}
