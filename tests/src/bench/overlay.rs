//! The network that two guests of two hosts have without us: TCP through their virtual Ethernet interfaces and VXLAN. Beside it what they have
//! with us: the same programs over SMC-R, and RDMA.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::alternate;
use super::table::Row;
use crate::e2e::bed::Bed;
use crate::e2e::guest::{Distro, Guest, Kind, Software, Vmm};
use crate::e2e::hosts::{Layout, Network};
use crate::e2e::kernel_users::{PRELOAD, load_smc};
use crate::e2e::pair;
use crate::e2e::perf::{Perf, Program, WRITE_BW};
use crate::e2e::rdma_cm::wait_until;
use crate::e2e::router::address_of;

/// How long one program may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Redis requests in a run.
const REQUESTS: u32 = 2000;

/// What sockets are.
#[derive(Debug, Clone, Copy)]
enum Sockets {
    /// Those of TCP.
    Tcp,
    /// Those of SMC, by our library.
    Smc,
}

impl Sockets {
    const ALL: [Self; 2] = [Self::Tcp, Self::Smc];

    fn prepare(self) -> &'static str {
        match self {
            Self::Tcp => "",
            Self::Smc => PRELOAD,
        }
    }

    /// Servers of both kinds run at the same time.
    fn port(self, of_tcp: u16) -> u16 {
        match self {
            Self::Tcp => of_tcp,
            Self::Smc => of_tcp + 1,
        }
    }
}

const IPERF3: u16 = 5201;
const REDIS: u16 = 6379;

/// Every row of this module.
///
/// # Errors
/// When a guest or a program in it fails.
pub fn rows() -> Result<Vec<Row>> {
    let kind = Kind { vmm: Vmm::Uml, distro: Distro::Trixie, software: Software::Apps };
    let bed = Bed::start(&[kind; 2], 1, Layout { network: Network::Vxlan, ..Layout::on(2) })?;
    load_smc(&bed)?;
    Sockets::ALL.into_iter().try_for_each(|sockets| serve(bed.guest(0)?, sockets))?;
    let client = bed.guest(1)?;
    let mut rows = vec![
        against(
            "iperf3, one stream, over SMC-R",
            || iperf3(client, Sockets::Smc),
            || iperf3(client, Sockets::Tcp),
            "MiB/s",
        )?,
        against("ib_write_bw 64 KiB", || write_bw(&bed), || iperf3(client, Sockets::Tcp), "MiB/s")?,
    ];
    for clients in [1, 16] {
        for command in ["SET", "GET"] {
            let rate = |sockets| redis(client, sockets, command, clients);
            let name = format!("redis-benchmark {command}, {clients} clients, over SMC-R");
            rows.push(against(&name, || rate(Sockets::Smc), || rate(Sockets::Tcp), "requests/s")?);
        }
    }
    Ok(rows)
}

fn against(
    name: &str,
    ours: impl FnMut() -> Result<f64>,
    theirs: impl FnMut() -> Result<f64>,
    unit: &str,
) -> Result<Row> {
    let (value, other, ratio) = alternate(ours, theirs).with_context(|| name.to_owned())?;
    let name = format!("two hosts' uml guests, {name}");
    Ok(Row::versus(&name, value, unit, &format!("TCP over VXLAN {other:.2} {unit}"), ratio))
}

/// Starts the servers.
fn serve(guest: &Guest, sockets: Sockets) -> Result<()> {
    let (prepare, iperf3, redis) = (sockets.prepare(), sockets.port(IPERF3), sockets.port(REDIS));
    guest.start_script(&format!(
        "{prepare}\niperf3 -s -p {iperf3} >/dev/null 3<&- &\n\
        redis-server --port {redis} --bind 0.0.0.0 --protected-mode no --save '' --appendonly no >/dev/null 3<&- &\nwait"
    ))?;
    wait_until(guest, &format!("listens {iperf3} && listens {redis}"))
}

/// MiB/s of one stream.
fn iperf3(client: &Guest, sockets: Sockets) -> Result<f64> {
    let command = format!("iperf3 -c {} -p {} -t 1 -J", address_of(0), sockets.port(IPERF3));
    let output = run(client, sockets, &command)?;
    let report: serde_json::Value = serde_json::from_str(&output)?;
    let bits = report.pointer("/end/sum_received/bits_per_second").and_then(serde_json::Value::as_f64);
    Ok(bits.with_context(|| format!("iperf3 says no rate: {output}"))? / 8.0 / f64::from(1 << 20))
}

fn write_bw(bed: &Bed) -> Result<f64> {
    let program = Program::from(Perf::new(WRITE_BW, 64 << 10, 1000));
    Ok(pair::run(bed.guest(0)?, bed.guest(1)?, &program)?.value)
}

/// Requests per second.
fn redis(client: &Guest, sockets: Sockets, command: &str, clients: u32) -> Result<f64> {
    let port = sockets.port(REDIS);
    let flags = format!("-t {} -n {REQUESTS} -c {clients} --csv", command.to_lowercase());
    let output = run(client, sockets, &format!("redis-benchmark -h {} -p {port} {flags}", address_of(0)))?;
    requests_per_second(&output, command).with_context(|| format!("redis-benchmark says no rate: {output}"))
}

/// The second column, `rps`, of a line of CSV.
fn requests_per_second(csv: &str, command: &str) -> Option<f64> {
    let start = format!("\"{command}\",\"");
    csv.lines().find_map(|line| line.strip_prefix(&start))?.split('"').next()?.parse().ok()
}

fn run(client: &Guest, sockets: Sockets, command: &str) -> Result<String> {
    let done = client.run(&format!("{}\n{command} 3<&-", sockets.prepare()), PATIENCE)?;
    ensure!(done.status == 0, "status {} of {command}:\n{}", done.status, done.output);
    Ok(done.output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_found() {
        let csv = "\"test\",\"rps\",\"avg_latency_ms\"\n\"SET\",\"1234.50\",\"0.8\"\n\"GET\",\"99.00\",\"1.1\"\n";
        assert_eq!(requests_per_second(csv, "GET"), Some(99.0));
        assert_eq!(requests_per_second(csv, "MSET"), None);
    }
}
