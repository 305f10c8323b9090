#![expect(unsafe_code, reason = "system calls that read and write memory that guests share")]
//! Bytes between sockets and guest memory, without a copy of our own in between.
//!
//! The kernel checks the addresses that it is given: memory that is gone (a VMM may shorten the file behind it) makes a call fail with
//! `EFAULT`, or end early. [`touch`](super::touch) makes of that what it is everywhere else.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use super::Seg;

/// Pieces that one call takes; more are left for the next.
pub const MOST_PIECES: usize = 64;

/// What is sent, in order.
#[derive(Debug, Clone, Copy)]
pub enum Piece<'a> {
    /// Our own bytes.
    Own(&'a [u8]),
    /// A guest's.
    Guest(Seg),
}

const NOTHING: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// Sends as much of these as the socket takes now. How many bytes.
///
/// # Errors
/// `WouldBlock` when it takes nothing; what the socket has failed with; `EFAULT` when memory of a guest's is gone.
pub fn send(socket: &TcpStream, pieces: &[Piece<'_>]) -> io::Result<usize> {
    if let [Piece::Own(bytes)] = pieces {
        return send_own(socket, bytes);
    }
    let mut vectors = [NOTHING; MOST_PIECES];
    for (vector, piece) in vectors.iter_mut().zip(pieces) {
        *vector = match piece {
            Piece::Own(bytes) => libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() },
            Piece::Guest(seg) => libc::iovec { iov_base: seg.ptr.cast(), iov_len: seg.len },
        };
    }
    let message = message(&mut vectors, pieces.len());
    // SAFETY: `message` names `vectors`, which outlive the call, and these name borrowed bytes of ours, or segments, which lie in live
    // mappings; they are read from only. The descriptor is open.
    let sent =
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives what has come, first into guest memory, then into our own. How many bytes; 0 when the other end has closed.
///
/// # Errors
/// As [`send`].
pub fn receive(socket: &TcpStream, guest: &[Seg], own: &mut [u8]) -> io::Result<usize> {
    if guest.is_empty() {
        return receive_own(socket, own);
    }
    let mut vectors = [NOTHING; MOST_PIECES];
    let count = guest.len().min(MOST_PIECES - 1);
    for (vector, seg) in vectors.iter_mut().zip(&guest[..count]) {
        *vector = libc::iovec { iov_base: seg.ptr.cast(), iov_len: seg.len };
    }
    let mut used = count;
    // What follows on segments that were left out does not belong into our own memory.
    if count == guest.len() {
        vectors[count] = libc::iovec { iov_base: own.as_mut_ptr().cast(), iov_len: own.len() };
        used += 1;
    }
    let mut message = message(&mut vectors, used);
    // SAFETY: as above; segments are memory that others change at any time anyway, and `own` is borrowed for the call.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Where there is one piece only: lists cost the system some time.
fn send_own(socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the bytes are borrowed for the call and read from only; the descriptor is open.
    let sent = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

fn receive_own(socket: &TcpStream, bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the bytes are borrowed for the call, to be written; the descriptor is open.
    let got = unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

fn message(vectors: &mut [libc::iovec; MOST_PIECES], count: usize) -> libc::msghdr {
    // SAFETY: all zeros is a message header without name, vectors and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = count.min(MOST_PIECES) as _;
    message
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (one, listener.accept().unwrap().0)
    }

    fn seg(bytes: &mut [u8]) -> Seg {
        Seg { ptr: bytes.as_mut_ptr(), len: bytes.len() }
    }

    #[test]
    fn bytes_come_from_guest_memory_and_ours_in_order() {
        let (one, mut other) = pair();
        let mut guest = *b"guest";
        let sent = send(&one, &[Piece::Own(b"<"), Piece::Guest(seg(&mut guest)), Piece::Own(b">")]).unwrap();
        let mut got = [0; 7];
        other.read_exact(&mut got).unwrap();
        assert_eq!((sent, &got), (7, b"<guest>"));
    }

    #[test]
    fn bytes_go_to_guest_memory_first() {
        let (one, mut other) = pair();
        other.write_all(b"guestours").unwrap();
        let (mut guest, mut own) = ([0; 5], [0; 10]);
        let got = receive(&one, &[seg(&mut guest[..2]), seg(&mut [][..])], &mut own[..0]).unwrap();
        assert_eq!((got, &guest[..2]), (2, &b"gu"[..]));
        assert_eq!(receive(&one, &[seg(&mut guest[2..])], &mut own).unwrap(), 7);
        assert_eq!((&guest, &own[..4]), (b"guest", &b"ours"[..]));
        assert_eq!(receive(&one, &[], &mut own).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(other);
        assert_eq!(receive(&one, &[], &mut own).unwrap(), 0);
    }

    #[test]
    fn memory_that_is_gone_is_an_error() {
        let (one, mut other) = pair();
        other.write_all(b"x").unwrap();
        let gone = Seg { ptr: std::ptr::without_provenance_mut(4096), len: 8 };
        assert_eq!(receive(&one, &[gone], &mut []).unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert_eq!(send(&one, &[Piece::Guest(gone)]).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn more_pieces_than_one_call_takes_are_left() {
        let (one, mut other) = pair();
        let pieces = vec![Piece::Own(&b"a"[..]); MOST_PIECES + 5];
        assert_eq!(send(&one, &pieces).unwrap(), MOST_PIECES);
        other.write_all(&[7; 100]).unwrap();
        let mut guest = [0; 80];
        let segs: Vec<_> = guest.chunks_mut(1).map(seg).collect();
        let mut own = [0; 100];
        let got = receive(&one, &segs, &mut own).unwrap();
        assert_eq!((got, own), (MOST_PIECES - 1, [0; 100]));
    }
}
