//! A process beside the daemon that uses the file system for it.
//!
//! The daemon works on what hostile guests write, and gives up opening files and making sockets before the first guest comes. What it still needs of both
//! when virtual NICs come and go is done by the steward: a process of the same user that sees nothing of any guest, takes a few
//! orders ([`Order`]), and hands listening sockets over. When the daemon ends, in whatever way, the steward removes what sockets are left and ends too.

mod process;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::{Deserialize, Serialize};

use crate::files::{Direct, Files, TlsFile};
use crate::sandbox::Security;

pub use self::process::serve;

/// How long the steward may take for an order.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What the daemon may ask for; a line of JSON each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// A socket at this path; the answer brings it along.
    Listen(PathBuf),
    /// Keep this text in the file that the steward was started with.
    Save(String),
    /// The directory's file that the steward was started with; the answer brings it along, opened for reading.
    OpenDirectory,
    /// One of the files with certificates that it was started with, likewise.
    OpenTls(TlsFile),
}

/// What came of it; a line of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Done,
    Failed {
        /// Of the system, if it was the system.
        errno: Option<i32>,
        why: String,
    },
}

/// The steward, as the daemon has it.
#[derive(Debug)]
pub struct Steward {
    /// `None` once it has been told to end.
    stream: Mutex<Option<UnixStream>>,
    child: Child,
}

impl Steward {
    /// Starts it from the daemon's own program, `freeflow-router steward`. What it gives up is its own business, and the same.
    ///
    /// # Errors
    /// When the system gives no process.
    pub fn start(security: &Security, files: &Direct) -> Result<Self> {
        let (ours, its) = UnixStream::pair().context("cannot make a pair of sockets")?;
        ours.set_read_timeout(Some(TIMEOUT))?;
        ours.set_write_timeout(Some(TIMEOUT))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("steward").arg("--seccomp").arg(security.seccomp.to_string());
        if let Some(user) = &security.user {
            command.arg("--user").arg(user);
        }
        let tls = files.tls.as_ref();
        for (option, path) in [
            ("--state", files.state.as_ref()),
            ("--directory", files.directory.as_ref()),
            ("--ca", tls.map(|tls| &tls.ca)),
            ("--cert", tls.map(|tls| &tls.cert)),
            ("--key", tls.map(|tls| &tls.key)),
        ] {
            command.args(path.map(|path| [OsStr::new(option), path.as_os_str()]).into_iter().flatten());
        }
        let child = command
            .stdin(Stdio::from(OwnedFd::from(its)))
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start the steward")?;
        Ok(Self { stream: Mutex::new(Some(ours)), child })
    }

    fn order(&self, order: &Order) -> io::Result<Option<OwnedFd>> {
        let mut slot = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = slot.as_mut().ok_or_else(|| ErrorKind::NotConnected.into()).and_then(|stream| ask(stream, order));
        let (answer, descriptor) = asked.map_err(|error| {
            // An answer that is late must not be taken for that of the next order.
            *slot = None;
            let what = "the steward, which makes sockets and files, does not answer";
            io::Error::new(error.kind(), format!("{what} ({error}): restart freeflow-router"))
        })?;
        match answer {
            Answer::Done => Ok(descriptor),
            Answer::Failed { errno: Some(errno), .. } => Err(io::Error::from_raw_os_error(errno)),
            Answer::Failed { errno: None, why } => Err(io::Error::other(why)),
        }
    }
}

impl Steward {
    fn open(&self, order: &Order) -> io::Result<File> {
        self.order(order)?.map(File::from).ok_or_else(|| io::Error::other("the steward sent no file"))
    }
}

impl Files for Steward {
    fn listen(&self, path: &Path) -> io::Result<UnixListener> {
        let descriptor = self.order(&Order::Listen(path.to_owned()))?;
        descriptor.map(UnixListener::from).ok_or_else(|| io::Error::other("the steward sent no socket"))
    }

    fn save(&self, text: &str) -> io::Result<()> {
        self.order(&Order::Save(text.to_owned())).map(drop)
    }

    fn open_directory(&self) -> io::Result<File> {
        self.open(&Order::OpenDirectory)
    }

    fn open_tls(&self, which: TlsFile) -> io::Result<File> {
        self.open(&Order::OpenTls(which))
    }
}

impl Drop for Steward {
    fn drop(&mut self) {
        *self.stream.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        if let Err(error) = self.child.wait() {
            log::debug!("cannot wait for the steward: {error}");
        }
    }
}

fn ask(stream: &mut UnixStream, order: &Order) -> io::Result<(Answer, Option<OwnedFd>)> {
    let mut line = serde_json::to_vec(order)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let (line, descriptor) = receive(stream)?;
    Ok((serde_json::from_slice(&line)?, descriptor))
}

/// A line, and the descriptor that came with it.
fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let (mut line, mut descriptor) = (Vec::new(), None);
    while line.last() != Some(&b'\n') {
        let mut bytes = [0; 1024];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        if received.bytes == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(&bytes[..received.bytes]);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                descriptor = descriptors.last().or(descriptor);
            }
        }
    }
    Ok((line, descriptor))
}

/// Orders as they come; ends when the daemon does.
fn orders(stream: &UnixStream) -> impl Iterator<Item = io::Result<Order>> {
    let lines = BufReader::new(stream).lines();
    lines.map(|line| line.and_then(|line| Ok(serde_json::from_str(&line)?)))
}
