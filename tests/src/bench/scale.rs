//! Many objects: setting up thousands of QPs, how the rate holds with thousands of them active, regions by the hundred thousand, and
//! many virtual NICs.

use std::time::Instant;

use anyhow::{Result, ensure};
use virtio_rdma::ib::WcStatus;

use super::path::{Cores, bed, engine};
use super::table::{Bar, Row};
use super::traffic::{Kind, LIST, Traffic, WINDOW, list, per_microsecond};
use super::{RUNS, alternate, median, percentile};
use crate::bed::Bed;
use crate::guest::mem::Placement;
use crate::guest::verbs::{Cq, Mr, MrSpec, Op, Pd, Qp, QpSpec, RcOptions, SendWr, connect_side};
use crate::guest::{Guest, GuestConfig};
use crate::router::RouterSpec;
use crate::sys::pin_thread;

/// QPs of the largest fleet.
const MANY: usize = 10_000;
/// Memory regions.
const REGIONS: usize = 100_000;
/// Virtual NICs.
const NICS: usize = 64;

/// Every row of this module.
///
/// # Errors
/// When something cannot be made, or a work request fails.
pub fn rows(cores: Option<Cores>) -> Result<Vec<Row>> {
    let Some(cores) = cores else {
        return Ok(vec![Row::not_measurable("in-process guest: scale", "poster and worker need a core each")]);
    };
    pin_thread(0, cores.poster)?;
    let mut rows = fleets(cores)?;
    rows.extend(regions(cores)?);
    rows.extend(nics(cores)?);
    Ok(rows)
}

/// QPs of one guest that are connected to as many of another, and share a CQ.
pub struct Fleet {
    qps: Vec<Qp>,
    cq: Cq,
    mr: Mr,
    _peers: Vec<Qp>,
    target: Mr,
}

impl Fleet {
    /// Makes them, and says how long creating and connecting the first guest's took, in seconds.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn between(a: &Guest, b: &Guest, count: usize) -> Result<(Self, f64)> {
        let o = RcOptions::default();
        let idle = QpSpec { send_depth: 3, recv_depth: 3, inline: 0, ..QpSpec::rc() };
        let active = QpSpec { send_depth: (WINDOW * LIST) as u32, ..idle.clone() };
        let (pd_a, pd_b) = (a.alloc_pd()?, b.alloc_pd()?);
        let (cq, cq_b) = (a.create_cq((WINDOW * count) as u32)?, b.create_cq(64)?);
        let peers = pd_b.create_qps(&idle, &cq_b, count)?;
        let start = Instant::now();
        let qps = pd_a.create_qps(&active, &cq, count)?;
        connect_side(&qps, &peers, &o)?;
        let took = start.elapsed().as_secs_f64();
        connect_side(&peers, &qps, &o)?;
        let (mr, target) = (pd_a.reg_new(4096)?, pd_b.reg_new(4096)?);
        Ok((Self { qps, cq, mr, _peers: peers, target }, took))
    }

    /// Million 8 B WRITEs a second over the first `active` QPs in turn, in lists, as many under way on each as [`Traffic::rate`] has.
    ///
    /// # Errors
    /// When a work request fails.
    pub fn rate(&self, active: usize, lists: usize) -> Result<f64> {
        let from = [self.mr.sge(0, 8)];
        let mut list = list(SendWr::new(0, Op::Write(self.target.remote(0)), &from));
        let mut pending = vec![0usize; active];
        let (mut posted, mut done, mut turn) = (0, 0, 0);
        let start = Instant::now();
        while done < lists {
            if posted < lists && pending[turn] < WINDOW {
                list[LIST - 1].wr_id = turn as u64;
                self.qps[turn].post_send(&list)?;
                pending[turn] += 1;
                posted += 1;
                turn = (turn + 1) % active;
            }
            while let Some(wc) = self.cq.poll() {
                ensure!(wc.status() == WcStatus::Success, "a work request failed: {:?}", wc.status());
                pending[wc.wr_id() as usize] -= 1;
                done += 1;
            }
        }
        Ok(per_microsecond(lists * LIST, start))
    }
}

/// Set-up, and the rate by the number of active QPs.
fn fleets(cores: Cores) -> Result<Vec<Row>> {
    let mut took = Vec::new();
    for _ in 0..RUNS {
        let bed = bed(cores, 1 << 30);
        took.push(Fleet::between(&bed.guests[0], &bed.guests[1], MANY)?.1);
        forget(&bed);
    }
    let name = "10,000 QPs created and brought to RTS, commands in a pipeline";
    let mut rows = vec![Row::at_most(name, median(took), "s", 1.0)];

    let bed = bed(cores, 1 << 30);
    let (fleet, _) = Fleet::between(&bed.guests[0], &bed.guests[1], MANY)?;
    // Once without measuring: the first touch of each ring is a page fault of the router's.
    fleet.rate(MANY, 4 * MANY)?;
    let name = |qps: &str| format!("in-process 8 B WRITE, {qps} active, one worker");
    for (qps, active) in [("1 QP", 1), ("100 QPs", 100), ("1,000 QPs", 1_000)] {
        let runs = (0..RUNS).map(|_| fleet.rate(active, 20_000)).collect::<Result<_>>()?;
        rows.push(Row::plain(&name(qps), median(runs), "M/s"));
    }
    let (many, few, ratio) = alternate(|| fleet.rate(MANY, 40_000), || fleet.rate(16, 40_000))?;
    rows.insert(2, Row::at_least(&name("16 QPs"), few, "M/s", 8.0));
    let against = format!("16 QPs {few:.2} M/s");
    rows.push(Row::ratio(&name("10,000 QPs"), many, "M/s", &against, ratio, Bar::AtLeast(0.5)));
    forget(&bed);
    Ok(rows)
}

/// Lets the guests go as one that is killed does, which is quicker than taking down each object.
fn forget(bed: &Bed) {
    bed.guests.iter().for_each(Guest::disconnect);
}

/// Registration by the hundred thousand, and what so many cost a work request.
fn regions(cores: Cores) -> Result<Vec<Row>> {
    let (mut rates, mut values, mut others, mut ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let bed = bed(cores, 256 << 20);
        let traffic = Traffic::between(&bed.guests[0], &bed.guests[1], 4096)?;
        let few = traffic.latency(Kind::Write, 64, 20_000)?;
        let start = Instant::now();
        let regions = register(&traffic.b.pd, REGIONS)?;
        rates.push(per_microsecond(REGIONS, start) * 1e3);
        let many = traffic.latency(Kind::Write, 64, 20_000)?;
        values.push(many);
        others.push(few);
        ratios.push(many / few);
        forget(&bed);
        drop(regions);
    }
    let against = format!("with none {:.3} us", median(others));
    let name = "in-process 64 B WRITE p50, 100,000 memory regions beside";
    Ok(vec![
        Row::plain("memory regions of 4 KiB registered, commands in a pipeline", median(rates), "thousand/s"),
        Row::ratio(name, median(values), "us", &against, median(ratios), Bar::AtMost(1.1)),
    ])
}

/// This many regions over the same page.
fn register(pd: &Pd, count: usize) -> Result<Vec<Mr>> {
    let buf = pd.guest().alloc(4096)?;
    Ok(pd.reg_many(&MrSpec::whole(&buf), count)?)
}

/// Latency of one pair of virtual NICs while the worker serves many more, against the same with no others. A post that comes just after
/// the worker has looked waits for a whole round: the 90th percentile is such a one, while the median may be of either kind.
fn nics(cores: Cores) -> Result<Vec<Row>> {
    let start = |nics| {
        let spec = RouterSpec { vectors: 1, engine: engine(cores), ..RouterSpec::of(nics) };
        let config = GuestConfig { rings: Placement::Contiguous, memory_size: 16 << 20, ..GuestConfig::default() };
        Bed::guests(&spec, &config)
    };
    let latency = |bed: &Bed, percent| -> Result<f64> {
        let traffic = Traffic::between(&bed.guests[0], &bed.guests[1], 4096)?;
        Ok(percentile(traffic.latencies(Kind::Write, 64, 20_000)?, percent))
    };
    let row = |percent| {
        let (many, few, ratio) = alternate(|| latency(&start(NICS), percent), || latency(&start(2), percent))?;
        let name = format!("in-process 64 B WRITE p{percent}, {NICS} virtual NICs on the worker");
        Ok(Row::versus(&name, many, "us", &format!("with 2 {few:.3} us"), ratio))
    };
    [50, 90].into_iter().map(row).collect()
}
