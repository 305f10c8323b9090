//! `freeflow top`: what virtual NICs and their queue pairs do now, again and again.

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use comfy_table::Table;
use freeflow_backend::nic::meters::PathFigures;
use freeflow_backend::{NicStatus, QpStatus};
use serde::Serialize;

use super::guest_of;
use crate::api;

/// Clears the screen and goes to its top left (ECMA-48: ED, CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";

#[derive(Debug, Args)]
pub struct Top {
    /// Seconds between two looks.
    #[arg(long, short, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
    interval: f64,
    /// End after so many looks [default: when interrupted].
    #[arg(long, short, value_name = "N")]
    count: Option<u64>,
    /// Most queue pairs to show, the busiest first.
    #[arg(long, value_name = "N", default_value_t = 20)]
    qps: usize,
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    if (0.05..=3600.0).contains(&value) { Ok(value) } else { Err("from 0.05 to 3600 seconds".to_owned()) }
}

/// What a router had at one moment.
#[derive(Debug)]
struct Sample {
    at: Instant,
    nics: Vec<NicStatus>,
    qps: Vec<QpStatus>,
}

impl Sample {
    fn take(control: &Path) -> Result<Self> {
        Ok(Self { at: Instant::now(), nics: api::nics(control)?, qps: api::qps(control)? })
    }
}

/// Rates between two moments.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Look {
    seconds: f64,
    nics: Vec<NicRates>,
    paths: Vec<PathRates>,
    qps: Vec<QpRates>,
}

/// Of a virtual NIC, per second.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct NicRates {
    nic: String,
    tenant: String,
    guest: &'static str,
    qps: usize,
    ops: f64,
    bytes: f64,
    receives: f64,
    errors: f64,
    rnr_waits: f64,
    lost_waits: f64,
    rate_waits: f64,
}

/// Of all sends of a virtual NIC that go one way, per second.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct PathRates {
    nic: String,
    #[serde(rename = "type")]
    class: String,
    path: String,
    host: Option<String>,
    ops: f64,
    bytes: f64,
    failures: f64,
    /// Seconds in which half of them were complete, and 99 of 100; none where none was timed, or they took longer than what is told apart.
    p50: Option<f64>,
    p99: Option<f64>,
}

/// Of a queue pair, per second.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct QpRates {
    nic: String,
    qpn: u32,
    kind: String,
    state: String,
    peer: Option<String>,
    path: Option<String>,
    waiting: Option<String>,
    ops: f64,
    bytes: f64,
}

impl Top {
    /// Looks until it has looked often enough, or nobody reads it any more.
    ///
    /// # Errors
    /// When the router cannot be asked.
    pub fn run(&self, control: &Path, json: bool) -> Result<()> {
        let mut before = Sample::take(control)?;
        let mut looks = 0;
        while self.count.is_none_or(|count| looks < count) {
            sleep(Duration::from_secs_f64(self.interval));
            let now = Sample::take(control)?;
            let look = compare(&before, &now, self.qps);
            let text = if json { serde_json::to_string(&look)? } else { format!("{look}\n") };
            match show(&text, !json && self.count.is_none()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                shown => shown?,
            }
            (before, looks) = (now, looks + 1);
        }
        Ok(())
    }
}

fn show(text: &str, live: bool) -> io::Result<()> {
    let mut out = io::stdout();
    if live && out.is_terminal() {
        write!(out, "{CLEAR}")?;
    }
    writeln!(out, "{text}")?;
    out.flush()
}

fn compare(before: &Sample, now: &Sample, most: usize) -> Look {
    let seconds = (now.at - before.at).as_secs_f64();
    // A virtual NIC that was made anew begins at zero again.
    #[expect(clippy::cast_precision_loss, reason = "for people, and three digits of it")]
    let rate = |before: u64, now: u64| now.saturating_sub(before) as f64 / seconds;
    let known: HashMap<_, _> = before.nics.iter().map(|nic| (nic.id, &nic.counters)).collect();
    let nics = now.nics.iter().map(|nic| {
        let (then, now) = (known.get(&nic.id).copied().cloned().unwrap_or_default(), &nic.counters);
        NicRates {
            nic: nic.config.name.clone(),
            tenant: nic.config.tenant.clone(),
            guest: guest_of(nic),
            qps: nic.objects.qps,
            ops: rate(then.send_wqes, now.send_wqes),
            bytes: rate(then.send_bytes, now.send_bytes),
            receives: rate(then.recv_wqes, now.recv_wqes),
            errors: rate(then.errors, now.errors),
            rnr_waits: rate(then.rnr_waits, now.rnr_waits),
            lost_waits: rate(then.lost_waits, now.lost_waits),
            rate_waits: rate(then.rate_waits, now.rate_waits),
        }
    });
    let known: HashMap<_, _> = before.qps.iter().map(|qp| ((&qp.nic, qp.qpn), (qp.completed, qp.bytes))).collect();
    let mut qps: Vec<_> = now
        .qps
        .iter()
        .map(|qp| {
            let (completed, bytes) = known.get(&(&qp.nic, qp.qpn)).copied().unwrap_or_default();
            QpRates {
                nic: qp.nic.clone(),
                qpn: qp.qpn,
                kind: qp.kind.clone(),
                state: qp.state.clone(),
                peer: qp.remote_gid.as_ref().zip(qp.remote_qpn).map(|(gid, qpn)| format!("{gid} {qpn:#08x}")),
                path: qp.path.clone(),
                waiting: qp.waiting.clone(),
                ops: rate(completed, qp.completed),
                bytes: rate(bytes, qp.bytes),
            }
        })
        .collect();
    // What waits is as interesting as what works.
    qps.retain(|qp| qp.ops > 0.0 || qp.waiting.is_some());
    qps.sort_by(|a, b| b.bytes.total_cmp(&a.bytes).then(b.ops.total_cmp(&a.ops)));
    qps.truncate(most);
    Look { seconds, nics: nics.collect(), paths: paths(before, now, rate), qps }
}

/// What went where meanwhile.
fn paths(before: &Sample, now: &Sample, rate: impl Fn(u64, u64) -> f64) -> Vec<PathRates> {
    fn of(sample: &Sample) -> impl Iterator<Item = (&NicStatus, &PathFigures)> {
        sample.nics.iter().flat_map(|nic| nic.paths.iter().map(move |path| (nic, path)))
    }
    let key = |nic: &NicStatus, path: &PathFigures| (nic.id, path.class.clone(), path.path.clone(), path.host.clone());
    let known: HashMap<_, _> = of(before).map(|(nic, path)| (key(nic, path), path)).collect();
    let none = PathFigures::default();
    let rates = of(now).map(|(nic, path)| {
        let then = known.get(&key(nic, path)).copied().unwrap_or(&none);
        let latency = path.latency.since(&then.latency);
        PathRates {
            nic: nic.config.name.clone(),
            class: path.class.clone(),
            path: path.path.clone(),
            host: path.host.clone(),
            ops: rate(then.wqes, path.wqes),
            bytes: rate(then.bytes, path.bytes),
            failures: rate(then.failed.values().sum(), path.failed.values().sum()),
            p50: latency.quantile(0.5).map(|time| time.as_secs_f64()),
            p99: latency.quantile(0.99).map(|time| time.as_secs_f64()),
        }
    });
    let mut rates: Vec<_> = rates.filter(|path| path.ops > 0.0).collect();
    rates.sort_by(|a, b| b.bytes.total_cmp(&a.bytes).then(b.ops.total_cmp(&a.ops)));
    rates
}

impl std::fmt::Display for Look {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}\n", self.nics().trim_fmt())?;
        writeln!(f, "{}\n", self.paths().trim_fmt())?;
        write!(f, "{}", self.qps().trim_fmt())
    }
}

impl Look {
    fn nics(&self) -> Table {
        let mut table = super::table(&[
            "NIC",
            "TENANT",
            "GUEST",
            "QPS",
            "OPS/S",
            "BYTES/S",
            "RECEIVES/S",
            "ERRORS/S",
            "RNR/S",
            "LOST/S",
            "HELD/S",
        ]);
        for nic in &self.nics {
            let rates = [nic.ops, nic.bytes, nic.receives, nic.errors, nic.rnr_waits, nic.lost_waits, nic.rate_waits];
            let names = [nic.nic.clone(), nic.tenant.clone(), nic.guest.to_owned(), nic.qps.to_string()];
            table.add_row(names.into_iter().chain(rates.map(short)));
        }
        table
    }

    fn paths(&self) -> Table {
        let mut table =
            super::table(&["NIC", "TYPE", "PATH", "HOST", "OPS/S", "BYTES/S", "FAILURES/S", "P50 <=", "P99 <="]);
        for path in &self.paths {
            let words = [path.nic.clone(), path.class.clone(), path.path.clone()];
            let host = path.host.clone().unwrap_or_else(|| "-".to_owned());
            let rates = [path.ops, path.bytes, path.failures].map(short);
            let times = [path.p50, path.p99].map(|time| time.map_or_else(|| "-".to_owned(), brief));
            table.add_row(words.into_iter().chain([host]).chain(rates).chain(times));
        }
        table
    }

    fn qps(&self) -> Table {
        let mut table = super::table(&["NIC", "QPN", "TYPE", "STATE", "PEER", "PATH", "WAITING", "OPS/S", "BYTES/S"]);
        let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        for qp in &self.qps {
            table.add_row([
                qp.nic.clone(),
                format!("{:#08x}", qp.qpn),
                qp.kind.clone(),
                qp.state.clone(),
                or_dash(&qp.peer),
                or_dash(&qp.path),
                or_dash(&qp.waiting),
                short(qp.ops),
                short(qp.bytes),
            ]);
        }
        table
    }
}

/// A time, with two or three digits.
fn brief(seconds: f64) -> String {
    let (value, unit) = match seconds {
        ..1e-3 => (seconds * 1e6, "us"),
        1e-3..1.0 => (seconds * 1e3, "ms"),
        _ => (seconds, "s"),
    };
    if value < 10.0 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}

/// Three digits and a decimal suffix.
fn short(value: f64) -> String {
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.into_iter().find(|(unit, _)| value >= *unit) {
        Some((unit, suffix)) if value / unit < 10.0 => format!("{:.2}{suffix}", value / unit),
        Some((unit, suffix)) if value / unit < 100.0 => format!("{:.1}{suffix}", value / unit),
        Some((unit, suffix)) => format!("{:.0}{suffix}", value / unit),
        None => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (value, expected) in
            [(0.0, "0"), (999.4, "999"), (1000.0, "1.00k"), (12_345.0, "12.3k"), (678e6, "678M"), (1.5e12, "1.50T")]
        {
            assert_eq!(short(value), expected);
        }
    }

    #[test]
    fn times_are_brief() {
        for (seconds, expected) in [(256e-9, "0.3 us"), (65.536e-6, "66 us"), (2.1e-3, "2.1 ms"), (1.07, "1.1 s")] {
            assert_eq!(brief(seconds), expected);
        }
    }

    fn qp(qpn: u32, completed: u64, bytes: u64, waiting: bool) -> QpStatus {
        QpStatus {
            nic: "a".to_owned(),
            qpn,
            kind: "RC".to_owned(),
            state: "RTS".to_owned(),
            remote_gid: None,
            remote_qpn: None,
            path: None,
            why: None,
            completed,
            bytes,
            waiting: waiting.then(|| "rnr".to_owned()),
            sends: 0,
            receives: 0,
            scheduled: false,
        }
    }

    #[test]
    fn the_busiest_come_first_and_idle_ones_not_at_all() {
        let start = Instant::now();
        let sample = |seconds, qps| Sample { at: start + Duration::from_secs(seconds), nics: Vec::new(), qps };
        let before = sample(0, vec![qp(1, 100, 100, false), qp(2, 5, 50, false), qp(3, 7, 70, true)]);
        let now =
            sample(2, vec![qp(1, 100, 100, false), qp(2, 25, 250, false), qp(3, 7, 70, true), qp(4, 10, 4000, false)]);
        let look = compare(&before, &now, 10);
        let shown: Vec<_> = look.qps.iter().map(|qp| (qp.qpn, qp.ops, qp.bytes)).collect();
        assert_eq!(shown, [(4, 5.0, 2000.0), (2, 10.0, 100.0), (3, 0.0, 0.0)]);
        assert_eq!(compare(&before, &now, 1).qps.len(), 1);
    }
}
