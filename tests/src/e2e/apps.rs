//! Libraries, programs and kernel users of RDMA that applications build on: `freeflow-e2e apps`, one list.
//!
//! To add a program, add it to [`APPS`], to [`MPI`], to [`RDMA_CM`], to [`SERVERS`] or to [`KERNEL_USERS`].

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use comfy_table::{CellAlignment, Table, presets};

use super::bed::Bed;
use super::guest::{Distro, Kind, Software, Vmm};
use super::kernel_users::KERNEL_USERS;
use super::mpi::MPI;
use super::pair::Pair;
use super::rdma_cm::RDMA_CM;
use super::report::{Figure, Outcome};
use super::router::address_of;
use super::servers::SERVERS;
use super::suite::{Check, Scene};

/// How long one program may take.
const PATIENCE: Duration = Duration::from_mins(2);

/// One entry of the list.
#[derive(Debug)]
pub struct App {
    /// For people: program and flags.
    pub name: &'static str,
    /// Where.
    pub places: Places,
    /// What is run.
    pub run: Run,
    /// Finds the figure in the output, if there is one.
    pub figure: Option<Reading>,
}

impl App {
    /// Steps on a bed, without a figure.
    pub const fn steps(name: &'static str, steps: fn(&Bed) -> Result<String>) -> Self {
        Self { name, places: Places::Between, run: Run::Steps(steps), figure: None }
    }
}

/// Which guests the ends run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Places {
    /// Server in guest 0 and client in guest 1, and both in guest 0.
    BetweenAndWithin,
    /// Server in guest 0 and client in guest 1.
    Between,
}

/// How an entry is run.
#[derive(Debug)]
pub enum Run {
    /// A server and a client.
    Ends(Ends),
    /// Steps on a bed with two guests; what they printed.
    Steps(fn(&Bed) -> Result<String>),
}

/// Command lines for the guests' shell, where `$DEV` is the RDMA device, `$GID` its GID's index, `$ADDRESS` the server's address
/// and `$PORT` a free port.
#[derive(Debug)]
pub struct Ends {
    /// Assignments that both ends start with.
    pub environment: &'static str,
    /// Listens on `$PORT`.
    pub server: &'static str,
    /// Connects.
    pub client: &'static str,
    /// Flags of both.
    pub flags: &'static str,
    /// How to see that the server is ready.
    pub listens: Listens,
    /// What the client's output must contain.
    pub expected: &'static [&'static str],
    /// What neither output may contain.
    pub forbidden: &'static [&'static str],
}

/// What a server that is ready can be known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listens {
    /// It accepts TCP connections on `$PORT`.
    Tcp,
    /// It accepts connections of `rdma_cm` there.
    RdmaCm,
}

/// Finds a figure in an output, and its unit.
pub type Reading = (fn(&str) -> Option<f64>, &'static str);

/// Libraries.
pub static APPS: &[App] = &[
    ucx("ucx_perftest rc tag_lat 64 B", RC, "-t tag_lat -s 64 -n 500 -w 20", UCX_LATENCY),
    ucx("ucx_perftest rc tag_bw 64 KiB", RC, "-t tag_bw -s 65536 -n 500 -w 20", UCX_BANDWIDTH),
    ucx("ucx_perftest rc ucp_get 1 MiB", RC, "-t ucp_get -s 1048576 -n 100 -w 5", UCX_BANDWIDTH),
    ucx("ucx_perftest rc stream_bw 4 KiB", RC, "-t stream_bw -s 4096 -n 500 -w 20", UCX_BANDWIDTH),
    ucx("ucx_perftest rc_verbs put_lat 8 B", RC, "-d $DEV:1 -x rc_verbs -t put_lat -n 500 -w 20", UCX_LATENCY),
    ucx("ucx_perftest rc_verbs put_bw 64 KiB", RC, PUT_BW, UCX_BANDWIDTH),
    ucx("ucx_perftest rc_verbs fadd", RC, "-d $DEV:1 -x rc_verbs -t fadd -s 8 -n 500 -w 20", UCX_LATENCY),
    ucx("ucx_perftest ud tag_lat 64 B", UD, "-t tag_lat -s 64 -n 500 -w 20", UCX_LATENCY),
    ucx("ucx_perftest ud tag_bw 64 KiB", UD, "-t tag_bw -s 65536 -n 100 -w 5", UCX_BANDWIDTH),
    ucx("ucx_perftest ud_verbs am_lat 64 B", UD, "-d $DEV:1 -x ud_verbs -t am_lat -s 64 -n 500 -w 20", UCX_LATENCY),
    libfabric("fi_pingpong -c -e msg -p verbs", "", "-e msg -p verbs"),
    libfabric("fi_pingpong -c -e rdm -p verbs;ofi_rxm", RXM, "-e rdm -p 'verbs;ofi_rxm'"),
    libfabric("fi_pingpong -c -e rdm -m tagged -p verbs;ofi_rxm", RXM, "-e rdm -m tagged -p 'verbs;ofi_rxm'"),
];

/// rc has no way of its own to exchange addresses of queue pairs, and takes ud for that.
const RC: &str = "UCX_TLS=rc_verbs,ud_verbs,self UCX_NET_DEVICES=$DEV:1 UCX_IB_GID_INDEX=$GID";
const UD: &str = "UCX_TLS=ud_verbs,self UCX_NET_DEVICES=$DEV:1 UCX_IB_GID_INDEX=$GID";
const PUT_BW: &str = "-d $DEV:1 -x rc_verbs -t put_bw -D zcopy -s 65536 -n 500 -w 20";
const UCX_LATENCY: Reading = (|output| ucx_final(output, 2), "us");
const UCX_BANDWIDTH: Reading = (|output| ucx_final(output, 5), "MB/s");

/// UCX without TCP and shared memory to fall back on. Its ends poll all the time, so never two of them in one guest, which has one core.
/// `ucp_put` and `ucp_fadd` are left out, as UCX flushes those with a key of mlx5's own (`flush(remote) is not supported`, on rxe too).
const fn ucx(name: &'static str, environment: &'static str, flags: &'static str, figure: Reading) -> App {
    let ends = Ends {
        environment,
        server: "ucx_perftest $(without_mpi) -p $PORT",
        client: "ucx_perftest $(without_mpi) $ADDRESS -p $PORT",
        flags,
        listens: Listens::Tcp,
        expected: &["Final:"],
        forbidden: &["UCX  ERROR", "UCX  WARN"],
    };
    App { name, places: Places::Between, run: Run::Ends(ends), figure: Some(figure) }
}

/// `Final: iterations percentile average overall(us) average overall(MB/s) average overall(messages/s)`.
fn ucx_final(output: &str, column: usize) -> Option<f64> {
    let line = output.lines().rfind(|line| line.starts_with("Final:"))?;
    line.split_whitespace().nth(column)?.parse().ok()
}

/// `ofi_rxm` makes one completion queue for what all peers can have under way. For the 256 that it expects, that is more than `max_cqe`;
/// it fails with `EINVAL` then, on rxe too.
const RXM: &str = "FI_UNIVERSE_SIZE=8";

const fn libfabric(name: &'static str, environment: &'static str, flags: &'static str) -> App {
    let ends = Ends {
        environment,
        server: "fi_pingpong -c -I 20 -B $PORT",
        client: "fi_pingpong -c -I 20 -P $PORT $ADDRESS",
        flags,
        listens: Listens::Tcp,
        expected: &["usec/xfer"],
        forbidden: &["error", "data check"],
    };
    App { name, places: Places::BetweenAndWithin, run: Run::Ends(ends), figure: Some((pingpong_last, "us")) }
}

/// The last line, of the greatest size: `bytes #sent #ack total time MB/sec usec/xfer Mxfers/sec`.
fn pingpong_last(output: &str) -> Option<f64> {
    output.lines().rfind(|line| !line.trim().is_empty())?.split_whitespace().nth(6)?.parse().ok()
}

/// All of them.
fn all() -> impl Iterator<Item = &'static App> {
    APPS.iter().chain(MPI).chain(RDMA_CM).chain(SERVERS).chain(KERNEL_USERS)
}

/// All entries in two guests of a distribution.
pub fn scene(distro: Distro) -> Scene {
    let kind = Kind { vmm: Vmm::Uml, distro, software: Software::Apps };
    let checks = |app: &'static App| {
        let within = (app.places == Places::BetweenAndWithin).then_some(Check::App(0, 0, app));
        std::iter::once(Check::App(0, 1, app)).chain(within)
    };
    Scene::new(vec![kind; 2], all().flat_map(checks))
}

/// Runs an entry; its figure.
pub fn run(bed: &Bed, (server, client): (usize, usize), app: &App) -> Result<Option<Figure>> {
    let output = match &app.run {
        Run::Ends(ends) => run_ends(bed, server, client, ends)?,
        Run::Steps(steps) => steps(bed)?,
    };
    let read = |(read, unit): Reading| {
        read(&output).map(|value| Figure::plain(value, unit)).with_context(|| format!("no figure in\n{output}"))
    };
    app.figure.map(read).transpose()
}

fn run_ends(bed: &Bed, server: usize, client: usize, ends: &Ends) -> Result<String> {
    let address = address_of(server).to_string();
    let pair = Pair::start_scripts(bed.guest(server)?, bed.guest(client)?, |port| ends.scripts(port, &address))?;
    let ended = pair.wait(PATIENCE)?;
    let outputs = || format!("server:\n{}\nclient:\n{}", ended.server.output, ended.client.output);
    if ended.server.status != 0 || ended.client.status != 0 {
        let crashes = [server, client].map(|nic| crashes(bed, nic)).concat();
        bail!("server status {}, client status {}\n{}{crashes}", ended.server.status, ended.client.status, outputs());
    }
    for text in ends.expected {
        ensure!(ended.client.output.contains(text), "no `{text}` from the client\n{}", outputs());
    }
    for text in ends.forbidden {
        ensure!(!outputs().contains(text), "`{text}`\n{}", outputs());
    }
    Ok(ended.client.output)
}

/// Where programs crashed lately, as a guest's kernel has noted it.
fn crashes(bed: &Bed, nic: usize) -> String {
    let noted = bed.guest(nic).and_then(|guest| guest.must("dmesg | grep -F segfault | tail -n 2"));
    noted.unwrap_or_default()
}

impl Ends {
    /// What the two guests run.
    fn scripts(&self, port: u16, address: &str) -> [String; 2] {
        let listens = match self.listens {
            Listens::Tcp => "listens",
            Listens::RdmaCm => "rdma_listens",
        };
        let script = |how: &str, command: &str| {
            // A function, so that quotes and variables are the shell's; `exec`, so that what is killed is the program.
            format!(
                "PORT={port} ADDRESS={address} LISTENS={listens}\nrescan || exit\n\
                end() {{ {} exec {command} {}; }}\n{how} $PORT end",
                export(self.environment),
                self.flags
            )
        };
        [script("serve", self.server), script("connect", self.client)]
    }
}

fn export(environment: &str) -> String {
    if environment.is_empty() { String::new() } else { format!("export {environment};") }
}

/// For people.
pub fn table(outcomes: &[Outcome]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY).set_header(["program", "where", "result", "figure"]);
    for outcome in outcomes {
        let (way, program) = outcome.test.split_once(": ").unwrap_or(("", &outcome.test));
        let place = format!("{} {way}", outcome.place);
        table.add_row([program, place.trim(), outcome.verdict(), &outcome.figure()]);
    }
    if let Some(column) = table.column_mut(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = all().map(|app| app.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all().count());
    }

    #[test]
    fn figures_are_read() {
        let ucx = "Final:                  1000      1.250     1.300     1.310     46.95      46.60      769230      763359\n";
        assert_eq!((UCX_LATENCY.0)(ucx), Some(1.25));
        assert_eq!((UCX_BANDWIDTH.0)(ucx), Some(46.95));
        let libfabric = "bytes   #sent   #ack     total       time     MB/sec    usec/xfer   Mxfers/sec\n\
            64      10      =10      1.2k        0.00s      1.00      12.34       0.08\n";
        assert_eq!(pingpong_last(libfabric), Some(12.34));
    }

    #[test]
    fn scripts_have_both_ends_and_the_variables() {
        let App { run: Run::Ends(ends), .. } = &APPS[0] else { panic!("not two ends") };
        let [server, client] = ends.scripts(7, "1.2.3.4");
        assert!(server.starts_with("PORT=7 ADDRESS=1.2.3.4 LISTENS=listens\n") && server.ends_with("serve $PORT end"));
        assert!(
            client.contains("exec ucx_perftest $(without_mpi) $ADDRESS -p $PORT -t tag_lat")
                && client.contains("export UCX_TLS=")
        );
    }
}
