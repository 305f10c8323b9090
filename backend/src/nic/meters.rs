//! What a virtual NIC's work requests came to: how many, how large, how they ended and how long they took, for each transport, path and
//! other host.
//!
//! Each worker adds to meters of its own, with plain loads and stores; whoever looks adds up those of all workers. A guest decides how much
//! is counted, not in how many places: transports and paths are few, and of other hosts so many are told apart and no more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use virtio_rdma::ib::{QpType, WcStatus};

use super::stats::{Counter, Counters};
use crate::tcp::PeerId;

/// Other hosts that a virtual NIC's figures tell apart.
pub const MAX_HOSTS: usize = 64;
/// Stands for all others.
pub const OTHERS: &str = "others";
/// Statuses of completions.
const NUM_STATUSES: usize = 22;

/// The transport of a queue pair. Datagrams of the general service interface are datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Class {
    /// Reliable connected.
    Rc,
    /// Unreliable connected.
    Uc,
    /// Unreliable datagrams.
    Ud,
}

impl Class {
    const ALL: [Self; 3] = [Self::Rc, Self::Uc, Self::Ud];

    /// That of a queue pair.
    pub fn of(kind: QpType) -> Self {
        match kind {
            QpType::Rc => Self::Rc,
            QpType::Uc => Self::Uc,
            QpType::Ud | QpType::Gsi => Self::Ud,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Rc => "RC",
            Self::Uc => "UC",
            Self::Ud => "UD",
        }
    }
}

/// How bytes get to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Path {
    /// Not at all: it was not found.
    None,
    /// From memory to memory.
    Local,
    /// To a group, here and elsewhere.
    Multicast,
    /// Over the host's NIC.
    Verbs,
    /// To another host, over TCP.
    Tcp,
}

impl Path {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Local => "local",
            Self::Multicast => "multicast",
            Self::Verbs => "verbs",
            Self::Tcp => "tcp",
        }
    }
}

/// Which way a work request went: path and, if that leads there, the other host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// Path.
    pub path: Path,
    /// The other host.
    pub peer: Option<PeerId>,
}

impl Way {
    /// On this host.
    pub const fn here(path: Path) -> Self {
        Self { path, peer: None }
    }

    /// To another.
    pub const fn to(path: Path, peer: PeerId) -> Self {
        Self { path, peer: Some(peer) }
    }
}

impl Default for Way {
    fn default() -> Self {
        Self::here(Path::None)
    }
}

/// What a meter counts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// Transport.
    pub class: Class,
    /// Path.
    pub path: Path,
    /// The other host's name.
    pub host: Option<Arc<str>>,
}

/// A number that one thread adds to, and others look at.
#[derive(Debug, Default)]
struct Figure(AtomicU64);

impl Figure {
    fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Figures of one worker. Nobody else adds to them.
#[derive(Debug)]
#[repr(align(128))]
pub struct Meter {
    wqes: Figure,
    bytes: Figure,
    /// Of the whole virtual NIC, which all workers add to.
    totals: Arc<Counters>,
    latency: Buckets,
    failed: [Figure; NUM_STATUSES],
    name: Name,
    worker: usize,
}

impl Meter {
    fn new(worker: usize, name: Name, totals: Arc<Counters>) -> Self {
        let (latency, failed) = (Buckets::default(), Default::default());
        Self { wqes: Figure::default(), bytes: Figure::default(), totals, latency, failed, name, worker }
    }

    /// Work requests have succeeded.
    pub fn count(&self, wqes: u64, bytes: u64) {
        self.wqes.add(wqes);
        self.bytes.add(bytes);
        self.totals.send_wqes.add(wqes);
        self.totals.send_bytes.add(bytes);
    }

    /// One has failed.
    pub fn count_failure(&self, status: WcStatus) {
        self.wqes.add(1);
        self.failed[index(status)].add(1);
        self.totals.send_wqes.add(1);
        self.totals.count_failure(status);
    }

    /// One that stands for so many took so long.
    pub fn time(&self, took: Duration, of: u32) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.latency.counts[Buckets::of(nanos)].add(of.into());
        self.latency.nanos.add(nanos.saturating_mul(of.into()));
    }
}

fn index(status: WcStatus) -> usize {
    (status.to_wire() as usize).min(NUM_STATUSES - 1)
}

/// How many took how long. The bounds of buckets are powers of two.
#[derive(Debug, Default)]
struct Buckets {
    counts: [Figure; Self::COUNT],
    nanos: Figure,
}

impl Buckets {
    /// 256 ns, the first bound.
    const FIRST: u32 = 8;
    /// Up to 2^30 ns, about a second, and what took longer.
    const COUNT: usize = 24;

    /// Where this is counted.
    fn of(nanos: u64) -> usize {
        let bits = u64::BITS - nanos.saturating_sub(1).leading_zeros();
        (bits.saturating_sub(Self::FIRST) as usize).min(Self::COUNT - 1)
    }
}

/// The meters of a virtual NIC.
#[derive(Debug, Default)]
pub struct Meters {
    /// Looked at by workers whenever a queue pair goes another way than before: they wait for nobody.
    all: ArcSwap<Vec<Arc<Meter>>>,
    /// Receives that failed. Any worker may complete one.
    receives: [[Counter; NUM_STATUSES]; Class::ALL.len()],
}

impl Meters {
    /// The meter of this worker for that. Its figures count in `totals`, too.
    pub fn of(&self, worker: usize, name: Name, totals: &Arc<Counters>) -> Arc<Meter> {
        let name = self.admit(name);
        let known = |all: &[Arc<Meter>]| all.iter().find(|m| m.worker == worker && m.name == name).cloned();
        if let Some(meter) = known(&self.all.load()) {
            return meter;
        }
        // The worker itself is the only one that would add the same.
        let made = Arc::new(Meter::new(worker, name.clone(), totals.clone()));
        self.all.rcu(|all| all.iter().cloned().chain([made.clone()]).collect::<Vec<_>>());
        made
    }

    /// Hosts beyond those that are told apart have a name in common.
    fn admit(&self, name: Name) -> Name {
        let Some(host) = &name.host else { return name };
        let all = self.all.load();
        let hosts: BTreeSet<_> = all.iter().filter_map(|meter| meter.name.host.as_ref()).collect();
        if hosts.contains(host) || hosts.len() < MAX_HOSTS {
            return name;
        }
        Name { host: Some(OTHERS.into()), ..name }
    }

    /// A receive has failed.
    pub fn count_failed_receive(&self, class: Class, status: WcStatus) {
        self.receives[class as usize][index(status)].add(1);
    }

    /// All figures now.
    pub fn values(&self) -> Vec<PathFigures> {
        let mut sums: BTreeMap<&Name, PathFigures> = BTreeMap::new();
        let all = self.all.load();
        for meter in all.iter() {
            sums.entry(&meter.name).or_insert_with(|| PathFigures::none(&meter.name)).add(meter);
        }
        sums.into_values().collect()
    }

    /// Receives that failed, by transport and status.
    pub fn failed_receives(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let of = |class: Class| statuses(|index| self.receives[class as usize][index].get());
        let all = Class::ALL.map(|class| (class.name().to_owned(), of(class)));
        all.into_iter().filter(|(_, failed)| !failed.is_empty()).collect()
    }
}

/// The statuses that were there, by the names that verbs have for them.
fn statuses(count: impl Fn(usize) -> u64) -> BTreeMap<String, u64> {
    let all = WcStatus::ALL.iter().map(|&status| (name_of(status), count(index(status))));
    all.filter(|(_, count)| *count > 0).collect()
}

/// `RETRY_EXC_ERR` and the like.
fn name_of(status: WcStatus) -> String {
    let mut name = String::new();
    for letter in format!("{status:?}").chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

/// Work requests of one transport that went one way, at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathFigures {
    /// Transport: `RC`, `UC`, or `UD`, which includes GSI.
    pub class: String,
    /// Path: `local`, `verbs`, `tcp`, `multicast`, or `none` where the peer was not found.
    pub path: String,
    /// The other host.
    pub host: Option<String>,
    /// Work requests completed, of all kinds and statuses.
    pub wqes: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Those that failed, by status.
    pub failed: BTreeMap<String, u64>,
    /// How long those took that succeeded.
    pub latency: Latency,
}

impl PathFigures {
    fn none(name: &Name) -> Self {
        let host = name.host.as_ref().map(ToString::to_string);
        Self { class: name.class.name().to_owned(), path: name.path.name().to_owned(), host, ..Self::default() }
    }

    fn add(&mut self, meter: &Meter) {
        self.wqes += meter.wqes.get();
        self.bytes += meter.bytes.get();
        for (status, count) in statuses(|index| meter.failed[index].get()) {
            *self.failed.entry(status).or_default() += count;
        }
        self.latency.add(&meter.latency);
    }
}

/// From when a worker saw work requests to when they were complete.
///
/// A clock is asked for some of them, each of which counts for all since the one before.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// How many took no longer than [`bound`](Self::bound) says, and longer than those before; the last: longer than all bounds. Empty if
    /// none was timed.
    pub buckets: Vec<u64>,
    /// Nanoseconds of all of them.
    pub nanos: u64,
}

impl Latency {
    /// The upper bound of a bucket.
    pub fn bound(index: usize) -> Option<Duration> {
        let bits = Buckets::FIRST + index as u32;
        (index + 1 < Buckets::COUNT).then(|| Duration::from_nanos(1 << bits))
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// So much of all of them (0.5: half) took no longer than this; `None` if there is none, or it is beyond all bounds.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        #[expect(clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "a part of a count")]
        let wanted = ((self.count() as f64 * part).ceil() as u64).max(1);
        let mut seen = 0;
        let found = self.buckets.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        found.and_then(Self::bound)
    }

    /// What came after `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let then = before.buckets.iter().copied().chain(std::iter::repeat(0));
        let buckets = self.buckets.iter().zip(then).map(|(now, then)| now.saturating_sub(then)).collect();
        Self { buckets, nanos: self.nanos.saturating_sub(before.nanos) }
    }

    fn add(&mut self, other: &Buckets) {
        let counts = other.counts.iter().map(Figure::get);
        if self.buckets.is_empty() {
            self.buckets = counts.collect();
        } else {
            self.buckets.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
        if self.count() == 0 {
            self.buckets.clear();
        }
        self.nanos += other.nanos.get();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(path: Path, host: Option<&str>) -> Name {
        Name { class: Class::Rc, path, host: host.map(Into::into) }
    }

    #[test]
    fn a_bucket_has_what_is_up_to_its_bound() {
        for index in 0..Buckets::COUNT - 1 {
            let bound = Latency::bound(index).unwrap().as_nanos() as u64;
            assert_eq!((Buckets::of(bound), Buckets::of(bound + 1)), (index, index + 1));
        }
        assert_eq!((Buckets::of(0), Buckets::of(u64::MAX)), (0, Buckets::COUNT - 1));
        assert_eq!(Latency::bound(Buckets::COUNT - 1), None);
    }

    #[test]
    fn every_status_has_a_place_of_its_own() {
        let places: BTreeSet<_> = WcStatus::ALL.iter().map(|&status| index(status)).collect();
        assert_eq!(places.len(), WcStatus::ALL.len());
        assert_eq!(name_of(WcStatus::RnrRetryExcErr), "RNR_RETRY_EXC_ERR");
    }

    #[test]
    fn figures_of_all_workers_are_added_up() {
        let (meters, totals) = (Meters::default(), Arc::default());
        let of = |worker, path, host| meters.of(worker, name(path, host), &totals);
        of(0, Path::Local, None).count(3, 30);
        of(1, Path::Local, None).count(2, 20);
        of(1, Path::Local, None).count_failure(WcStatus::RetryExcErr);
        of(1, Path::Tcp, Some("host2")).count(7, 70);
        of(0, Path::Local, None).time(Duration::from_nanos(300), 2);
        of(1, Path::Local, None).time(Duration::from_nanos(200), 1);
        let values = meters.values();
        let shown: Vec<_> =
            values.iter().map(|v| (v.path.as_str(), v.host.as_deref(), v.wqes, v.bytes, v.latency.count())).collect();
        assert_eq!(shown, [("local", None, 6, 50, 3), ("tcp", Some("host2"), 7, 70, 0)]);
        assert_eq!(values[0].failed, [("RETRY_EXC_ERR".to_owned(), 1)].into());
        assert_eq!((values[0].latency.buckets[..2].to_vec(), values[0].latency.nanos), (vec![1, 2], 800));
        assert_eq!((totals.send_wqes.get(), totals.send_bytes.get(), totals.errors.get()), (13, 120, 1));
    }

    #[test]
    fn hosts_beyond_the_bound_are_counted_together() {
        let (meters, totals) = (Meters::default(), Arc::default());
        for host in 0..10 * MAX_HOSTS {
            meters.of(0, name(Path::Tcp, Some(&format!("host{host}"))), &totals).count(1, 0);
        }
        meters.of(0, name(Path::Tcp, Some("host0")), &totals).count(1, 0);
        let values = meters.values();
        assert_eq!(values.len(), MAX_HOSTS + 1);
        let wqes = |host| values.iter().find(|v| v.host.as_deref() == Some(host)).map(|v| v.wqes);
        assert_eq!(wqes(OTHERS), Some(9 * MAX_HOSTS as u64));
        assert_eq!(wqes("host0"), Some(2));
    }

    #[test]
    fn quantiles_are_bounds_of_buckets() {
        let (meters, totals) = (Meters::default(), Arc::default());
        let meter = meters.of(0, name(Path::Local, None), &totals);
        meter.time(Duration::from_nanos(200), 98);
        meter.time(Duration::from_micros(3), 2);
        let latency = meters.values().remove(0).latency;
        assert_eq!(latency.quantile(0.5), Some(Duration::from_nanos(256)));
        assert_eq!(latency.quantile(0.99), Some(Duration::from_nanos(4096)));
        assert_eq!(latency.since(&latency).quantile(0.5), None);
        meter.time(Duration::from_secs(5), 1000);
        assert_eq!(meters.values().remove(0).latency.quantile(0.5), None, "beyond all bounds");
    }
}
