//! The daemon as a process, for tests; not every test program uses all of it.
#![allow(dead_code, reason = "shared by test programs")]

pub mod etcd;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use freeflow_router::api;
use freeflow_tests::bed::eventually;
use freeflow_tests::guest::{Guest, GuestConfig};
use freeflow_tests::router::TestRouter;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

/// How long anything may take that is to happen soon.
pub const SOON: Duration = Duration::from_secs(10);

/// A guest with the addresses of the test bed's virtual NIC of this number, on a socket.
pub fn guest_on(socket: &Path, nic: usize) -> Guest {
    let config = GuestConfig { gids: TestRouter::gids_of(nic), ..GuestConfig::default() };
    Guest::connect(socket, config).unwrap()
}

/// A folder for a daemon's files, which may have several daemons one after the other.
#[derive(Debug)]
pub struct Place(tempfile::TempDir);

impl Place {
    /// A new one, that the user of the daemon may use.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        if Uid::effective().is_root() {
            // The folder is private, and the daemon must get through.
            std::os::unix::fs::chown(dir.path(), Some(65534), None).unwrap();
        }
        Self(dir)
    }

    /// Where sockets go.
    pub fn run(&self) -> PathBuf {
        self.0.path().join("run")
    }

    /// The file of virtual NICs that were added.
    pub fn state(&self) -> PathBuf {
        self.0.path().join("state").join("nics.toml")
    }

    /// What a daemon says that does not start with these arguments.
    pub fn refuses(&self, args: &[&str]) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_freeflow-router"));
        command.arg("--control").arg(self.run().join("control.sock")).arg("--state").arg(self.state());
        let output = command.args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// A daemon with so many virtual NICs from its command line, as `nobody` where we may choose.
    pub fn start(&self, nics: usize) -> Daemon<'_> {
        self.start_with(nics, &[])
    }

    /// The same, with more arguments.
    pub fn start_with(&self, nics: usize, args: &[&str]) -> Daemon<'_> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_freeflow-router"));
        command.arg("--control").arg(self.run().join("control.sock")).arg("--state").arg(self.state());
        for nic in 0..nics {
            let (n, socket) = (nic + 1, self.run().join(format!("nic{nic}")));
            let nic = format!("name=n{nic},ip=10.0.0.{n},ip=fd00::{n},mac=02:00:00:00:00:0{n}");
            command.args(["--nic", &format!("{nic},socket={}", socket.display())]);
        }
        if Uid::effective().is_root() {
            command.args(["--user", "65534"]);
        }
        let child = command.args(args).stderr(Stdio::piped()).spawn().unwrap();
        let daemon = Daemon { child, place: self };
        eventually("start of the daemon", SOON, || api::nics(&daemon.control()).is_ok());
        daemon
    }
}

/// A daemon that is killed when a test fails.
#[derive(Debug)]
pub struct Daemon<'a> {
    pub child: Child,
    place: &'a Place,
}

impl Daemon<'_> {
    /// A file in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.place.run().join(name)
    }

    /// Its control socket.
    pub fn control(&self) -> PathBuf {
        self.path("control.sock")
    }

    /// A guest of a virtual NIC of the command line.
    pub fn guest(&self, nic: usize) -> Guest {
        guest_on(&self.path(&format!("nic{nic}")), nic)
    }

    /// `freeflow ARGS`.
    pub fn freeflow(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_freeflow"));
        command.arg("--control").arg(self.control()).args(args).output().unwrap()
    }

    /// What `freeflow ARGS` prints, when it works.
    pub fn says(&self, args: &[&str]) -> String {
        let output = self.freeflow(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// Its mistake, when it does not.
    pub fn fails(&self, args: &[&str]) -> String {
        let output = self.freeflow(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Ends it with SIGTERM; how it ended, and its log.
    pub fn stop(mut self) -> (ExitStatus, String) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
        let status = self.child.wait().unwrap();
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        let left: Vec<_> = std::fs::read_dir(self.place.run()).unwrap().collect();
        assert!(left.is_empty(), "sockets stay behind: {left:?}\n{log}");
        (status, log)
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        // It has ended already, or a test has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
