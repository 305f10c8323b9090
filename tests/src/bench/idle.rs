//! What idle QPs cost: processor time, memory of the router, and latency of a busy QP beside them.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::path::{Cores, bed, idle_pairs};
use super::table::{Bar, Row};
use super::traffic::{Kind, Traffic};
use super::{RUNS, median};
use crate::e2e::child::{Owned, sibling};
use crate::e2e::interrupt::{check, wait_for};
use crate::guest::mem::Placement;
use crate::guest::verbs::MrSpec;
use crate::guest::{Guest, GuestConfig};
use crate::sys::pin_thread;

/// Guest memory that holds thousands of QPs with small rings, their buffers and CQs.
const MEMORY: u64 = 1 << 30;
/// Objects whose memory is measured.
const CQS: usize = 5_000;
const REGIONS: usize = 100_000;

/// Every row of this module.
///
/// # Errors
/// When the router or a guest fails.
pub fn rows(cores: Option<Cores>) -> Result<Vec<Row>> {
    let mut rows = router_rows()?;
    rows.push(beside_idle(cores, 10_000)?);
    Ok(rows)
}

/// Latency with idle QPs beside the busy one, against that with none, in turn.
fn beside_idle(cores: Option<Cores>, count: usize) -> Result<Row> {
    let name = "in-process 64 B WRITE p50, 10,000 idle QPs beside";
    let Some(cores) = cores else {
        return Ok(Row::not_measurable(name, "poster and worker need a core each"));
    };
    pin_thread(0, cores.poster)?;
    let (mut values, mut ratios, mut others) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        check()?;
        let bed = bed(cores, MEMORY);
        let busy = Traffic::between(&bed.guests[0], &bed.guests[1], 64)?;
        let alone = busy.latency(Kind::Write, 64, 50_000)?;
        let idle = idle_pairs(&bed.guests[0], &bed.guests[1], count)?;
        let beside = busy.latency(Kind::Write, 64, 50_000)?;
        drop(idle);
        values.push(beside);
        others.push(alone);
        ratios.push(beside / alone);
    }
    let against = format!("with none {:.3} us", median(others));
    Ok(Row::ratio(name, median(values), "us", &against, median(ratios), Bar::AtMost(1.1)))
}

/// A router in a process of its own, so that its memory and time are its own.
struct Daemon {
    process: Owned,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut command = Command::new(sibling("FREEFLOW_ROUTER_BIN", "freeflow-router")?);
        command.arg("--control").arg(dir.path().join("control")).arg("--state").arg(dir.path().join("nics.toml"));
        command.stderr(Stdio::null());
        for (name, ip) in [("a", "10.0.0.1"), ("b", "10.0.0.2")] {
            command.args(["--nic", &format!("name={name},ip={ip},socket={}", dir.path().join(name).display())]);
        }
        let daemon = Self { process: Owned::spawn(&mut command)?, dir };
        let control = daemon.dir.path().join("control");
        wait_for("freeflow-router's start", Duration::from_secs(10), || Ok(control.exists().then_some(())))?;
        Ok(daemon)
    }

    fn guest(&self, nic: usize) -> Result<Guest> {
        let name = ["a", "b"][nic];
        let gids = vec![crate::guest::verbs::ip_gid(std::net::Ipv4Addr::new(10, 0, 0, nic as u8 + 1).into())];
        let config = GuestConfig { memory_size: MEMORY, gids, rings: Placement::Contiguous, memory: None, declined: 0 };
        Ok(Guest::connect(&self.dir.path().join(name), config)?)
    }

    fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.process.id()))
    }

    /// Bytes of memory that are the router's own.
    fn memory(&self) -> Result<f64> {
        let status = std::fs::read_to_string(self.proc("status"))?;
        let line = status.lines().find(|l| l.starts_with("RssAnon:")).context("no RssAnon")?;
        let kib: f64 = line.split_whitespace().nth(1).context("no figure")?.parse()?;
        Ok(kib * 1024.0)
    }

    /// Seconds of processor time used so far, from the scheduler's nanoseconds of each thread.
    fn time(&self) -> Result<f64> {
        let mut nanos = 0.0;
        for thread in std::fs::read_dir(self.proc("task"))? {
            let text = std::fs::read_to_string(thread?.path().join("schedstat"))?;
            nanos += text.split_whitespace().next().and_then(|n| n.parse::<f64>().ok()).context("no schedstat")?;
        }
        Ok(nanos / 1e9)
    }
}

/// Bytes of the router's memory that each of some objects takes, and the objects, so that others do not get what they leave.
#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn each<T>(daemon: &Daemon, count: usize, make: impl FnOnce() -> Result<Vec<T>>) -> Result<(f64, Vec<T>)> {
    let before = daemon.memory()?;
    let objects = make()?;
    Ok(((daemon.memory()? - before) / count as f64, objects))
}

fn router_rows() -> Result<Vec<Row>> {
    let daemon = Daemon::start()?;
    let (a, b) = (daemon.guest(0)?, daemon.guest(1)?);
    let first = idle_pairs(&a, &b, 500)?;
    std::thread::sleep(Duration::from_millis(200));
    let (time, start) = (daemon.time()?, Instant::now());
    std::thread::sleep(Duration::from_secs(5));
    let share = (daemon.time()? - time) / start.elapsed().as_secs_f64() * 100.0;
    let before = daemon.memory()?;
    let more = idle_pairs(&a, &b, 4_500)?;
    let each_qp = (daemon.memory()? - before) / 9_000.0;
    let (each_cq, cqs) = each(&daemon, CQS, || (0..CQS).map(|_| Ok(a.create_cq(63)?)).collect::<Result<Vec<_>>>())?;
    let pd = b.alloc_pd()?;
    let page = MrSpec::whole(&b.alloc(4096)?);
    let (each_mr, regions) = each(&daemon, REGIONS, || Ok(pd.reg_many(&page, REGIONS)?))?;
    drop((first, more, cqs, regions));
    Ok(vec![
        Row::plain("memory of the router per CQ of 63 entries", each_cq, "B"),
        Row::plain("memory of the router per memory region of one extent", each_mr, "B"),
        Row::at_most("router with 1,000 connected idle QPs, share of a core", share, "%", 1.0),
        Row::at_most("memory of the router per idle QP", each_qp, "B", 4096.0),
    ])
}
