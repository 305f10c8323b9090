//! The sending half of a connection: frames into a buffer, long payload straight from guest memory.

use std::io;
use std::net::TcpStream;
use std::ops::Range;

use freeflow_tcp::frame::{TRAILER, Trailer};
use freeflow_tcp::{Conn, Link, Nanos, Outgoing};

use super::device::{Bytes, Device};
use super::inbox::Ended;
use crate::engine::cost;
use crate::mem;
use crate::mem::socket::{MOST_PIECES, Piece, send};

/// Bytes that are made ready before the system is called.
const BATCH: usize = 128 * 1024;
/// In place of a payload that is not to be had.
const ZEROS: [u8; 4096] = [0; 4096];

/// Frames that were begun to be sent.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    own: Vec<u8>,
    parts: Vec<Part>,
    /// The part that is next.
    next: usize,
    /// The socket takes no more now.
    pub blocked: bool,
}

#[derive(Debug)]
enum Part {
    /// Bytes of `own`.
    Own(Range<usize>),
    Payload(Payload),
}

/// Payload that is taken from guest memory when it is sent.
#[derive(Debug)]
struct Payload {
    frame: Outgoing,
    sent: u32,
    /// Where its trailer is in `own`.
    trailer: usize,
    /// It is not to be had any more: zeros are sent.
    void: bool,
}

impl Payload {
    fn left(&self) -> usize {
        (self.frame.packet.payload - self.sent) as usize
    }

    /// Finds where the rest of it is.
    fn find(&self, device: &mut Device<'_>) -> bool {
        self.frame.source.is_some_and(|source| device.find_rest(&source, self.sent))
    }

    /// It is not to be had any more: the trailer says so, and its sender is told.
    fn give_up(&mut self, own: &mut [u8], (link, now): (&mut Link, Nanos), device: &mut Device<'_>) {
        self.void = true;
        device.ctx.src.clear();
        own[self.trailer..][..TRAILER].copy_from_slice(&Trailer::Void.to_wire());
        link.on_source_failed(now, &self.frame, device);
        device.ctx.src.clear();
    }
}

impl Outbox {
    /// Sends what there is, some of it: true if anything went.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub fn flush(
        &mut self,
        socket: &TcpStream,
        (link, conn): (&mut Link, Conn),
        now: Nanos,
        device: &mut Device<'_>,
    ) -> Result<bool, Ended> {
        if self.is_empty() {
            self.fill((link, conn), now, device);
        }
        let (mut any, mut touched) = (false, false);
        while !self.is_empty() {
            match self.send(socket, (link, now), device) {
                Ok((sent, all)) => {
                    (any, touched) = (true, false);
                    self.consume(sent);
                    self.blocked = !all;
                    if self.blocked {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked = true;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) && !touched => {
                    mem::touch(&device.ctx.src);
                    touched = true;
                }
                Err(error) => return Err(Ended::Socket(error)),
            }
        }
        Ok(any)
    }

    /// Whether nothing is left of what was begun.
    pub fn is_empty(&self) -> bool {
        self.next == self.parts.len()
    }

    /// Makes frames.
    fn fill(&mut self, (link, conn): (&mut Link, Conn), now: Nanos, device: &mut Device<'_>) {
        self.own.clear();
        self.parts.clear();
        self.next = 0;
        let (mut ready, mut begun) = (0, 0);
        while ready < BATCH && self.parts.len() + 2 < MOST_PIECES {
            let Some(frame) = link.poll_transmit(now, conn, device) else { break };
            self.own.extend_from_slice(frame.packet.encode().as_bytes());
            let Some(source) = frame.source else { continue };
            let start = self.own.len();
            match device.take(&source, &mut self.own) {
                Some(Bytes::Own) => self.own.extend_from_slice(&Trailer::Good.to_wire()),
                Some(Bytes::Guest) => {
                    let trailer = start;
                    self.parts.push(Part::Own(begun..start));
                    self.parts.push(Part::Payload(Payload { frame, sent: 0, trailer, void: false }));
                    self.own.extend_from_slice(&Trailer::Good.to_wire());
                    (begun, ready) = (start, ready + source.len as usize);
                }
                None => {
                    self.own.resize(start + source.len as usize, 0);
                    self.own.extend_from_slice(&Trailer::Void.to_wire());
                    link.on_source_failed(now, &frame, device);
                }
            }
            ready += self.own.len() - start;
        }
        if begun < self.own.len() {
            self.parts.push(Part::Own(begun..self.own.len()));
        }
    }

    /// Sends as much as one call takes: how many bytes, and whether those were all that it was given. One call has one payload that is
    /// not our own, with what is before and after it.
    fn send(
        &mut self,
        socket: &TcpStream,
        (link, now): (&mut Link, Nanos),
        device: &mut Device<'_>,
    ) -> io::Result<(usize, bool)> {
        device.ctx.src.clear();
        let with = match self.parts[self.next..] {
            [Part::Payload(_), ..] => 0,
            [Part::Own(_), Part::Payload(_), ..] => 1,
            _ => return self.send_pieces(socket, 1, device),
        };
        if let Part::Payload(payload) = &mut self.parts[self.next + with]
            && !payload.void
            && !payload.find(device)
        {
            payload.give_up(&mut self.own, (link, now), device);
        }
        self.send_pieces(socket, with + 2, device)
    }

    /// Sends so many parts; guest memory of the one payload in them is in the context's source.
    fn send_pieces(&self, socket: &TcpStream, parts: usize, device: &mut Device<'_>) -> io::Result<(usize, bool)> {
        let mut pieces = Pieces { list: [Piece::Own(&[]); MOST_PIECES], count: 0, bytes: 0, whole: true };
        for part in self.parts[self.next..].iter().take(parts) {
            match part {
                Part::Own(range) => pieces.add(Piece::Own(&self.own[range.clone()]), range.len()),
                Part::Payload(payload) if payload.void => {
                    let mut left = payload.left();
                    while left > 0 && pieces.whole {
                        let now = left.min(ZEROS.len());
                        pieces.add(Piece::Own(&ZEROS[..now]), now);
                        left -= now;
                    }
                }
                Part::Payload(_) => device.ctx.src.iter().for_each(|seg| pieces.add(Piece::Guest(*seg), seg.len())),
            }
        }
        let sent = send(socket, &pieces.list[..pieces.count])?;
        device.ctx.charge(cost::bytes(sent as u64));
        Ok((sent, sent == pieces.bytes))
    }

    /// So many bytes have gone.
    fn consume(&mut self, mut sent: usize) {
        while let Some(part) = self.parts.get_mut(self.next) {
            let left = match part {
                Part::Own(range) => range.len(),
                Part::Payload(payload) => payload.left(),
            };
            let now = left.min(sent);
            match part {
                Part::Own(range) => range.start += now,
                Part::Payload(payload) => payload.sent += now as u32,
            }
            sent -= now;
            if now < left {
                return;
            }
            self.next += 1;
        }
    }
}

/// What one call sends.
struct Pieces<'a> {
    list: [Piece<'a>; MOST_PIECES],
    count: usize,
    bytes: usize,
    /// Everything has found a place so far; what comes after something that has not finds none.
    whole: bool,
}

impl<'a> Pieces<'a> {
    fn add(&mut self, piece: Piece<'a>, len: usize) {
        self.whole &= self.count < MOST_PIECES;
        if self.whole {
            self.list[self.count] = piece;
            self.count += 1;
            self.bytes += len;
        }
    }
}
