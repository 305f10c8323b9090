//! Other software that moves messages between processes of one host, on the same two cores in the same run: UCX over shared memory and over
//! TCP, and libfabric over shared memory. Theirs cannot cross from one virtual machine to another; ours is measured as in [`path`](super::path).

use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::alternate;
use super::path::{Cores, bed};
use super::table::Row;
use super::traffic::{Kind, Traffic};
use crate::e2e::child::Owned;
use crate::e2e::interrupt;
use crate::sys::pin_thread;

/// How long one run of another's program may take, its server's start included.
const PATIENCE: Duration = Duration::from_secs(30);

/// A figure of ours and the like of another's.
struct Pair {
    name: &'static str,
    kind: Kind,
    ours: Ours,
    theirs: Theirs,
}

/// What is measured, of a message of this size.
#[derive(Clone, Copy)]
enum Ours {
    Latency(usize),
    Rate,
    Stream(usize),
}

/// Another's program.
#[derive(Clone, Copy)]
enum Theirs {
    /// `ucx_perftest` with this transport and test.
    Ucx(&'static str, &'static str),
    /// `fi_pingpong` with this provider.
    Fabric(&'static str),
}

const PAIRS: [Pair; 11] = {
    use Ours::{Latency, Rate, Stream};
    use Theirs::{Fabric, Ucx};
    const fn pair(name: &'static str, kind: Kind, ours: Ours, theirs: Theirs) -> Pair {
        Pair { name, kind, ours, theirs }
    }
    [
        pair("64 B WRITE beside UCX put, shared memory", Kind::Write, Latency(64), Ucx("posix", "ucp_put_lat")),
        pair("64 B SEND beside UCX tag, shared memory", Kind::Send, Latency(64), Ucx("posix", "tag_lat")),
        pair("64 B SEND beside UCX tag, TCP", Kind::Send, Latency(64), Ucx("tcp", "tag_lat")),
        pair("64 B SEND beside libfabric shm", Kind::Send, Latency(64), Fabric("shm")),
        pair("8 B WRITE beside UCX put, shared memory", Kind::Write, Rate, Ucx("posix", "ucp_put_bw")),
        pair("8 B SEND beside UCX tag, shared memory", Kind::Send, Rate, Ucx("posix", "tag_bw")),
        pair("64 KiB WRITE beside UCX put, shared memory", Kind::Write, Stream(64 << 10), Ucx("posix", "ucp_put_bw")),
        pair("64 KiB SEND beside UCX tag, shared memory", Kind::Send, Stream(64 << 10), Ucx("posix", "tag_bw")),
        pair("1 MiB WRITE beside UCX put, shared memory", Kind::Write, Stream(1 << 20), Ucx("posix", "ucp_put_bw")),
        pair("1 MiB SEND beside UCX tag, shared memory", Kind::Send, Stream(1 << 20), Ucx("posix", "tag_bw")),
        pair("1 MiB SEND beside UCX tag, TCP", Kind::Send, Stream(1 << 20), Ucx("tcp", "tag_bw")),
    ]
};

/// Every row of this module.
///
/// # Errors
/// When a work request of ours fails, or the run is interrupted.
pub fn rows(cores: Option<Cores>) -> Result<Vec<Row>> {
    let Some(cores) = cores else {
        return Ok(vec![Row::not_measurable("other software on one host", "both ends need a core each")]);
    };
    pin_thread(0, cores.poster)?;
    let bed = bed(cores, 64 << 20);
    let traffic = Traffic::between(&bed.guests[0], &bed.guests[1], 1 << 20)?;
    PAIRS.iter().map(|pair| row(&traffic, cores, pair)).collect()
}

/// Without the other's program ours is measured elsewhere.
fn row(traffic: &Traffic, cores: Cores, pair: &Pair) -> Result<Row> {
    let compared = alternate(|| ours(traffic, pair), || theirs(cores, pair));
    interrupt::check()?;
    Ok(match compared {
        Ok((value, other, ratio)) => {
            let unit = pair.ours.unit();
            Row::versus(pair.name, value, unit, &format!("{} {other:.3} {unit}", pair.theirs.name()), ratio)
        }
        Err(error) => Row::not_measurable(pair.name, &format!("{error:#}")),
    })
}

fn ours(traffic: &Traffic, pair: &Pair) -> Result<f64> {
    match pair.ours {
        Ours::Latency(size) => traffic.latency(pair.kind, size, 20_000),
        Ours::Rate => traffic.rate(pair.kind, 10_000),
        Ours::Stream(size) => traffic.stream(pair.kind, size, (1 << 30) / size),
    }
}

fn theirs(cores: Cores, pair: &Pair) -> Result<f64> {
    match pair.theirs {
        Theirs::Ucx(transport, test) => ucx(cores, transport, test, pair.ours),
        Theirs::Fabric(provider) => fabric(cores, provider, pair.ours.size()),
    }
}

impl Ours {
    fn unit(self) -> &'static str {
        match self {
            Self::Latency(_) => "us",
            Self::Rate => "M/s",
            Self::Stream(_) => "GB/s",
        }
    }

    fn size(self) -> usize {
        match self {
            Self::Latency(size) | Self::Stream(size) => size,
            Self::Rate => 8,
        }
    }

    /// Messages of one run of `ucx_perftest`, for a second or so.
    fn count(self, transport: &str) -> usize {
        let quick = transport != "tcp";
        match self {
            Self::Latency(_) => [20_000, 200_000][usize::from(quick)],
            Self::Rate => 2_000_000,
            Self::Stream(size) => [1 << 28, 1 << 31][usize::from(quick)] / size,
        }
    }
}

impl Theirs {
    fn name(self) -> &'static str {
        match self {
            Self::Ucx(..) => "UCX",
            Self::Fabric(_) => "libfabric",
        }
    }
}

/// The median latency in microseconds, million messages a second, or GB/s.
fn ucx(cores: Cores, transport: &str, test: &str, what: Ours) -> Result<f64> {
    let command = |core: usize| {
        let mut command = Command::new("ucx_perftest");
        command.args(["-c", &core.to_string()]).env("UCX_TLS", format!("{transport},self"));
        // TCP stays on the loopback interface.
        command.env("UCX_NET_DEVICES", "lo").env("UCX_WARN_UNUSED_ENV_VARS", "n");
        command
    };
    let (size, count) = (what.size().to_string(), what.count(transport).to_string());
    let text = between(command(cores.worker), command(cores.poster), "-p", |client, port| {
        client.args(["127.0.0.1", "-p", port, "-t", test, "-s", &size, "-n", &count, "-w", "1000", "-f", "-v"]);
    })?;
    // iterations, median and average latency, overall latency, average and overall bandwidth in MiB/s, and messages a second
    let line = text.lines().last().context("no figures")?;
    let figure = |column| -> Result<f64> {
        let text = line.split(',').nth(column).with_context(|| format!("no figure {column} in {line:?}"))?;
        Ok(text.trim().parse()?)
    };
    Ok(match what {
        Ours::Latency(_) => figure(1)?,
        Ours::Rate => figure(7)? / 1e6,
        Ours::Stream(_) => figure(5)? * 1_048_576.0 / 1e9,
    })
}

/// Microseconds one way.
fn fabric(cores: Cores, provider: &str, size: usize) -> Result<f64> {
    let command = |core: usize| {
        let mut command = Command::new("taskset");
        command.args(["-c", &core.to_string(), "fi_pingpong", "-e", "rdm", "-p", provider, "-I", "50000"]);
        command.args(["-S", &size.to_string()]);
        command
    };
    let text = between(command(cores.worker), command(cores.poster), "-B", |client, port| {
        client.args(["-P", port, "127.0.0.1"]);
    })?;
    let line = text.lines().last().context("no figures")?;
    Ok(line.split_whitespace().nth(6).with_context(|| format!("no latency in {line:?}"))?.parse()?)
}

/// What a client prints once its server is there to be found; its port goes to the server with `option`.
fn between(mut server: Command, client: Command, option: &str, finish: impl Fn(&mut Command, &str)) -> Result<String> {
    let port = free_port()?;
    server.args([option, &port]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut server = Owned::spawn(&mut server)?;
    let mut client = client;
    finish(&mut client, &port);
    let deadline = Instant::now() + PATIENCE;
    loop {
        interrupt::check()?;
        sleep(Duration::from_millis(200));
        let output = Command::new("timeout")
            .arg("20")
            .arg(client.get_program())
            .args(client.get_args())
            .envs(client.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .output()?;
        if output.status.success() {
            server.wait(Duration::from_secs(5));
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        if server.ended()?.is_some() || Instant::now() > deadline {
            bail!("{}: {}", client.get_program().display(), String::from_utf8_lossy(&output.stderr).trim());
        }
    }
}

/// A TCP port that nobody uses at this moment.
fn free_port() -> Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string())
}
