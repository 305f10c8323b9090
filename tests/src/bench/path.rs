//! The data path alone: an in-process guest posts on one core, the worker runs on another.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use freeflow_router::config::EngineSettings;
use virtio_rdma::ib::{SendFlags, WcStatus};

use super::table::{Bar, Row};
use super::{RUNS, alternate, median};
use crate::bed::Bed;
use crate::guest::mem::{Placement, copy_between};
use crate::guest::verbs::{Op, Qp, QpSpec, Rc, RcOptions, SendWr, connect};
use crate::guest::{Guest, GuestConfig};
use crate::router::RouterSpec;
use crate::sys::{allowed_cores, pin_thread};

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

/// Two guests on a router whose one worker polls all the time.
///
/// # Panics
/// When the router or a guest does not start.
pub fn bed(cores: Cores, memory_size: u64) -> Bed {
    let engine = EngineSettings { workers: 1, cores: vec![cores.worker], poll_us: 10_000, ..EngineSettings::default() };
    let spec = RouterSpec { vectors: 1, engine, ..RouterSpec::of(2) };
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
        return Ok(vec![Row::not_measurable("in-process guest: latency, rate and bandwidth of WRITE", why)]);
    };
    pin_thread(0, cores.poster)?;
    let bed = bed(cores, 64 << 20);
    let pair = bed.pair(1 << 20);
    let latencies = (0..RUNS).map(|_| latency(&pair, 100_000)).collect::<Result<Vec<_>>>()?;
    let rates = (0..RUNS).map(|_| rate(&pair, 30_000)).collect::<Result<Vec<_>>>()?;
    let mut rows = vec![
        Row::at_most("in-process 64 B WRITE, post to completion, p50", median(latencies), "us", 1.0),
        Row::at_least("in-process 8 B WRITE, one QP, lists of 32", median(rates), "M/s", 3.0),
    ];
    for (name, size) in [("64 KiB", 64 << 10), ("1 MiB", 1 << 20)] {
        rows.push(bandwidth(&pair, cores, name, size)?);
    }
    rows.push(delay(&bed, &pair)?);
    Ok(rows)
}

/// How much longer 64 B WRITEs take while the same worker is busy with messages of 1.5 GiB of another QP: the
/// difference of the 99th percentiles.
fn delay(bed: &Bed, pair: &(Rc, Rc)) -> Result<Row> {
    const SGES: usize = 32;
    const PIECE: usize = 16 << 20;
    const TIMES: usize = 3;
    let (guest_a, guest_b) = bed.two();
    let spec = QpSpec::rc().sges(SGES as u16);
    let (big, sink) = Rc::pair_with(guest_a, guest_b, &spec, PIECE, &RcOptions::default())?;
    let (from, to) = ([big.mr.sge(0, PIECE); SGES], [sink.mr.sge(0, PIECE); SGES]);
    // Once without measuring: the router's first touch of each page is a page fault of its own.
    sink.qp.post_recv(0, &to)?;
    big.qp.post(SendWr::new(0, Op::Send, &from))?;
    complete(&big)?;
    let alone = percentile(latencies(pair, 20_000)?, 99);
    let mut delayed = Vec::new();
    // Half a gibibyte a message, several of them queued.
    for id in 0..TIMES as u64 {
        sink.qp.post_recv(id, &to)?;
        big.qp.post(SendWr::new(id, Op::Send, &from))?;
    }
    let mut left = TIMES;
    while left > 0 {
        delayed.extend(latencies(pair, 100)?);
        while let Some(wc) = big.cq.poll() {
            ensure!(wc.status() == WcStatus::Success, "a large message failed: {:?}", wc.status());
            left -= 1;
        }
    }
    let name = "in-process 64 B WRITE, p99 delay by another QP's 1.5 GiB";
    Ok(Row::at_most(name, percentile(delayed, 99) - alone, "us", 50.0))
}

fn percentile(mut figures: Vec<f64>, percent: usize) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[(figures.len() - 1) * percent / 100]
}

/// Median microseconds from posting a 64 B WRITE to its completion.
///
/// # Errors
/// When a work request fails.
pub fn latency(pair: &(Rc, Rc), count: usize) -> Result<f64> {
    latencies(pair, count).map(median)
}

fn latencies((a, b): &(Rc, Rc), count: usize) -> Result<Vec<f64>> {
    let sges = [a.mr.sge(0, 64)];
    let write = [SendWr::new(1, Op::Write(b.mr.remote(0)), &sges)];
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        a.qp.post_send(&write)?;
        complete(a)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

/// Waits for one completion.
fn complete(a: &Rc) -> Result<()> {
    loop {
        if let Some(wc) = a.cq.poll() {
            ensure!(wc.status() == WcStatus::Success, "a work request failed: {:?}", wc.status());
            return Ok(());
        }
        spin_loop();
    }
}

/// Million 8 B WRITEs a second, posted in lists of 32 with one completion each, three lists under way.
fn rate((a, b): &(Rc, Rc), lists: u32) -> Result<f64> {
    const LIST: u32 = 32;
    let sges = [a.mr.sge(0, 8)];
    let quiet = SendWr::new(1, Op::Write(b.mr.remote(0)), &sges).flags(SendFlags::empty());
    let mut list = [quiet; LIST as usize];
    list[LIST as usize - 1] = quiet.flags(SendFlags::SIGNALED);
    let start = Instant::now();
    for posted in 0..lists + 3 {
        if posted >= 3 {
            complete(a)?;
        }
        if posted < lists {
            a.qp.post_send(&list)?;
        }
    }
    Ok(f64::from(lists * LIST) / start.elapsed().as_secs_f64() / 1e6)
}

/// WRITE against one thread's memcpy on the worker's core, between the same buffers. The poster's core writes the source before every copy on both sides;
/// only the copy is timed.
fn bandwidth(pair: &(Rc, Rc), cores: Cores, name: &str, size: usize) -> Result<Row> {
    let count = (1 << 28) / size;
    let (value, other, ratio) =
        alternate(|| write_bandwidth(pair, size, count), || copy_bandwidth(pair, cores, size, count))?;
    let against = format!("memcpy {other:.1} GB/s");
    Ok(Row::ratio(&format!("in-process {name} WRITE"), value, "GB/s", &against, ratio, Bar::AtLeast(0.8)))
}

fn write_bandwidth((a, b): &(Rc, Rc), size: usize, count: usize) -> Result<f64> {
    let sges = [a.mr.sge(0, size)];
    let write = [SendWr::new(1, Op::Write(b.mr.remote(0)), &sges)];
    let mut spent = Duration::ZERO;
    for turn in 0..count {
        a.mr.fill(0, size, turn as u8);
        let start = Instant::now();
        a.qp.post_send(&write)?;
        complete(a)?;
        spent += start.elapsed();
    }
    Ok(gigabytes_a_second(size, count, spent))
}

fn copy_bandwidth((a, b): &(Rc, Rc), cores: Cores, size: usize, count: usize) -> Result<f64> {
    let (turn, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let spent = std::thread::scope(|scope| {
        let copier = scope.spawn(|| {
            // The router's worker polls on this core too: it is asleep by now or gets out of the way, see `rows`.
            pin_thread(0, cores.worker).map(|()| copy_on_demand((a, b), size, count as u64, &turn, &done))
        });
        for now in 1..=count as u64 {
            a.mr.fill(0, size, now as u8);
            turn.store(now, Ordering::Release);
            while done.load(Ordering::Acquire) != now {
                spin_loop();
            }
        }
        copier.join().expect("the copier ends")
    })?;
    Ok(gigabytes_a_second(size, count, spent))
}

fn copy_on_demand((a, b): (&Rc, &Rc), size: usize, count: u64, turn: &AtomicU64, done: &AtomicU64) -> Duration {
    let mut spent = Duration::ZERO;
    for now in 1..=count {
        while turn.load(Ordering::Acquire) != now {
            spin_loop();
        }
        let start = Instant::now();
        copy_between(a.mr.buf(), b.mr.buf(), size);
        spent += start.elapsed();
        done.store(now, Ordering::Release);
    }
    spent
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn gigabytes_a_second(size: usize, count: usize, spent: Duration) -> f64 {
    (size * count) as f64 / spent.as_secs_f64() / 1e9
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
