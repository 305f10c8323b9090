//! The process that undoes what a run changes on the host.
//!
//! It lives outside of the run's namespaces and session, and acts when the launcher closes its standard input
//! or dies, so even a launcher killed with SIGKILL leaves nothing behind.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::net::{Membership, NetName, PortKind};

/// The launcher's end.
#[derive(Debug)]
pub struct Keeper {
    child: Child,
}

impl Keeper {
    /// Starts it, and waits until the network is there.
    pub fn start(net: &NetName, kind: PortKind, ports: &[String]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
        let kind = kind.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        command.args(["internal-keep", "--net", &net.to_string(), "--kind", &kind]).args(ports);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start the keeper")?;
        let mut answer = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut answer)?;
        }
        if answer != "ready\n" {
            child.wait()?;
            bail!("the network {net} could not be set up");
        }
        Ok(Self { child })
    }

    /// Has it clean up, and waits for that.
    pub fn finish(mut self) {
        drop(self.child.stdin.take());
        drop(self.child.wait());
    }
}

/// The keeper's own side.
pub fn keep(net: NetName, kind: PortKind, ports: Vec<String>) -> Result<()> {
    // Signals from the launcher's terminal are not for it.
    nix::unistd::setsid().context("cannot leave the session")?;
    let membership = Membership::join(net, kind, ports)?;
    let mut stdout = std::io::stdout();
    stdout.write_all(b"ready\n").and_then(|()| stdout.flush()).context("the launcher is gone")?;
    // The end of input is the only thing to wait for; an error means the same.
    drop(std::io::stdin().read_to_end(&mut Vec::new()));
    drop(membership);
    Ok(())
}
