//! The figures of a router at one moment, in the text format of `OpenMetrics`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use freeflow_backend::nic::meters::{Latency, PathFigures};
use freeflow_backend::nic::stats::CounterValues;
use freeflow_backend::{NicStatus, QpStatus, WorkerStatus};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::cluster::directory::Status;
use crate::cluster::status::{Board, HostState, HostStatus};
use crate::router::Router;

type Labels = Vec<(&'static str, String)>;

/// All figures of `router`.
///
/// # Errors
/// When they cannot be written, which does not happen to a string.
pub fn of(router: &Router) -> Result<String, fmt::Error> {
    let directory = router.directory_status();
    text(&router.nics(), &router.qps(), &router.workers(), directory.as_ref(), router.sessions())
}

fn text(
    nics: &[NicStatus],
    qps: &[QpStatus],
    workers: &[WorkerStatus],
    directory: Option<&Status>,
    sessions: Option<&Board>,
) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("freeflow");
    let build = [("version", env!("CARGO_PKG_VERSION").to_owned())];
    gauge(&mut registry, "build_info", "The router's version", [(build.to_vec(), 1)]);
    add_nics(&mut registry, nics);
    add_counters(&mut registry, nics);
    add_paths(&mut registry, nics);
    add_qps(&mut registry, nics, qps);
    add_workers(&mut registry, workers);
    if let Some(directory) = directory {
        add_directory(&mut registry, directory);
    }
    if let Some(sessions) = sessions {
        add_hosts(&mut registry, &sessions.hosts());
        add_connections(&mut registry, sessions);
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// Other hosts, and sessions with them.
fn add_hosts(registry: &mut Registry, hosts: &[HostStatus]) {
    let of = |host: &HostStatus| vec![("host", host.name.clone())];
    let up = hosts.iter().map(|host| (of(host), u64::from(host.state == HostState::Up)));
    gauge(registry, "host_session", "Whether there is a session with another host", up);
    let links = hosts.iter().map(|host| (of(host), host.links as u64));
    gauge(registry, "host_links", "Links for data to another host; none when it is gone", links);
    let sessions = hosts.iter().map(|host| (of(host), host.sessions));
    counter(registry, "host_sessions", "Sessions that there were with another host", sessions);
}

/// Connections of and to other hosts.
fn add_connections(registry: &mut Registry, sessions: &Board) {
    for (name, help, value) in sessions.counts.named() {
        let name = format!("connections_{name}");
        counter(registry, &name, help.trim().trim_end_matches('.'), [(Labels::new(), value)]);
    }
}

fn of_nic(nic: &NicStatus) -> Labels {
    vec![("nic", nic.config.name.clone()), ("tenant", nic.config.tenant.clone())]
}

fn with(mut labels: Labels, name: &'static str, value: &str) -> Labels {
    labels.push((name, value.to_owned()));
    labels
}

fn add_nics(registry: &mut Registry, nics: &[NicStatus]) {
    let each = |value: fn(&NicStatus) -> bool| nics.iter().map(move |nic| (of_nic(nic), u64::from(value(nic))));
    gauge(registry, "nic_connected", "Whether a VMM is connected", each(|nic| nic.connected));
    gauge(registry, "nic_running", "Whether a guest's driver has set the device up", each(|nic| nic.running));
    let objects = nics.iter().flat_map(|nic| {
        let o = nic.objects;
        let kinds = [("pd", o.pds), ("mr", o.mrs), ("cq", o.cqs), ("qp", o.qps), ("gid", o.gids)];
        kinds.map(|(kind, count)| (with(of_nic(nic), "kind", kind), count as u64))
    });
    gauge(registry, "nic_objects", "Objects that a guest has", objects);
}

fn add_counters(registry: &mut Registry, nics: &[NicStatus]) {
    let values: Vec<_> = nics.iter().map(|nic| (of_nic(nic), nic.counters.named())).collect();
    for (index, (name, help)) in CounterValues::DESCRIPTIONS.iter().enumerate() {
        let each = values.iter().map(|(labels, named)| (labels.clone(), named[index].1));
        counter(registry, &format!("nic_{name}"), help.trim().trim_end_matches('.'), each);
    }
}

fn add_workers(registry: &mut Registry, workers: &[WorkerStatus]) {
    let of = |index: usize| vec![("worker", index.to_string())];
    let sleeps = workers.iter().enumerate().map(|(index, worker)| (of(index), worker.sleeps));
    counter(registry, "worker_sleeps", "Times that a data-path worker has slept", sleeps);
    let asleep = workers.iter().enumerate().map(|(index, worker)| (of(index), worker.asleep));
    seconds(registry, "worker_asleep", "Time that a data-path worker has slept", asleep);
    let awake = workers.iter().enumerate().map(|(index, worker)| (of(index), worker.awake));
    seconds(registry, "worker_awake", "Time that a data-path worker has worked, or polled for work", awake);
}

/// Where a virtual NIC's sends went.
fn add_paths(registry: &mut Registry, nics: &[NicStatus]) {
    let all = || nics.iter().flat_map(|nic| nic.paths.iter().map(move |path| (of_path(nic, path), path)));
    let wqes = all().map(|(labels, path)| (labels, path.wqes));
    counter(registry, "path_wqes", "Work requests completed, by transport, path and other host", wqes);
    let bytes = all().map(|(labels, path)| (labels, path.bytes));
    counter(registry, "path_bytes", "Bytes that they have moved", bytes);
    let failed = all().flat_map(|(labels, path)| by_status(labels, &path.failed));
    counter(registry, "path_failures", "Those that failed, by the status of their completion", failed);
    let timed = all().map(|(labels, path)| (labels, path.latency.clone())).filter(|(_, timed)| timed.count() > 0);
    registry.register_collector(Box::new(Latencies(timed.collect())));
    let receives = nics.iter().flat_map(|nic| {
        let failed = nic.failed_receives.iter();
        failed.flat_map(|(class, failed)| by_status(with(of_nic(nic), "type", class), failed))
    });
    counter(registry, "nic_receive_failures", "Receives that failed, by the status of their completion", receives);
}

fn of_path(nic: &NicStatus, path: &PathFigures) -> Labels {
    let labels = with(with(of_nic(nic), "type", &path.class), "path", &path.path);
    match &path.host {
        Some(host) => with(labels, "host", host),
        None => labels,
    }
}

fn by_status(labels: Labels, failed: &BTreeMap<String, u64>) -> impl Iterator<Item = (Labels, u64)> {
    failed.iter().map(move |(status, count)| (with(labels.clone(), "status", status), *count))
}

/// Queue pairs and what is queued in them: one by one they would be too many.
fn add_qps(registry: &mut Registry, nics: &[NicStatus], qps: &[QpStatus]) {
    let known: BTreeMap<_, _> = nics.iter().map(|nic| (nic.config.name.as_str(), of_nic(nic))).collect();
    let all: Vec<_> = qps.iter().filter_map(|qp| Some((known.get(qp.nic.as_str())?, qp))).collect();
    let mut add = |name, help, counts: fn(&QpStatus) -> Counts<'_>| {
        let mut sums = BTreeMap::<Labels, u64>::new();
        for (nic, qp) in &all {
            for (label, value, count) in counts(qp) {
                let path = qp.path.as_deref().unwrap_or("none");
                let labels = [("type", qp.kind.as_str()), (label, value), ("path", path)];
                let named = labels.into_iter().filter(|(label, _)| !label.is_empty());
                let labels = named.fold((*nic).clone(), |all, (label, value)| with(all, label, value));
                *sums.entry(labels).or_default() += count;
            }
        }
        gauge(registry, name, help, sums);
    };
    add("nic_qps", "Queue pairs by transport, state and path", |qp| vec![("state", &qp.state, 1)]);
    add("nic_qps_waiting", "Queue pairs whose present work request waits, and for what", |qp| {
        qp.waiting.iter().map(|what| ("for", what.as_str(), 1)).collect()
    });
    add("nic_qps_scheduled", "Queue pairs that wait for their turn at their worker", |qp| {
        vec![("", "", qp.scheduled.into())]
    });
    add("nic_queue_depth", "Work requests in queues that workers have seen and not finished", |qp| {
        vec![("queue", "send", qp.sends.into()), ("queue", "receive", qp.receives.into())]
    });
}

/// What of a queue pair is counted, each with a label, or none, that tells it from the others.
type Counts<'a> = Vec<(&'static str, &'a str, u64)>;

fn add_directory(registry: &mut Registry, directory: &Status) {
    let mut one = |name: &str, help: &str, value: u64| gauge(registry, name, help, [(Labels::new(), value)]);
    let health = directory.health;
    one(
        "directory_connected",
        "Whether changes of the directory are heard of as they happen",
        u64::from(health.connected),
    );
    one("directory_age_seconds", "Time since the directory was last known to be up to date", health.age.as_secs());
    one(
        "directory_refused",
        "Virtual NICs of this host whose addresses the directory gives to others",
        health.refused as u64,
    );
    one("directory_hosts", "Hosts that the directory has", directory.hosts as u64);
    one("directory_addresses", "Addresses of all tenants that the directory has", directory.addresses as u64);
}

/// Histograms that were filled elsewhere.
#[derive(Debug)]
struct Latencies(Vec<(Labels, Latency)>);

impl Collector for Latencies {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "From when a worker saw work requests to when they were complete, as far as they succeeded";
        let mut metric =
            encoder.encode_descriptor("path_latency", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for (labels, latency) in &self.0 {
            let bound = |index| Latency::bound(index).map_or(f64::INFINITY, |bound| bound.as_secs_f64());
            let buckets: Vec<_> = latency.buckets.iter().enumerate().map(|(n, &count)| (bound(n), count)).collect();
            let sum = Duration::from_nanos(latency.nanos).as_secs_f64();
            metric.encode_family(labels)?.encode_histogram::<NoLabelSet>(sum, latency.count(), &buckets, None)?;
        }
        Ok(())
    }
}

fn seconds(registry: &mut Registry, name: &str, help: &str, values: impl IntoIterator<Item = (Labels, f64)>) {
    let family = Family::<Labels, Counter<f64, AtomicU64>>::default();
    for (labels, value) in values {
        family.get_or_create(&labels).inc_by(value);
    }
    registry.register_with_unit(name, help, Unit::Seconds, family);
}

fn gauge(registry: &mut Registry, name: &str, help: &str, values: impl IntoIterator<Item = (Labels, u64)>) {
    let family = Family::<Labels, Gauge>::default();
    for (labels, value) in values {
        family.get_or_create(&labels).set(value.cast_signed());
    }
    registry.register(name, help, family);
}

fn counter(registry: &mut Registry, name: &str, help: &str, values: impl IntoIterator<Item = (Labels, u64)>) {
    let family = Family::<Labels, Counter>::default();
    for (labels, value) in values {
        family.get_or_create(&labels).inc_by(value);
    }
    registry.register(name, help, family);
}
