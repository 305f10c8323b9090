//! Interrupting a guest through a descriptor that its VMM chose, without ever waiting for that VMM.
//!
//! The VMM holds the same open file. It may make it blocking and fill it at any moment, so only what cannot block whatever the
//! file's flags are is done to it.
//! * An eventfd is signalled by the kernel ([`Signaller`]).
//! * A local socket, which is what User-mode Linux gives (it cannot have signals from eventfds), is written with a flag
//!   of the call's own.
//! * Anything else is refused: even asking a file what it is can block where the VMM serves its file system.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SendFlags, send, sockopt};

use super::aio::Signaller;

/// Whether a descriptor is an eventfd, found out without asking the file.
pub fn is_eventfd(file: &File) -> bool {
    target(file).is_ok_and(|target| target == "anon_inode:[eventfd]")
}

fn is_local_socket(file: &File) -> bool {
    // Paths of files begin with a slash.
    let is_socket = target(file).is_ok_and(|target| target.starts_with("socket:["));
    is_socket && sockopt::socket_domain(file).is_ok_and(|domain| domain == AddressFamily::UNIX)
}

fn target(file: &File) -> io::Result<String> {
    let target = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok(target.to_string_lossy().into_owned())
}

/// The call descriptor of one virtqueue.
#[derive(Debug)]
pub enum Call {
    /// An eventfd.
    EventFd(File, &'static Signaller),
    /// A local stream socket.
    Socket(File),
}

impl Call {
    /// Takes what a VMM gave.
    ///
    /// # Errors
    /// When it is neither an eventfd nor a local socket, or this kernel cannot signal eventfds for us.
    pub fn new(file: File) -> io::Result<Self> {
        if is_eventfd(&file) {
            return Ok(Self::EventFd(file, Signaller::get()?));
        }
        if is_local_socket(&file) {
            return Ok(Self::Socket(file));
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a call descriptor that is neither an eventfd nor a local socket",
        ))
    }

    /// Interrupts the guest. Never blocks.
    pub fn ring(&self) {
        match self {
            // A failure is a full counter or a full socket: then the guest has interrupts to take, or its VMM does not want any.
            Self::EventFd(file, signaller) => {
                let _ = signaller.signal(file);
            }
            Self::Socket(file) => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                let _ = send(file, &1u64.to_ne_bytes(), flags);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, File) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, File::from(OwnedFd::from(theirs)))
    }

    #[test]
    fn a_socket_is_rung() {
        let (mut reader, file) = pair();
        let call = Call::new(file).unwrap();
        for _ in 0..3 {
            call.ring();
            reader.read_exact(&mut [0; 8]).unwrap();
        }
    }

    #[test]
    fn a_full_socket_and_a_closed_one_block_nobody() {
        let (reader, file) = pair();
        let call = Call::new(file).unwrap();
        for _ in 0..100_000 {
            call.ring();
        }
        drop(reader);
        call.ring();
    }

    #[test]
    fn files_pipes_and_other_sockets_are_refused() {
        let (_reader, writer) = io::pipe().unwrap();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let files = [File::open("/dev/null").unwrap(), OwnedFd::from(writer).into(), OwnedFd::from(socket).into()];
        for file in files {
            assert!(!is_eventfd(&file));
            assert!(Call::new(file).is_err());
        }
    }
}
