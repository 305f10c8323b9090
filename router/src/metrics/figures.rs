//! The figures of a router at one moment, in the text format of `OpenMetrics`.

use std::collections::BTreeMap;
use std::fmt;

use freeflow_backend::nic::stats::CounterValues;
use freeflow_backend::{NicStatus, QpStatus};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

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
    text(&router.nics(), &router.qps(), &router.worker_sleeps(), directory.as_ref(), router.sessions())
}

fn text(
    nics: &[NicStatus],
    qps: &[QpStatus],
    sleeps: &[u64],
    directory: Option<&Status>,
    sessions: Option<&Board>,
) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("freeflow");
    let build = [("version", env!("CARGO_PKG_VERSION").to_owned())];
    gauge(&mut registry, "build_info", "The router's version", [(build.to_vec(), 1)]);
    add_nics(&mut registry, nics);
    add_counters(&mut registry, nics);
    add_qps(&mut registry, nics, qps);
    let sleeps = sleeps.iter().enumerate().map(|(worker, &times)| (vec![("worker", worker.to_string())], times));
    counter(&mut registry, "worker_sleeps", "Times that a data-path worker has slept", sleeps);
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

/// Queue pairs by transport, state and path: one by one they would be too many.
fn add_qps(registry: &mut Registry, nics: &[NicStatus], qps: &[QpStatus]) {
    let tenants: BTreeMap<_, _> = nics.iter().map(|nic| (nic.config.name.as_str(), nic)).collect();
    let mut counts: BTreeMap<(&str, &str, &str, &str), u64> = BTreeMap::new();
    for qp in qps {
        let path = qp.path.as_deref().unwrap_or("none");
        *counts.entry((&qp.nic, &qp.kind, &qp.state, path)).or_default() += 1;
    }
    let each = counts.into_iter().filter_map(|((nic, kind, state, path), count)| {
        let labels = [("type", kind), ("state", state), ("path", path)];
        Some((labels.iter().fold(of_nic(tenants.get(nic)?), |all, (name, value)| with(all, name, value)), count))
    });
    gauge(registry, "nic_qps", "Queue pairs by transport, state and path", each);
}

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
