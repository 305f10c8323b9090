//! Many bytes: bandwidth of WRITE beside one thread's memcpy, and how long a small WRITE waits beside a large message.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Instant;

use anyhow::Result;

use super::path::Cores;
use super::table::{Bar, Row};
use super::traffic::{Kind, Traffic, complete};
use super::{RUNS, alternate, median, percentile};
use crate::bed::Bed;
use crate::guest::mem::copy_between;
use crate::guest::verbs::{Mr, Op, QpSpec, Rc, RcOptions, SendWr};
use crate::sys::pin_thread;

/// WRITEs of these sizes, and what share of memcpy they must reach.
const SIZES: [(&str, usize, f64); 2] = [("64 KiB", 64 << 10, 0.85), ("1 MiB", 1 << 20, 0.9)];

/// Every row of this module.
///
/// # Errors
/// When a work request fails.
pub fn rows(bed: &Bed, cores: Cores) -> Result<Vec<Row>> {
    let (a, b) = bed.two();
    let traffic = Traffic::between(a, b, 1 << 20)?;
    let mut rows = Vec::new();
    for size in SIZES {
        rows.extend(beside_memcpy(&traffic, cores, size)?);
    }
    rows.push(delay(bed, &traffic)?);
    Ok(rows)
}

/// The row that has a bar is of medians, ours from posting to completion and memcpy's of the copy alone. The others say what that choice
/// does: memcpy timed as we are, from handing the copy to the other core to hearing that it is done, and means of all copies, in which
/// a few that were interrupted can outweigh the rest.
fn beside_memcpy(traffic: &Traffic, cores: Cores, (name, size, bar): (&str, usize, f64)) -> Result<Vec<Row>> {
    // Fewer copies of the larger one, as many bytes.
    let count = (1 << 28) / size;
    let compare = |middle: fn(Vec<f64>) -> f64, theirs: fn(Copies) -> Vec<f64>| {
        alternate(
            || Ok(gigabytes_a_second(size, middle(write_times(traffic, size, count)?))),
            || Ok(gigabytes_a_second(size, middle(theirs(copy_times(traffic, cores, size, count)?)))),
        )
    };
    let name = format!("in-process {name} WRITE");
    let (value, other, ratio) = compare(median, |copies| copies.alone)?;
    let bar = Bar::AtLeast(bar);
    let row = Row::ratio(&name, value, "GB/s", &format!("memcpy {other:.1} GB/s"), ratio, bar).before("0.8");
    let (value, other, ratio) = compare(median, |copies| copies.handed_over)?;
    let against = format!("memcpy {other:.1} GB/s");
    let same_clock = Row::versus(&format!("{name}, memcpy by the poster's clock too"), value, "GB/s", &against, ratio);
    let (value, other, ratio) = compare(mean, |copies| copies.alone)?;
    let against = format!("memcpy {other:.1} GB/s");
    let total = Row::versus(&format!("{name}, by the total of all copies"), value, "GB/s", &against, ratio);
    Ok(vec![row, same_clock, total])
}

/// Seconds of each WRITE, posting to completion. The poster writes the source before each, which is not timed.
fn write_times(Traffic { a, b }: &Traffic, size: usize, count: usize) -> Result<Vec<f64>> {
    let sges = [a.mr.sge(0, size)];
    let write = [SendWr::new(1, Op::Write(b.mr.remote(0)), &sges)];
    let mut times = Vec::with_capacity(count);
    for turn in 0..count {
        a.mr.fill(0, size, turn as u8);
        // Stores that still wait to be done are the writer's, not the WRITE's.
        fence(Ordering::SeqCst);
        let start = Instant::now();
        a.qp.post_send(&write)?;
        complete(&a.cq)?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok(times)
}

/// Seconds that one thread's memcpy took, each time.
struct Copies {
    /// The copy alone, by the clock of the core that copies.
    alone: Vec<f64>,
    /// With the hand-over to that core and back, by the clock of the one that asks for it.
    handed_over: Vec<f64>,
}

/// The same bytes moved by one thread's memcpy on the worker's core.
fn copy_times(Traffic { a, b }: &Traffic, cores: Cores, size: usize, count: usize) -> Result<Copies> {
    let (turn, done) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let copier = scope.spawn(|| {
            // The router's worker polls on this core too, and sleeps 10 ms after its last work.
            pin_thread(0, cores.worker).map(|()| copy_on_demand((&a.mr, &b.mr), size, count as u64, &turn, &done))
        });
        let ask = |now| {
            a.mr.fill(0, size, now as u8);
            fence(Ordering::SeqCst);
            let start = Instant::now();
            turn.store(now, Ordering::Release);
            while done.load(Ordering::Acquire) != now {
                spin_loop();
            }
            start.elapsed().as_secs_f64()
        };
        let handed_over = (1..=count as u64).map(ask).collect();
        Ok(Copies { alone: copier.join().expect("the copier ends")?, handed_over })
    })
}

fn copy_on_demand((from, to): (&Mr, &Mr), size: usize, count: u64, turn: &AtomicU64, done: &AtomicU64) -> Vec<f64> {
    let copy = |now| {
        while turn.load(Ordering::Acquire) != now {
            spin_loop();
        }
        let start = Instant::now();
        copy_between(from.buf(), to.buf(), size);
        let time = start.elapsed().as_secs_f64();
        done.store(now, Ordering::Release);
        time
    };
    (1..=count).map(copy).collect()
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn gigabytes_a_second(size: usize, seconds: f64) -> f64 {
    size as f64 / seconds / 1e9
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn mean(times: Vec<f64>) -> f64 {
    let count = times.len() as f64;
    times.into_iter().sum::<f64>() / count
}

/// The 99th percentile of a 64 B WRITE while the same worker is busy with one message of 1.5 GiB of another QP.
fn delay(bed: &Bed, small: &Traffic) -> Result<Row> {
    const SGES: usize = 32;
    const PIECE: usize = 48 << 20;
    let (a, b) = bed.two();
    let spec = QpSpec::rc().sges(SGES as u16);
    let (big, sink) = Rc::pair_with(a, b, &spec, PIECE, &RcOptions::default())?;
    let (from, to) = ([big.mr.sge(0, PIECE); SGES], [sink.mr.sge(0, PIECE); SGES]);
    let begin = || -> Result<()> {
        sink.qp.post_recv(0, &to)?;
        Ok(big.qp.post(SendWr::new(0, Op::Send, &from))?)
    };
    // Once without measuring: the router's first touch of each page is a page fault of its own.
    begin()?;
    complete(&big.cq)?;
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        begin()?;
        let mut times = Vec::new();
        while !big.cq.ring().has_element() {
            times.extend(small.latencies(Kind::Write, 64, 20)?);
        }
        complete(&big.cq)?;
        complete(&sink.cq)?;
        runs.push(percentile(times, 99));
    }
    let name = "in-process 64 B WRITE beside another QP's 1.5 GiB message, p99";
    Ok(Row::at_most(name, median(runs), "us", 50.0))
}
