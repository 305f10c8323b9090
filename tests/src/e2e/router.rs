//! The router daemon as a child process.

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
use nix::sys::signal::Signal;

use super::child::{Owned, sibling};
use super::interrupt::wait_for;

/// How long objects may take to go.
const SETTLE: Duration = Duration::from_secs(20);

/// A running `freeflow-router`.
#[derive(Debug)]
pub struct RouterProcess {
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
    /// Starts it with this many virtual NICs, each with `spread` workers and completion vectors; its files go into `dir`.
    pub fn start(dir: &Path, nics: usize, spread: u16) -> Result<Self> {
        let file = dir.join("router.toml");
        std::fs::write(&file, configuration(dir, nics, spread)).context("cannot write the router's configuration")?;
        let mut command = Command::new(sibling("FREEFLOW_ROUTER_BIN", "freeflow-router")?);
        command.arg("--config").arg(file);
        let log = std::fs::File::create(log_in(dir)).context("cannot make the router's log")?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut router = Self { child: RefCell::new(Owned::spawn(&mut command)?), dir: dir.to_owned() };
        wait_for("the router's start", Duration::from_secs(10), || router.is_up())?;
        Ok(router)
    }

    fn is_up(&mut self) -> Result<Option<()>> {
        if let Some(status) = self.child.get_mut().ended()? {
            bail!("the router ended at once ({status}):\n{}", self.log());
        }
        Ok(self.nics().is_ok().then_some(()))
    }

    /// The socket of a virtual NIC.
    pub fn socket(&self, nic: usize) -> PathBuf {
        socket_in(&self.dir, nic)
    }

    /// Its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(log_in(&self.dir)).unwrap_or_default()
    }

    /// What `freeflow nics` shows.
    pub fn nics(&self) -> Result<Vec<NicStatus>> {
        api::nics(&self.dir.join("control.sock"))
    }

    /// What `freeflow qps` shows.
    pub fn qps(&self) -> Result<Vec<QpStatus>> {
        api::qps(&self.dir.join("control.sock"))
    }

    /// `freeflow nic set`.
    pub fn set_rate(&self, nic: usize, rates: Rates) -> Result<()> {
        api::set_rate(&self.dir.join("control.sock"), name_of(nic), rates).map(drop)
    }

    /// Counters of a virtual NIC.
    pub fn counters(&self, nic: usize) -> Result<CounterValues> {
        Ok(self.nics()?.swap_remove(nic).counters)
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

    /// Does something while the router does nothing, and answers nobody.
    pub fn paused<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.child.borrow().signal(Signal::SIGSTOP);
        let done = work();
        self.child.borrow().signal(Signal::SIGCONT);
        done
    }

    /// Stops it with SIGTERM; how long that took.
    pub fn stop_now(&self) -> Result<Duration> {
        let start = Instant::now();
        self.child.borrow().signal(Signal::SIGTERM);
        let status = wait_for("the router's end", Duration::from_secs(10), || self.child.borrow_mut().ended())?;
        if !status.success() {
            bail!("the router ended with {status}:\n{}", self.log());
        }
        Ok(start.elapsed())
    }
}

fn configuration(dir: &Path, nics: usize, spread: u16) -> String {
    let (control, state) = (dir.join("control.sock"), dir.join("nics.toml"));
    let mut text = format!("control = \"{}\"\nstate = \"{}\"\n", control.display(), state.display());
    let _ = writeln!(text, "[engine]\nworkers = {spread}");
    for nic in 0..nics {
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
