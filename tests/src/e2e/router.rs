//! The router daemon as a child process, or several of them.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use freeflow_backend::nic::stats::CounterValues;
use freeflow_backend::{NicStatus, Objects, QpStatus, Rates};
use freeflow_router::api;
use freeflow_router::cluster::status::HostState;
use nix::sys::signal::Signal;

use super::child::{Owned, sibling};
use super::hosts::{self, Hosts, Layout};
use super::interrupt::wait_for;

/// How long objects may take to go.
const SETTLE: Duration = Duration::from_secs(20);

/// Running `freeflow-router`s: of one host, or of several that are joined by a network. Virtual NICs are numbered throughout: that of number
/// `n` is on host `n` modulo their number.
#[derive(Debug)]
pub struct RouterProcess {
    daemons: Vec<Daemon>,
    /// After the daemons: they are in its namespaces.
    hosts: Option<Hosts>,
}

/// One of them.
#[derive(Debug)]
struct Daemon {
    child: RefCell<Owned>,
    dir: PathBuf,
}

/// The IPv4 address of a virtual NIC.
pub fn address_of(nic: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 42, 0, nic as u8 + 1)
}

/// The name of a virtual NIC.
pub fn name_of(nic: usize) -> &'static str {
    ["a", "b", "c", "d"][nic]
}

impl RouterProcess {
    /// Starts one on each host, with this many virtual NICs in all, each of which has `spread` workers and completion vectors; their
    /// files go into `dir`.
    pub fn start(dir: &Path, nics: usize, spread: u16, layout: Layout) -> Result<Self> {
        let hosts = layout.hosts;
        if hosts == 1 {
            let daemon = Daemon::start(dir, &configuration(dir, 0..nics, spread), freeflow_router()?)?;
            return Ok(Self { daemons: vec![daemon], hosts: None });
        }
        let net = Hosts::new(dir, layout, nics).context("no hosts")?;
        let daemon = |host: usize| {
            let own = dir.join(format!("host{}", host + 1));
            std::fs::create_dir(&own).context("cannot make a folder")?;
            let text = configuration(&own, (host..nics).step_by(hosts), spread)
                + &hosts::cluster_of(dir, layout.directory, host);
            let command = net.space(host).command(&freeflow_router()?.get_program().to_string_lossy());
            Daemon::start(&own, &text, command)
        };
        let daemons = (0..hosts).map(daemon).collect::<Result<_>>()?;
        let routers = Self { daemons, hosts: Some(net) };
        wait_for("sessions between the hosts", Duration::from_secs(20), || routers.are_joined())?;
        Ok(routers)
    }

    /// What is between several hosts.
    pub fn hosts(&self) -> Result<&Hosts> {
        self.hosts.as_ref().context("there is one host")
    }

    fn daemon_of(&self, nic: usize) -> &Daemon {
        &self.daemons[nic % self.daemons.len()]
    }

    /// Whether each has a session with every other.
    fn are_joined(&self) -> Result<Option<()>> {
        for daemon in &self.daemons {
            let others = api::hosts(&daemon.control())?;
            if others.len() + 1 < self.daemons.len() || !others.iter().all(|host| host.state == HostState::Up) {
                return Ok(None);
            }
        }
        Ok(Some(()))
    }

    /// The socket of a virtual NIC.
    pub fn socket(&self, nic: usize) -> PathBuf {
        socket_in(&self.daemon_of(nic).dir, nic)
    }

    /// Its log; of several routers, one after the other.
    pub fn log(&self) -> String {
        self.daemons.iter().map(Daemon::log).collect()
    }

    /// What `freeflow nics` shows.
    pub fn nics(&self) -> Result<Vec<NicStatus>> {
        let all: Vec<_> = self.daemons.iter().map(|daemon| api::nics(&daemon.control())).collect::<Result<_>>()?;
        let most = all.iter().map(Vec::len).max().unwrap_or(0);
        Ok((0..most).flat_map(|turn| all.iter().filter_map(move |nics| nics.get(turn).cloned())).collect())
    }

    /// What `freeflow qps` shows.
    pub fn qps(&self) -> Result<Vec<QpStatus>> {
        let all: Vec<_> = self.daemons.iter().map(|daemon| api::qps(&daemon.control())).collect::<Result<_>>()?;
        Ok(all.concat())
    }

    /// `freeflow nic set`.
    pub fn set_rate(&self, nic: usize, rates: Rates) -> Result<()> {
        api::set_rate(&self.daemon_of(nic).control(), name_of(nic), rates).map(drop)
    }

    /// Counters of a virtual NIC.
    pub fn counters(&self, nic: usize) -> Result<CounterValues> {
        Ok(self.nics()?.swap_remove(nic).counters)
    }

    /// What its counters have counted since they were these: for whoever wants to know why something failed.
    pub fn counted_since(&self, nic: usize, before: &CounterValues) -> Result<Vec<(&'static str, u64)>> {
        let now = self.counters(nic)?.named().into_iter().zip(before.named());
        Ok(now.map(|((name, now), (_, before))| (name, now - before)).filter(|(_, change)| *change > 0).collect())
    }

    /// Bytes that all virtual NICs have sent.
    pub fn sent_bytes(&self) -> Result<u64> {
        Ok(self.nics()?.iter().map(|nic| nic.counters.send_bytes).sum())
    }

    /// Objects of a virtual NIC.
    pub fn objects(&self, nic: usize) -> Result<Objects> {
        Ok(self.nics()?.get(nic).with_context(|| format!("the router has no virtual NIC {nic}"))?.objects)
    }

    /// Waits until a virtual NIC has exactly these objects.
    pub fn settle(&self, nic: usize, expected: Objects) -> Result<()> {
        let mut last = Objects::default();
        let wait = wait_for("the return to what was there before", SETTLE, || {
            last = self.objects(nic)?;
            Ok((last == expected).then_some(()))
        });
        wait.with_context(|| format!("virtual NIC {} has {last:?}, expected {expected:?}", name_of(nic)))
    }

    /// Waits until this many more bytes have moved on one QP of a virtual NIC than there were when asked.
    pub fn wait_traffic(&self, nic: usize) -> Result<()> {
        let busiest = || -> Result<u64> {
            let qps = self.qps()?;
            Ok(qps.iter().filter(|qp| qp.nic == name_of(nic)).map(|qp| qp.completed).max().unwrap_or(0))
        };
        wait_for("traffic", Duration::from_mins(1), || Ok((busiest()? > 100).then_some(())))
    }

    /// Waits until a virtual NIC has moved so many bytes, ever.
    pub fn wait_bytes(&self, nic: usize, bytes: u64) -> Result<()> {
        let there = || Ok((self.counters(nic)?.send_bytes >= bytes).then_some(()));
        wait_for("traffic", Duration::from_mins(1), there)
    }

    fn signal(&self, signal: Signal) {
        self.daemons.iter().for_each(|daemon| daemon.child.borrow().signal(signal));
    }

    /// Does something while the router does nothing, and answers nobody.
    pub fn paused<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.signal(Signal::SIGSTOP);
        let done = work();
        self.signal(Signal::SIGCONT);
        done
    }

    /// Stops it with SIGTERM; how long that took.
    pub fn stop_now(&self) -> Result<Duration> {
        let start = Instant::now();
        self.signal(Signal::SIGTERM);
        self.daemons.iter().try_for_each(Daemon::wait_end)?;
        Ok(start.elapsed())
    }
}

fn freeflow_router() -> Result<Command> {
    Ok(Command::new(sibling("FREEFLOW_ROUTER_BIN", "freeflow-router")?))
}

impl Daemon {
    /// Starts a router with this configuration, and waits until it answers.
    fn start(dir: &Path, configuration: &str, mut command: Command) -> Result<Self> {
        let file = dir.join("router.toml");
        std::fs::write(&file, configuration).context("cannot write the router's configuration")?;
        command.arg("--config").arg(file);
        let log = std::fs::File::create(log_in(dir)).context("cannot make the router's log")?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut daemon = Self { child: RefCell::new(Owned::spawn(&mut command)?), dir: dir.to_owned() };
        wait_for("the router's start", Duration::from_secs(10), || daemon.is_up())?;
        Ok(daemon)
    }

    fn is_up(&mut self) -> Result<Option<()>> {
        if let Some(status) = self.child.get_mut().ended()? {
            bail!("the router ended at once ({status}):\n{}", self.log());
        }
        Ok(api::nics(&self.control()).is_ok().then_some(()))
    }

    fn control(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(log_in(&self.dir)).unwrap_or_default()
    }

    fn wait_end(&self) -> Result<()> {
        let status = wait_for("the router's end", Duration::from_secs(10), || self.child.borrow_mut().ended())?;
        if !status.success() {
            bail!("the router ended with {status}:\n{}", self.log());
        }
        Ok(())
    }
}

fn configuration(dir: &Path, nics: impl Iterator<Item = usize>, spread: u16) -> String {
    let (control, state) = (dir.join("control.sock"), dir.join("nics.toml"));
    let mut text = format!("control = \"{}\"\nstate = \"{}\"\n", control.display(), state.display());
    let _ = writeln!(text, "[engine]\nworkers = {spread}");
    for nic in nics {
        let (name, ip, socket) = (name_of(nic), address_of(nic), socket_in(dir, nic));
        let _ = write!(text, "[[nic]]\nname = {name:?}\nip = [\"{ip}\"]\nsocket = \"{}\"\n", socket.display());
        let _ = writeln!(text, "workers = {spread}\nvectors = {spread}");
    }
    text
}

fn socket_in(dir: &Path, nic: usize) -> PathBuf {
    dir.join(format!("{}.sock", name_of(nic)))
}

fn log_in(dir: &Path) -> PathBuf {
    dir.join("router.log")
}
