//! A real guest: booted by `qemu/guest run`, driven through its shared folder by the script `agent`.

use std::cell::Cell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::child::Owned;
use super::interrupt::{patience, wait_for};
use super::router::{address_of, name_of};

/// The script that runs in the guest.
pub const AGENT: &str = include_str!("agent");
/// How long a boot may take; under emulation on a busy machine it is a minute.
const BOOT: Duration = Duration::from_mins(4);

/// Longest life of a guest, should nobody end it.
const LIFE: Duration = Duration::from_hours(1);

/// What runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Vmm {
    /// A virtual machine.
    Qemu,
    /// User-mode Linux.
    Uml,
}

/// A guest's user space, and with QEMU its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Distro {
    /// Debian 12.
    Bookworm,
    /// Debian 13.
    Trixie,
}

/// How much is installed in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Software {
    /// rdma-core, perftest and what they are used with.
    Base,
    /// And UCX, libfabric, and programs to run over the network.
    Apps,
}

/// A kind of guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// What runs it.
    pub vmm: Vmm,
    /// What is in it.
    pub distro: Distro,
    /// And how much of that.
    pub software: Software,
}

impl Vmm {
    /// As the launcher calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Uml => "uml",
        }
    }
}

impl Distro {
    /// As the launcher calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }
}

impl Software {
    /// As the launcher calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Apps => "apps",
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.vmm.name(), self.distro.name())
    }
}

impl Kind {
    /// With the base software.
    pub const fn base(vmm: Vmm, distro: Distro) -> Self {
        Self { vmm, distro, software: Software::Base }
    }

    fn arguments(self) -> [&'static str; 6] {
        ["--vmm", self.vmm.name(), "--distro", self.distro.name(), "--software", self.software.name()]
    }

    /// Has the launcher make and cache what such guests need; shows its progress.
    pub fn prepare(self) -> Result<()> {
        let mut child = Owned::spawn(launcher().arg("prepare").args(self.arguments()).stdin(Stdio::null()))?;
        let status = wait_for("preparation", Duration::from_hours(2), || child.ended())?;
        if !status.success() {
            bail!("guests of the kind {self} cannot be prepared ({status})");
        }
        Ok(())
    }
}

/// The launcher of guests.
fn launcher() -> Command {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../qemu/guest");
    Command::new(std::env::var_os("FREEFLOW_GUEST_BIN").map_or_else(own, PathBuf::from))
}

/// A path that the launcher prints, of something that it makes first if need be.
pub fn launcher_path(arguments: &[&str]) -> Result<PathBuf> {
    let output = launcher().args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.context("cannot start the launcher of guests")?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next_back() {
        Some(path) if output.status.success() => Ok(path.into()),
        _ => bail!("the launcher of guests has no {} ({})", arguments.join(" "), output.status),
    }
}

/// Where a guest is to run.
#[derive(Debug)]
pub struct Site<'a> {
    /// Folder shared by all guests of one bed.
    pub share: &'a Path,
    /// Plain IP network shared by them.
    pub net: &'a str,
    /// Socket of the virtual NIC.
    pub socket: PathBuf,
    /// Number of the virtual NIC.
    pub nic: usize,
}

/// A running guest. Dropping it ends it.
#[derive(Debug)]
pub struct Guest {
    launcher: Owned,
    /// Number of its virtual NIC.
    pub nic: usize,
    dir: PathBuf,
    next: Cell<u32>,
}

impl Guest {
    /// Starts one; [`wait_ready`](Self::wait_ready) tells when it is up.
    pub fn start(kind: Kind, site: &Site) -> Result<Self> {
        let name = name_of(site.nic);
        let dir = fresh(&site.share.join(name))?;
        let mut command = launcher();
        command.arg("run").args(kind.arguments()).args(["--net", site.net]);
        command.arg("--timeout").arg(patience(LIFE).as_secs().to_string()).arg("--nic");
        command.arg(&site.socket).arg("--ip").arg(format!("{}/24", address_of(site.nic)));
        command.arg("--share").arg(site.share);
        if kind.vmm == Vmm::Uml {
            command.args(["--pin", &core_of(site.nic).to_string()]);
        }
        let log = File::create(dir.join("launcher.log")).context("cannot make the guest's log")?;
        command.args(["--", "bash", "/share/agent", name]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Self { launcher: Owned::spawn(&mut command)?, nic: site.nic, dir, next: Cell::new(1) })
    }

    /// Waits until it takes scripts.
    pub fn wait_ready(&mut self) -> Result<()> {
        let ready = self.dir.join("ready");
        wait_for("the guest's start", BOOT, || {
            if let Some(status) = self.launcher.ended()? {
                bail!("guest {} did not start ({status}):\n{}", name_of(self.nic), self.log());
            }
            Ok(ready.exists().then_some(()))
        })
    }

    /// What the launcher printed.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("launcher.log")).unwrap_or_default()
    }

    /// Forgets that something listened on a TCP port in an earlier turn.
    pub fn forget_port(&self, port: u16) -> Result<()> {
        match fs::remove_file(self.dir.with_file_name(format!("listens.{port}"))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("cannot forget a port"),
            _ => Ok(()),
        }
    }

    /// Starts a script in the guest.
    pub fn start_script(&self, script: &str) -> Result<Job> {
        let number = self.next.replace(self.next.get() + 1);
        let path = self.dir.join(number.to_string());
        let draft = path.with_extension("draft");
        fs::write(&draft, format!("{script}\n")).context("cannot write a script")?;
        fs::rename(draft, path.with_extension("cmd")).context("cannot hand over a script")?;
        Ok(Job { path })
    }

    /// Runs a script to its end.
    pub fn run(&self, script: &str, timeout: Duration) -> Result<Done> {
        self.start_script(script)?.wait(timeout).with_context(|| format!("in the guest: {script}"))
    }

    /// Runs a script that must succeed; what it printed.
    pub fn must(&self, script: &str) -> Result<String> {
        let done = self.run(script, Duration::from_mins(1))?;
        if done.status != 0 {
            bail!("status {} of: {script}\n{}", done.status, done.output);
        }
        Ok(done.output)
    }

    /// kill -9.
    pub fn signal_kill(&self) {
        self.launcher.signal(Signal::SIGKILL);
    }

    /// Kills it as a crash of its VMM would.
    pub fn kill(mut self) -> Result<()> {
        self.signal_kill();
        wait_for("the guest's end", Duration::from_secs(10), || self.launcher.ended()).map(drop)
    }

    /// Shuts it down as its user would.
    pub fn shut_down(mut self) -> Result<()> {
        fs::write(self.dir.join("quit"), "").context("cannot ask the guest to end")?;
        let status = wait_for("the guest's end", Duration::from_secs(90), || self.launcher.ended())?;
        if !status.success() {
            bail!("guest {} ended with {status}:\n{}", name_of(self.nic), self.log());
        }
        Ok(())
    }
}

/// The host core that a User-mode Linux guest stays on.
fn core_of(nic: usize) -> usize {
    nic % std::thread::available_parallelism().map_or(1, usize::from)
}

/// An empty folder in the place of whatever was there.
fn fresh(dir: &Path) -> Result<PathBuf> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot empty {}", dir.display()))?;
    }
    fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir.to_owned())
}

/// A script under way in a guest.
#[derive(Debug)]
pub struct Job {
    path: PathBuf,
}

/// A script that ended.
#[derive(Debug, Clone)]
pub struct Done {
    /// Its exit status.
    pub status: i32,
    /// What it printed, and after that what it printed to standard error.
    pub output: String,
}

impl Job {
    /// Its end, if it has ended.
    pub fn poll(&self) -> Result<Option<Done>> {
        let text = fs::read_to_string(self.path.with_extension("status")).unwrap_or_default();
        let Some(status) = text.strip_suffix('\n') else { return Ok(None) };
        Ok(Some(Done { status: status.parse().context("not an exit status")?, output: self.output() }))
    }

    /// What it has printed so far (as far as the guest has written it out).
    pub fn output(&self) -> String {
        let read = |extension| fs::read(self.path.with_extension(extension)).unwrap_or_default();
        String::from_utf8_lossy(&[read("out"), read("err")].concat()).into_owned()
    }

    /// Waits for its end.
    pub fn wait(&self, timeout: Duration) -> Result<Done> {
        wait_for("the end of a program", timeout, || self.poll())
            .with_context(|| format!("it had printed:\n{}", self.output()))
    }
}
