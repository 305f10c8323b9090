//! Arguments of `freeflow-e2e`, and its exit status.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::apps;
use super::conformance;
use super::demo;
use super::guest::{Distro, Kind, Vmm};
use super::hosts::{Layout, Source};
use super::interrupt::{self, Interrupted};
use super::lists;
use super::report::Reporter;
use super::suite::{Part, Scene};

const EXAMPLES: &str = "Examples:
  freeflow-e2e demo                       the main job: perftest between two QEMU guests, a table
  freeflow-e2e demo --vmm uml --json      the same in User-mode Linux, as JSON
  freeflow-e2e demo --hosts 2             the same on two hosts with a router each, joined by TCP
  freeflow-e2e demo --hosts 2 --directory etcd  ... that find each other by etcd
  freeflow-e2e test                       what `make test` runs in real guests
  freeflow-e2e test --filter kill         only the checks that have `kill` in their line
  freeflow-e2e matrix --part 2/40         the second fortieth of the full product

The router (freeflow-router) and the guest launcher (freeflow-guest, by way of qemu/guest) are
found beside this program and in the source tree; $FREEFLOW_ROUTER_BIN and $FREEFLOW_GUEST_BIN
name others. Needs root, as guests do.

Exit status: 0 if every check passed, 1 if one failed, 130 after Ctrl-C or SIGTERM. Nothing is
left behind in any case.";

/// Runs unmodified RDMA programs in real guests, over virtual NICs of a router of their own.
///
/// Guests have nothing of ours in them but the kernel module: perftest, rdma-core and the rest are Debian's.
#[derive(Debug, Parser)]
#[command(name = "freeflow-e2e", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Two guests run perftest against each other; prints one table.
    Demo(DemoArgs),
    /// Every program and every flag in small runs, on both distributions and VMMs, and ends at bad moments (15 minutes).
    ///
    /// Prints a line for each check as it ends, with the output of what failed. The last line is `N passed, N failed`.
    Test(TestArgs),
    /// Libraries, programs and kernel users of RDMA between User-mode Linux guests, their data checked; prints a table.
    Apps(AppsArgs),
    /// rdma-core's own tests on the virtual NIC and on rxe, side by side, in User-mode Linux guests (5 minutes).
    ///
    /// Prints a table for each distribution. Fails where a test fails on the virtual NIC, or passes on rxe alone.
    Conformance(ConformanceArgs),
    /// The path over a host's RDMA NIC: in a User-mode Linux guest that plays the host, with rxe for the NIC.
    Nic(FilterArgs),
    /// The driver, whatever it can be made to do, in User-mode Linux guests whose kernel looks for its mistakes (half an hour and more).
    ///
    /// `make debug-kernel` has the launcher of guests take such a kernel (KASAN, lockdep, kmemleak); all waits are eight times as long then.
    Driver(FilterArgs),
    /// The full product of programs, flags, sizes, distributions and VMMs (hours).
    Matrix(MatrixArgs),
}

#[derive(Debug, Args)]
struct MatrixArgs {
    /// Only this part of the checks, to spread them over nights or machines: `2/40` is the second of forty.
    #[arg(long, value_name = "K/N")]
    part: Option<Part>,
    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Debug, Args)]
struct DemoArgs {
    /// What runs the guests.
    #[arg(long, value_enum, default_value = "qemu")]
    vmm: Vmm,
    /// The guests' user space, and with QEMU their kernel.
    #[arg(long, value_enum, default_value = "trixie")]
    distro: Distro,
    #[command(flatten)]
    hosts: HostsArgs,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct HostsArgs {
    /// Spread the guests over so many hosts: network namespaces, each with a router of its own, joined by a bridge.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=4))]
    hosts: u8,
    /// How several hosts know where virtual NICs are.
    #[arg(long, value_enum, default_value = "file")]
    directory: Source,
}

impl HostsArgs {
    fn layout(&self) -> Layout {
        Layout { directory: self.directory, ..Layout::on(self.hosts.into()) }
    }
}

#[derive(Debug, Args)]
struct AppsArgs {
    /// Only guests of this distribution.
    #[arg(long, value_enum)]
    distro: Option<Distro>,
    #[command(flatten)]
    hosts: HostsArgs,
    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Debug, Args)]
struct ConformanceArgs {
    /// Only guests of this distribution (bookworm has rdma-core 44, trixie 56).
    #[arg(long, value_enum)]
    distro: Option<Distro>,
    /// Only tests whose name matches, such as `test_mr.*`.
    #[arg(long, value_name = "PATTERN", default_value = "*")]
    tests: String,
    /// Print JSON instead of the tables.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct TestArgs {
    /// Each program once, between User-mode Linux guests, and ends at bad moments (2 minutes).
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    hosts: HostsArgs,
    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Debug, Args)]
struct FilterArgs {
    /// Only checks whose line contains this text, such as `uml-trixie`, `ib_send_lat` or `kill`.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Print all outcomes as JSON on standard output at the end.
    #[arg(long)]
    json: bool,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match interrupt::install().and_then(|()| run(&cli)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("freeflow-e2e: interrupted; guests and router are stopped");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("freeflow-e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<bool> {
    match &cli.command {
        Command::Demo(args) => {
            let mut reporter = Reporter::default();
            let kind = Kind::base(args.vmm, args.distro);
            println!("{}", demo::run(kind, args.hosts.layout(), args.json, &mut reporter)?);
            Ok(reporter.is_success())
        }
        Command::Test(args) => {
            let mut scenes = if args.quick { lists::quick() } else { lists::full() };
            for scene in &mut scenes {
                let wanted = args.hosts.layout();
                scene.layout = Layout { hosts: scene.layout.hosts.max(wanted.hosts), ..wanted };
            }
            run_scenes(&scenes, &args.filter)
        }
        Command::Nic(args) => run_scenes(&lists::nic(), args),
        Command::Driver(args) => run_scenes(&lists::driver(), args),
        Command::Apps(args) => run_apps(args),
        Command::Conformance(args) => run_conformance(args),
        Command::Matrix(args) => {
            let mut scenes = lists::matrix();
            if let Some(part) = args.part {
                part.keep(&mut scenes);
            }
            run_scenes(&scenes, &args.filter)
        }
    }
}

fn run_apps(args: &AppsArgs) -> Result<bool> {
    let mut reporter = Reporter::new(args.filter.filter.clone());
    for distro in Distro::value_variants().iter().filter(|distro| args.distro.is_none_or(|wanted| wanted == **distro)) {
        Scene { layout: args.hosts.layout(), ..apps::scene(*distro) }.run(&mut reporter)?;
    }
    if args.filter.json {
        println!("{}", serde_json::to_string_pretty(reporter.outcomes())?);
    } else {
        println!("{}", apps::table(reporter.outcomes()));
    }
    Ok(reporter.is_success())
}

fn run_conformance(args: &ConformanceArgs) -> Result<bool> {
    let mut reporter = Reporter::default();
    let mut found = Vec::new();
    for distro in Distro::value_variants().iter().filter(|distro| args.distro.is_none_or(|wanted| wanted == **distro)) {
        found.extend(conformance::against_rxe(*distro, &args.tests, &mut reporter)?);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        for comparison in &found {
            println!("{}", comparison.table());
        }
    }
    Ok(reporter.is_success())
}

fn run_scenes(scenes: &[Scene], args: &FilterArgs) -> Result<bool> {
    let mut reporter = Reporter::new(args.filter.clone());
    scenes.iter().try_for_each(|scene| scene.run(&mut reporter))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(reporter.outcomes())?);
    }
    let (passed, failed) = reporter.counts();
    if let (0, 0, Some(filter)) = (passed, failed, &args.filter) {
        bail!("no check has {filter:?} in its line; `freeflow-e2e test --quick` prints some");
    }
    println!("{passed} passed, {failed} failed");
    Ok(reporter.is_success())
}
