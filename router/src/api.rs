//! The daemon's Unix socket: one request, one answer, each a line of JSON. Who may open the socket may ask.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use freeflow_backend::{NicStatus, QpStatus, Rates, WorkerStatus};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::acceptor::Acceptor;
use crate::cluster::directory::View;
use crate::cluster::status::HostStatus;
use crate::files::{Direct, Files, make_parent};
use crate::inventory::NewNic;
use crate::router::{Added, RateSet, Removed, Router};

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Virtual NICs; answered with a list of [`NicStatus`].
    Nics,
    /// Queue pairs; answered with a list of [`QpStatus`].
    Qps,
    /// Counters; answered with [`Stats`].
    Stats,
    /// A virtual NIC is to be there; answered with [`Added`].
    NicAdd(Box<NewNic>),
    /// The virtual NIC of this name is to be gone; answered with [`Removed`].
    NicDel(String),
    /// The virtual NIC of this name is to be so fast; answered with [`RateSet`].
    NicRate(String, Rates),
    /// Who lives where on all hosts, of one tenant or of all; answered with [`View`].
    Directory(Option<String>),
    /// Other hosts; answered with a list of [`HostStatus`].
    Hosts,
}

/// Answer to [`Request::Stats`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stats {
    /// Objects and counters of each virtual NIC.
    pub nics: Vec<NicStatus>,
    /// Data-path workers.
    pub workers: Vec<WorkerStatus>,
}

/// An answer, or why there is none.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply<T> {
    Ok(T),
    Error(String),
}

/// Most bytes of a request.
const MAX_REQUEST: u64 = 64 * 1024;
/// What a router says that is asked for other hosts without any.
const ALONE: &str = "this router knows no other hosts: its configuration has no [cluster]";
/// How long a client may take.
const TIMEOUT: Duration = Duration::from_secs(2);

/// How long the daemon may take: a virtual NIC whose VMM does not let go of it takes ten seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// The thread that answers.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    _acceptor: Acceptor<UnixListener>,
}

impl Server {
    /// Listens on `path` for whoever the file's permissions (owner and group) admit.
    ///
    /// # Errors
    /// When another daemon listens there, or the socket cannot be made.
    pub fn start(path: &Path, router: Arc<Router>) -> Result<Self> {
        make_parent(path)?;
        let listener =
            Direct::default().listen(path).with_context(|| format!("cannot listen on {}", path.display()))?;
        let acceptor = Acceptor::start("control", listener, move |stream| answer(stream, &router))?;
        Ok(Self { path: path.to_owned(), _acceptor: acceptor })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn answer(mut stream: UnixStream, router: &Router) -> io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut line = String::new();
    BufReader::new((&stream).take(MAX_REQUEST)).read_line(&mut line)?;
    if line.is_empty() {
        return Ok(());
    }
    let mut reply = match serde_json::from_str(&line) {
        Ok(request) => fulfil(request, router),
        Err(error) => Err(anyhow!("not a request: {error}")),
    }
    .and_then(|value| Ok(serde_json::to_string(&Reply::Ok(value))?))
    .or_else(|error| serde_json::to_string(&Reply::<()>::Error(format!("{error:#}"))))?;
    reply.push('\n');
    stream.write_all(reply.as_bytes())
}

fn fulfil(request: Request, router: &Router) -> Result<Value> {
    Ok(match request {
        Request::Nics => serde_json::to_value(router.nics()),
        Request::Qps => serde_json::to_value(router.qps()),
        Request::Stats => serde_json::to_value(Stats { nics: router.nics(), workers: router.workers() }),
        Request::NicAdd(nic) => serde_json::to_value(router.add(*nic)?),
        Request::NicDel(name) => serde_json::to_value(router.remove(name)?),
        Request::Directory(tenant) => serde_json::to_value(router.directory(tenant.as_deref()).context(ALONE)?),
        Request::Hosts => serde_json::to_value(router.sessions().context(ALONE)?.hosts()),
        Request::NicRate(name, rate) => serde_json::to_value(router.set_rate(&name, rate)?),
    }?)
}

/// Asks the daemon behind `socket`.
///
/// # Errors
/// When there is no daemon, it does not answer in time, or it refuses.
pub fn ask<T: DeserializeOwned>(socket: &Path, request: &Request) -> Result<T> {
    let mut stream = UnixStream::connect(socket).map_err(|error| unreachable(socket, error))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply).context("the router did not answer")?;
    match serde_json::from_str(&reply).context("the router's answer is of another version")? {
        Reply::Ok(value) => Ok(value),
        Reply::Error(why) => bail!("the router refused: {why}"),
    }
}

fn unreachable(socket: &Path, error: io::Error) -> anyhow::Error {
    let advice = match error.kind() {
        ErrorKind::PermissionDenied => "the socket's owner and group may, and root",
        _ => "is it running? another socket: --control",
    };
    anyhow::Error::new(error).context(format!("cannot reach freeflow-router at {} ({advice})", socket.display()))
}

/// Virtual NICs of the daemon behind `socket`.
///
/// # Errors
/// As [`ask`].
pub fn nics(socket: &Path) -> Result<Vec<NicStatus>> {
    ask(socket, &Request::Nics)
}

/// Queue pairs of the daemon behind `socket`.
///
/// # Errors
/// As [`ask`].
pub fn qps(socket: &Path) -> Result<Vec<QpStatus>> {
    ask(socket, &Request::Qps)
}

/// Counters of the daemon behind `socket`.
///
/// # Errors
/// As [`ask`].
pub fn stats(socket: &Path) -> Result<Stats> {
    ask(socket, &Request::Stats)
}

/// Other hosts as the daemon behind `socket` sees them.
///
/// # Errors
/// As [`ask`], and without other hosts.
pub fn hosts(socket: &Path) -> Result<Vec<HostStatus>> {
    ask(socket, &Request::Hosts)
}

/// Who lives where, of one tenant or of all, as the daemon behind `socket` knows it.
///
/// # Errors
/// As [`ask`], and without a directory.
pub fn directory(socket: &Path, tenant: Option<&str>) -> Result<View> {
    ask(socket, &Request::Directory(tenant.map(str::to_owned)))
}

/// Adds a virtual NIC to the daemon behind `socket`.
///
/// # Errors
/// As [`ask`].
pub fn add(socket: &Path, nic: NewNic) -> Result<Added> {
    ask(socket, &Request::NicAdd(Box::new(nic)))
}

/// Removes one.
///
/// # Errors
/// As [`ask`].
pub fn remove(socket: &Path, name: &str) -> Result<Removed> {
    ask(socket, &Request::NicDel(name.to_owned()))
}

/// Changes how fast one may be.
///
/// # Errors
/// As [`ask`].
pub fn set_rate(socket: &Path, name: &str, rate: Rates) -> Result<RateSet> {
    ask(socket, &Request::NicRate(name.to_owned(), rate))
}
