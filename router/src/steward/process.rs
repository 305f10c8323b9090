//! The steward's own life.

use std::fs::Metadata;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::{Answer, Order, orders};
use crate::files::{Direct, Files};
use crate::sandbox::{Sandbox, Security, Uses};

/// Takes orders from `stream` until the daemon at its other end is gone.
///
/// # Errors
/// When privileges cannot be given up, or the connection breaks.
pub fn serve(stream: &UnixStream, security: &Security, files: &Direct) -> Result<()> {
    // A terminal's and a service manager's signals come to both processes, and the daemon may need sockets removed after them.
    let ignored =
        [SIGINT, SIGTERM, SIGHUP].map(|signal| signal_hook::flag::register(signal, std::sync::Arc::default()));
    ignored.into_iter().collect::<io::Result<Vec<_>>>().context("cannot ignore signals")?;
    Sandbox::new(security, Uses::default())?.enter_steward()?;
    let mut made = Made::default();
    for order in orders(stream) {
        match order.context("the daemon's orders cannot be read")? {
            Order::Listen(path) => answer_with(stream, listen(files, &path, &mut made)),
            Order::Save(text) => answer(stream, files.save(&text), None),
            Order::OpenDirectory => answer_with(stream, files.open_directory()),
            Order::OpenTls(which) => answer_with(stream, files.open_tls(which)),
        }
        .context("the daemon does not take answers")?;
    }
    Ok(())
}

fn listen(files: &Direct, path: &Path, made: &mut Made) -> io::Result<UnixListener> {
    let listener = files.listen(path)?;
    made.note(path);
    Ok(listener)
}

fn answer_with(stream: &UnixStream, result: io::Result<impl AsFd>) -> io::Result<()> {
    match result {
        Ok(descriptor) => answer(stream, Ok(()), Some(descriptor.as_fd())),
        Err(error) => answer(stream, Err(error), None),
    }
}

fn answer(stream: &UnixStream, result: io::Result<()>, with: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let answer = match result {
        Ok(()) => Answer::Done,
        Err(error) => Answer::Failed { errno: error.raw_os_error(), why: error.to_string() },
    };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    let descriptors: Vec<_> = with.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    // Short, so that it is sent as a whole.
    sendmsg(stream, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Sockets that were made here. When it is dropped, those that are still the same files are removed.
#[derive(Debug, Default)]
struct Made(Vec<(PathBuf, (u64, u64))>);

impl Made {
    fn note(&mut self, path: &Path) {
        self.0.retain(|(known, _)| known != path);
        self.0.extend(identity(path).map(|identity| (path.to_owned(), identity)));
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let is_socket = |metadata: &Metadata| metadata.file_type().is_socket();
    std::fs::symlink_metadata(path).ok().filter(is_socket).map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Drop for Made {
    fn drop(&mut self) {
        for (path, made) in &self.0 {
            if identity(path) == Some(*made)
                && let Err(error) = std::fs::remove_file(path)
            {
                log::debug!("cannot remove {}: {error}", path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_took_the_place_of_a_socket_stays() {
        let folder = tempfile::tempdir().unwrap();
        let [ours, replaced, removed] = ["ours", "replaced", "removed"].map(|name| folder.path().join(name));
        let mut made = Made::default();
        let _listeners = [&ours, &replaced, &removed].map(|path| {
            let listener = UnixListener::bind(path).unwrap();
            made.note(path);
            listener
        });
        std::fs::remove_file(&removed).unwrap();
        std::fs::remove_file(&replaced).unwrap();
        std::fs::write(&replaced, "another's").unwrap();
        drop(made);
        assert_eq!([ours.exists(), replaced.exists()], [false, true]);
    }
}
