//! Watches a running guest: its output, its status file, its process, the clock, and signals to the launcher.

use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Child;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::output::{Progress, Tail};
use super::workspace::Workspace;

/// Signals that end the guest.
const ENDING_SIGNALS: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

/// How a guest ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// The command ended with this status.
    Status(u8),
    /// The launcher got this signal.
    Signal(u8),
    /// The launcher's output was closed.
    OutputClosed,
    /// The time was up.
    Timeout,
    /// The guest did not come up, or died.
    Failed(&'static str),
}

/// The watching side of a guest.
#[derive(Debug)]
pub struct Supervisor {
    signals: SignalFd,
    files: Inotify,
    status: PathBuf,
    tails: Vec<Tail<Output>>,
    deadline: Option<Instant>,
}

/// One of this process's outputs.
#[derive(Debug)]
enum Output {
    Stdout(std::io::Stdout),
    Stderr(std::io::Stderr),
}

impl AsFd for Output {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Stdout(stdout) => stdout.as_fd(),
            Self::Stderr(stderr) => stderr.as_fd(),
        }
    }
}

impl Supervisor {
    /// Starts watching; from here on signals are handled by [`wait`](Self::wait).
    pub fn new(workspace: &Workspace, deadline: Option<Instant>, verbose: bool) -> Result<Self> {
        let mut set: SigSet = ENDING_SIGNALS.into_iter().collect();
        set.add(Signal::SIGCHLD);
        set.thread_block().context("cannot block signals")?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context("cannot watch signals")?;
        let files = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context("cannot watch files")?;
        files.add_watch(&workspace.ctl(), AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE)?;
        let ctl = workspace.ctl();
        let mut tails = vec![
            Tail::new(&ctl.join("stdout"), Output::Stdout(std::io::stdout())),
            Tail::new(&ctl.join("stderr"), Output::Stderr(std::io::stderr())),
        ];
        if verbose {
            files.add_watch(&workspace.console(), AddWatchFlags::IN_MODIFY)?;
            tails.push(Tail::new(&workspace.console(), Output::Stderr(std::io::stderr())));
        }
        Ok(Self { signals, files, status: ctl.join("status"), tails, deadline })
    }

    /// Waits until the guest has ended, or ends it.
    pub fn wait(mut self, mut child: Child) -> Result<Ending> {
        let ending = self.watch(&mut child);
        // Killing the first process of the namespace kills them all; waiting for it waits for them all.
        drop(child.kill());
        child.wait().context("cannot wait for the guest's processes")?;
        ending
    }

    fn watch(&mut self, child: &mut Child) -> Result<Ending> {
        loop {
            // The order matters: what came before the status has been written when the status is there.
            let ended = child.try_wait().context("cannot wait for the guest")?.is_some();
            let status = fs::read_to_string(&self.status).ok().filter(|text| text.ends_with('\n'));
            let progress = self.pump()?;
            if progress.contains(&Progress::Closed) {
                return Ok(Ending::OutputClosed);
            }
            if !progress.contains(&Progress::Blocked) {
                match status {
                    Some(text) => return Ok(parse_status(&text)),
                    None if ended => return Ok(Ending::Failed("the guest ended before its command did")),
                    None => {}
                }
            }
            if let Some(ending) = self.pause(&progress)? {
                return Ok(ending);
            }
        }
    }

    fn pump(&mut self) -> Result<Vec<Progress>> {
        self.tails.iter_mut().map(Tail::pump).collect()
    }

    /// Sleeps until something happens.
    fn pause(&mut self, progress: &[Progress]) -> Result<Option<Ending>> {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(Some(Ending::Timeout));
        }
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.files.as_fd(), PollFlags::POLLIN),
        ];
        let blocked = self.tails.iter().zip(progress).filter(|(_, progress)| **progress == Progress::Blocked);
        fds.extend(blocked.map(|(tail, _)| PollFd::new(tail.output(), PollFlags::POLLOUT)));
        let millis = left.map_or(-1, |left| i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX));
        match poll(&mut fds, PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for the guest"),
        }
        // Only wakes us up: which file it was does not matter.
        drop(self.files.read_events());
        self.signal()
    }

    fn signal(&self) -> Result<Option<Ending>> {
        while let Some(info) = self.signals.read_signal().context("cannot read a signal")? {
            let signal = info.ssi_signo as u8;
            if i32::from(signal) != Signal::SIGCHLD as i32 {
                return Ok(Some(Ending::Signal(signal)));
            }
        }
        Ok(None)
    }
}

fn parse_status(text: &str) -> Ending {
    text.trim().parse().map_or(Ending::Failed("the guest could not be set up"), Ending::Status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_a_number_or_a_failure() {
        assert_eq!(parse_status("7\n"), Ending::Status(7));
        assert!(matches!(parse_status("failed\n"), Ending::Failed(_)));
        assert!(matches!(parse_status("300\n"), Ending::Failed(_)));
    }
}
