//! The data path alone: an in-process guest posts on one core, the worker runs on another.

use anyhow::Result;
use freeflow_router::config::EngineSettings;

use super::table::{Bar, Row};
use super::traffic::{Kind, Traffic};
use super::{RUNS, alternate, bulk, median};
use crate::bed::Bed;
use crate::guest::mem::Placement;
use crate::guest::verbs::{Qp, QpSpec, RcOptions, connect};
use crate::guest::{Guest, GuestConfig};
use crate::router::RouterSpec;
use crate::sys::{allowed_cores, pin_thread};

/// Operations of a latency run.
const LATENCY_COUNT: usize = 50_000;
/// Lists of a rate run.
const LISTS: usize = 20_000;

/// Cores of the poster and of the worker.
#[derive(Debug, Clone, Copy)]
pub struct Cores {
    /// The guest's.
    pub poster: usize,
    /// The device's.
    pub worker: usize,
}

impl Cores {
    /// Two different ones, if there are.
    pub fn find() -> Option<Self> {
        match allowed_cores()[..] {
            [poster, worker, ..] => Some(Self { poster, worker }),
            _ => None,
        }
    }
}

/// One worker that does not sleep between two measurements.
pub fn engine(cores: Cores) -> EngineSettings {
    EngineSettings { workers: 1, cores: vec![cores.worker], poll_us: 10_000, ..EngineSettings::default() }
}

/// Two guests on a router whose one worker polls all the time.
///
/// # Panics
/// When the router or a guest does not start.
pub fn bed(cores: Cores, memory_size: u64) -> Bed {
    let spec = RouterSpec { vectors: 1, engine: engine(cores), ..RouterSpec::of(2) };
    let config = GuestConfig { rings: Placement::Contiguous, memory_size, ..GuestConfig::default() };
    Bed::guests(&spec, &config)
}

/// Every row of this module.
///
/// # Errors
/// When a work request fails.
pub fn rows(cores: Option<Cores>) -> Result<Vec<Row>> {
    let Some(cores) = cores else {
        let why = "poster and worker need a core each";
        return Ok(vec![Row::not_measurable("in-process guest: latency, rate and bandwidth", why)]);
    };
    pin_thread(0, cores.poster)?;
    let bed = bed(cores, 256 << 20);
    let (a, b) = bed.two();
    let traffic = Traffic::between(a, b, 4096)?;
    let mut rows = vec![write_latency(&traffic)?, write_rate(&traffic)?];
    rows.extend(beside_write(&traffic)?);
    rows.extend(atomics(&traffic)?);
    rows.extend(bulk::rows(&bed, cores)?);
    Ok(rows)
}

fn write_latency(traffic: &Traffic) -> Result<Row> {
    let runs = (0..RUNS).map(|_| traffic.latency(Kind::Write, 64, LATENCY_COUNT)).collect::<Result<_>>()?;
    Ok(Row::at_most("in-process 64 B WRITE, post to completion, p50", median(runs), "us", 0.6).before("1 us"))
}

fn write_rate(traffic: &Traffic) -> Result<Row> {
    let runs = (0..RUNS).map(|_| traffic.rate(Kind::Write, LISTS)).collect::<Result<_>>()?;
    Ok(Row::at_least("in-process 8 B WRITE, one QP, lists of 32", median(runs), "M/s", 5.0).before("3 M/s"))
}

/// SEND into posted receives. One thread plays both sides, so that posting receives and taking their completions is part of the figure.
fn beside_write(traffic: &Traffic) -> Result<Vec<Row>> {
    let latency = |kind| traffic.latency(kind, 64, LATENCY_COUNT);
    let (value, other, ratio) = alternate(|| latency(Kind::Send), || latency(Kind::Write))?;
    let against = format!("WRITE {other:.3} us");
    let slow = Row::ratio("in-process 64 B SEND, p50", value, "us", &against, ratio, Bar::AtMost(1.5));
    let (value, other, ratio) = alternate(|| traffic.rate(Kind::Send, LISTS), || traffic.rate(Kind::Write, LISTS))?;
    let against = format!("WRITE {other:.2} M/s");
    let few = Row::ratio("in-process 8 B SEND, lists of 32", value, "M/s", &against, ratio, Bar::AtLeast(0.667));
    Ok(vec![slow, few])
}

fn atomics(traffic: &Traffic) -> Result<Vec<Row>> {
    let latency = |kind| traffic.latency(kind, 8, LATENCY_COUNT);
    let (value, other, ratio) = alternate(|| latency(Kind::FetchAdd), || latency(Kind::Read))?;
    let against = format!("READ {other:.3} us");
    let slow = Row::ratio("in-process 8 B fetch-and-add, p50", value, "us", &against, ratio, Bar::AtMost(1.2));
    let (value, other, ratio) = alternate(|| traffic.rate(Kind::FetchAdd, LISTS), || traffic.rate(Kind::Read, LISTS))?;
    let against = format!("READ {other:.2} M/s");
    let few = Row::ratio("in-process fetch-and-add, lists of 32", value, "M/s", &against, ratio, Bar::AtLeast(0.833));
    Ok(vec![slow, few])
}

/// This many connected pairs of QPs with small rings, to do nothing with. Those of one guest share a CQ and a protection domain.
///
/// # Errors
/// When one cannot be made.
pub fn idle_pairs(a: &Guest, b: &Guest, count: usize) -> Result<Vec<(Qp, Qp)>> {
    let spec = QpSpec { send_depth: 3, recv_depth: 3, inline: 0, ..QpSpec::rc() };
    let (pd_a, pd_b) = (a.alloc_pd()?, b.alloc_pd()?);
    let (cq_a, cq_b) = (a.create_cq(64)?, b.create_cq(64)?);
    let pair = |_| {
        let pair = (pd_a.create_qp(spec.clone(), &cq_a)?, pd_b.create_qp(spec.clone(), &cq_b)?);
        connect(&pair.0, &pair.1, &RcOptions::default())?;
        Ok(pair)
    };
    (0..count).map(pair).collect()
}
