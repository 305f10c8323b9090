//! A program with its server in one guest and its client in another, or in the same.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::guest::{Done, Guest, Job};
use super::interrupt::{patience, pause};
use super::perf::{Program, Row};
use super::router::address_of;

/// TCP ports for the programs' own exchange: each pair takes the next, below those that kernels hand out.
static PORT: AtomicU16 = AtomicU16::new(FIRST_PORT);
const FIRST_PORT: u16 = 18_000;
const LAST_PORT: u16 = 32_000;
/// How long one end may outlive the failure of the other.
const GRACE: Duration = Duration::from_secs(3);

/// One of two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Listens.
    Server,
    /// Connects.
    Client,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

/// The two ends of a running program.
#[derive(Debug)]
pub struct Pair<'a> {
    ends: [(&'a Guest, Job); 2],
    port: u16,
}

/// How both ended.
#[derive(Debug)]
pub struct Ended {
    /// The server.
    pub server: Done,
    /// The client.
    pub client: Done,
}

impl<'a> Pair<'a> {
    /// Starts a command (made from the port) as server, and with the server's address as client.
    pub fn start(server: &'a Guest, client: &'a Guest, command: impl Fn(u16) -> String) -> Result<Self> {
        Self::start_at([server, client], "rescan", &address_of(server.nic).to_string(), command)
    }

    /// Starts two scripts, which listen and connect by themselves on the port that they are made from.
    pub fn start_scripts(server: &'a Guest, client: &'a Guest, scripts: impl Fn(u16) -> [String; 2]) -> Result<Self> {
        let port = next_port();
        server.forget_port(port)?;
        let [server_script, client_script] = scripts(port);
        let ends = [(server, server.start_script(&server_script)?), (client, client.start_script(&client_script)?)];
        Ok(Self { ends, port })
    }

    /// Starts both ends in one guest, on one of its RDMA devices, which has this address.
    pub fn start_on(guest: &'a Guest, device: &str, address: &str, command: impl Fn(u16) -> String) -> Result<Self> {
        Self::start_at([guest, guest], &format!("DEV={device}; rescan"), address, command)
    }

    fn start_at(
        [server, client]: [&'a Guest; 2],
        prepare: &str,
        address: &str,
        command: impl Fn(u16) -> String,
    ) -> Result<Self> {
        let port = next_port();
        server.forget_port(port)?;
        let command = command(port);
        let server_job = server.start_script(&format!("{prepare} && serve {port} {command}"))?;
        let client_job = client.start_script(&format!("{prepare} && connect {port} {command} {address}"))?;
        Ok(Self { ends: [(server, server_job), (client, client_job)], port })
    }

    fn end(&self, role: Role) -> &(&'a Guest, Job) {
        &self.ends[role as usize]
    }

    /// The guest of one end.
    pub fn guest(&self, role: Role) -> &'a Guest {
        self.end(role).0
    }

    /// What one end has printed, as far as its guest has written it out.
    pub fn output(&self, role: Role) -> String {
        self.end(role).1.output()
    }

    /// kill -9 of one end.
    pub fn kill(&self, role: Role) -> Result<()> {
        let (guest, _) = self.end(role);
        guest.run(&format!("die {} {}", self.port, role.name()), Duration::from_secs(30)).map(drop)
    }

    /// Waits for one end.
    pub fn wait_one(&self, role: Role, timeout: Duration) -> Result<Done> {
        self.end(role).1.wait(timeout).with_context(|| format!("{} does not end", role.name()))
    }

    /// Waits for both; ends that hang are killed.
    pub fn wait(&self, timeout: Duration) -> Result<Ended> {
        let timeout = patience(timeout);
        let mut deadline = Instant::now() + timeout;
        loop {
            let [server, client] = [self.end(Role::Server).1.poll()?, self.end(Role::Client).1.poll()?];
            match (server, client) {
                (Some(server), Some(client)) => return Ok(Ended { server, client }),
                (Some(one), None) | (None, Some(one)) if one.status != 0 => {
                    deadline = deadline.min(Instant::now() + patience(GRACE));
                }
                _ => {}
            }
            if Instant::now() > deadline {
                return self.give_up(timeout);
            }
            pause()?;
        }
    }

    fn give_up(&self, timeout: Duration) -> Result<Ended> {
        let mut report = format!("no end within {} s", timeout.as_secs());
        for role in [Role::Server, Role::Client] {
            let (_, job) = self.end(role);
            let was = job.poll()?;
            if was.is_none() {
                self.kill(role)?;
            }
            let done = job.wait(Duration::from_secs(20)).context("it survives kill -9")?;
            let state = was.map_or_else(|| "was hanging".to_owned(), |done| format!("status {}", done.status));
            let _ = write!(report, "\n{} ({state}):\n{}", role.name(), done.output);
        }
        bail!(report)
    }
}

/// How long a program may take; under emulation `-a` is a minute.
pub const PATIENCE: Duration = Duration::from_mins(2);

/// Runs a program between two guests to its end; its figure.
pub fn run(server: &Guest, client: &Guest, program: &Program) -> Result<Row> {
    let pair = Pair::start(server, client, |port| program.command(port))?;
    judge(&pair.wait(PATIENCE)?, program)
}

/// Runs several at once.
pub fn run_all<'a>(pairs: impl Iterator<Item = (&'a Guest, &'a Guest, Program)>) -> Result<()> {
    let pairs = pairs
        .map(|(server, client, program)| Ok((Pair::start(server, client, |port| program.command(port))?, program)));
    let pairs: Vec<_> = pairs.collect::<Result<_>>()?;
    let ended = pairs.iter().map(|(pair, program)| judge(&pair.wait(PATIENCE)?, program).map(drop));
    // All are waited for before the first failure is reported.
    let ended: Vec<_> = ended.collect();
    ended.into_iter().collect()
}

/// Whether both ends are content; the figure.
pub fn judge(ended: &Ended, program: &Program) -> Result<Row> {
    let Ended { server, client } = ended;
    let outputs = || format!("server:\n{}\nclient:\n{}", server.output, client.output);
    if server.status != 0 || client.status != 0 {
        bail!("server status {}, client status {}\n{}", server.status, client.status, outputs());
    }
    program.read(&client.output).with_context(outputs)
}

fn next_port() -> u16 {
    let next = |port: u16| Some(if port >= LAST_PORT { FIRST_PORT } else { port + 1 });
    PORT.fetch_update(Relaxed, Relaxed, next).unwrap_or(FIRST_PORT)
}
