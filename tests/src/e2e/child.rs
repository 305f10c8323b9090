//! Child processes that go when their handle does.

use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a child may take to end after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(20);

/// A child process. Dropping it ends it with SIGTERM, and with SIGKILL when that does not help.
#[derive(Debug)]
pub struct Owned {
    child: Child,
}

impl Owned {
    /// Starts it, in a process group of its own: a terminal's Ctrl-C is for us, and we end it.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        std::os::unix::process::CommandExt::process_group(command, 0);
        let child = command.spawn().with_context(|| format!("cannot start {}", command.get_program().display()))?;
        Ok(Self { child })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, once it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Sends it a signal; one that has ended does not mind.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), signal);
    }

    /// Waits for its end without regard to interrupts, for clean-up.
    pub fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Ok(status) => return status,
                Err(_) => return None,
            }
        }
        None
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal(Signal::SIGTERM);
            if self.wait(PATIENCE).is_none() {
                self.signal(Signal::SIGKILL);
                drop(self.child.wait());
            }
        }
    }
}

/// A program of this project: named by an environment variable, or beside this one.
pub fn sibling(variable: &str, name: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let path = std::env::current_exe().context("cannot find this program")?.with_file_name(name);
    path.is_file().then_some(path.clone()).with_context(|| {
        format!("{} is missing: build it with `cargo build --release`, or set {variable}", path.display())
    })
}
