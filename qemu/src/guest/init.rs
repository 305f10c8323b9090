//! The first process of a guest's namespaces: prepares them, starts the virtual machine monitor, and ends with it.
//!
//! It is process 1 of its process namespace, so the kernel kills everything in there when it ends. It
//! ends when its standard input does, which the launcher holds open.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// What to start, and where.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The network namespace's file.
    pub namespace: PathBuf,
    /// Host CPUs to stay on; empty for all.
    pub cpus: Vec<usize>,
    /// The command line of the virtual machine monitor.
    pub argv: Vec<OsString>,
    /// Where its own messages go.
    pub console: PathBuf,
    /// Its folder for temporary files.
    pub tmp: PathBuf,
}

/// Carries out the plan in the file `path`; returns the exit status for this process.
pub fn run(path: &Path) -> Result<u8> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("cannot ask to die with the launcher")?;
    SigSet::empty().thread_set_mask().context("cannot unblock signals")?;
    nix::unistd::setsid().context("cannot make a session")?;
    let plan: Plan = serde_json::from_slice(&std::fs::read(path).context("cannot read the plan")?)?;
    watch_lifeline();
    isolate(&plan)?;
    let child = command(&plan)?.spawn().with_context(|| format!("cannot start {}", plan.argv[0].display()))?;
    reap(Pid::from_raw(child.id().cast_signed()))
}

/// Ends this process, and with it the whole guest, when the launcher is gone.
fn watch_lifeline() {
    std::thread::spawn(|| {
        drop(std::io::stdin().read_to_end(&mut Vec::new()));
        std::process::exit(1);
    });
}

fn isolate(plan: &Plan) -> Result<()> {
    let namespace = File::open(&plan.namespace).with_context(|| format!("cannot open {}", plan.namespace.display()))?;
    setns(namespace, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).context("cannot detach the mounts")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("cannot mount /proc")?;
    if plan.cpus.is_empty() { Ok(()) } else { run_on(&plan.cpus).context("cannot keep the guest on its CPUs") }
}

/// Keeps this thread, and what it starts, on these CPUs.
pub fn run_on(cpus: &[usize]) -> nix::Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().try_for_each(|cpu| set.set(*cpu))?;
    sched_setaffinity(Pid::from_raw(0), &set)
}

fn command(plan: &Plan) -> Result<Command> {
    let (program, args) = plan.argv.split_first().ok_or_else(|| anyhow!("an empty plan"))?;
    let console = File::options().append(true).open(&plan.console).context("cannot write the guest's messages")?;
    // For a shell, standard output is the terminal (to read from, too), else it is nothing.
    let terminal: OwnedFd = nix::unistd::dup(std::io::stdout())?;
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::from(terminal)).stdout(console.try_clone()?).stderr(console);
    command.env("TMPDIR", &plan.tmp);
    Ok(command)
}

/// Waits for the virtual machine monitor, and for orphans as process 1 has to.
fn reap(main: Pid) -> Result<u8> {
    loop {
        match wait().context("cannot wait for the guest")? {
            WaitStatus::Exited(pid, status) if pid == main => return Ok(u8::try_from(status).unwrap_or(u8::MAX)),
            WaitStatus::Signaled(pid, signal, _) if pid == main => return Ok(128 + signal as u8),
            _ => {}
        }
    }
}
