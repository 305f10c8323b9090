//! The main job: two guests run perftest against each other over their virtual RDMA NICs, and one table tells how it went.

use std::time::Instant;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};

use super::apps;
use super::bed::Bed;
use super::guest::Kind;
use super::hosts::Layout;
use super::pair;
use super::perf::{Perf, Pingpong, PingpongKind, Program, Row, TOOLS};
use super::rdma_cm::RPING;
use super::report::{Figure, Outcome, Reporter};

/// What it runs: small numbers, so that emulation shows it too.
fn programs() -> Vec<Program> {
    let pingpong = |kind, size| Pingpong { kind, size, iterations: 100, events: false };
    let perf = TOOLS.map(|tool| match (tool.is_bandwidth(), tool.is_datagram()) {
        (true, false) => Perf::new(tool, 65_536, 200),
        (true, true) => Perf::new(tool, 1024, 200),
        (false, _) => Perf::new(tool, 64, 50),
    });
    let mut programs: Vec<Program> = perf.map(Program::from).to_vec();
    programs.extend([pingpong(PingpongKind::Rc, 4096), pingpong(PingpongKind::Ud, 1024)].map(Program::from));
    programs
}

/// Runs the demonstration; what to print on standard output.
pub fn run(kind: Kind, layout: Layout, json: bool, reporter: &mut Reporter) -> Result<String> {
    kind.prepare()?;
    let hosts = layout.hosts;
    let guests = hosts.max(2);
    match hosts {
        1 => eprintln!("starting a router and two guests ({kind})"),
        _ => eprintln!("starting {layout}, each with a router and a guest ({kind})"),
    }
    let start = Instant::now();
    let bed = Bed::start(&vec![kind; guests], 1, layout)?;
    eprintln!("the guests are up after {:.0} s", start.elapsed().as_secs_f64());
    let place = if hosts == 1 { format!("{kind}, two guests") } else { format!("{kind}, on {layout}") };
    for (turn, program) in programs().into_iter().enumerate() {
        // Each program to the next guest.
        let client = 1 + turn % (guests - 1);
        reporter
            .check(&place, &program.label(), || Ok(Some(Figure::of(&program, measure(&bed, client, &program)?))))?;
    }
    for client in if hosts == 1 { 0..0 } else { 1..guests } {
        reporter.check(&place, RPING.name, || apps::run(&bed, (0, client), &RPING))?;
    }
    drop(bed);
    eprintln!("done after {:.0} s", start.elapsed().as_secs_f64());
    Ok(if json { serde_json::to_string_pretty(reporter.outcomes())? } else { table(reporter.outcomes()) })
}

/// Runs a program, again when it says that it could not measure.
fn measure(bed: &Bed, client: usize, program: &Program) -> Result<Row> {
    let mut row = pair::run(bed.guest(0)?, bed.guest(client)?, program)?;
    for _ in 0..3 {
        if row.is_measured() {
            break;
        }
        row = pair::run(bed.guest(0)?, bed.guest(client)?, program)?;
    }
    Ok(row)
}

fn table(outcomes: &[Outcome]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY).set_header(["test", "size", "latency or bandwidth", ""]);
    for outcome in outcomes {
        let size = outcome.size.map(|size| format!("{size} B")).unwrap_or_default();
        table.add_row([outcome.test.clone(), size, outcome.figure(), outcome.verdict().to_owned()]);
    }
    for column in table.column_iter_mut().skip(1).take(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}
