//! The receiving half of a connection: frames out of a buffer, payload straight into guest memory.

use std::io;
use std::net::TcpStream;

use freeflow_tcp::frame::{FlowId, Trailer};
use freeflow_tcp::host::{Landed, Landing, QpKey};
use freeflow_tcp::stream::{Inbound, Next};
use freeflow_tcp::{Conn, Link, Nanos, Violation};

use super::answering::HELD;
use super::device::Device;
use crate::mem::socket::{MOST_PIECES, receive};
use crate::mem::{self, Seg};

const BUFFER: usize = 64 * 1024;
/// A payload from this length on is taken straight from the socket; then less is read beyond it, which would have to be copied.
const LONG: u32 = 16 * 1024;
/// How much that is.
const BEYOND: usize = 512;

/// Why a connection ends.
#[derive(Debug)]
pub(super) enum Ended {
    /// The other end, or the network.
    Socket(io::Error),
    /// We do, since the peer does what it may not. The link knows.
    Violation(Violation),
}

/// What has come and was not yet understood.
#[derive(Debug)]
pub(super) struct Inbox {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    inbound: Inbound,
    arriving: Option<Arriving>,
    /// The last payload was long.
    bulk: bool,
}

/// A payload on its way.
#[derive(Debug)]
struct Arriving {
    landing: Landing,
    len: u32,
    /// Bytes that have come.
    at: u32,
    /// Bytes at its end that are held until the message is finished.
    held: u32,
    landed: Landed,
    datagram: Vec<u8>,
}

impl Arriving {
    fn new(landing: Landing, len: u32) -> Self {
        let held = match landing {
            Landing::Message { request, offset, .. } if offset + len == request.length => len.min(HELD as u32),
            _ => 0,
        };
        Self { landing, len, at: 0, held, landed: Landed::Good, datagram: Vec::new() }
    }

    /// Bytes that go straight to where they belong.
    fn body_left(&self) -> u32 {
        let has_body = matches!(self.landing, Landing::Message { .. } | Landing::Answer { .. });
        if has_body && self.landed == Landed::Good { (self.len - self.held).saturating_sub(self.at) } else { 0 }
    }

    /// Finds where the next bytes of the body go. How many.
    fn place(&mut self, device: &mut Device<'_>, most: u32) -> u32 {
        let len = self.body_left().min(most);
        if len == 0 || (self.at == 0 && len < self.len && !self.is_there(device)) {
            return 0;
        }
        match device.place(&self.landing, self.at.into(), len.into()) {
            Ok(()) => len,
            Err(landed) => {
                self.landed = landed;
                0
            }
        }
    }

    /// Looks for all of it at once, when its first bytes come: pages that are missing are asked for together.
    fn is_there(&mut self, device: &mut Device<'_>) -> bool {
        let found = device.place(&self.landing, 0, self.len.into());
        found.map_err(|landed| self.landed = landed).is_ok()
    }

    /// Takes bytes that are here already.
    fn take(&mut self, device: &mut Device<'_>, mut bytes: &[u8]) {
        let body = self.place(device, bytes.len() as u32);
        if body > 0 {
            let (now, later) = bytes.split_at(body as usize);
            mem::copy(mem::Source { own: &[now], guest: &[] }, &device.ctx.dst);
            self.at += body;
            bytes = later;
        }
        if bytes.is_empty() {
            return;
        }
        match self.landing {
            Landing::Message { qp, request, .. } if self.landed == Landed::Good && self.held > 0 => {
                self.hold(device, (qp, request.flow), bytes);
            }
            Landing::Datagram(_) => self.datagram.extend_from_slice(bytes),
            _ => {}
        }
        self.at += bytes.len() as u32;
    }

    fn hold(&mut self, device: &mut Device<'_>, (qp, flow): (QpKey, FlowId), bytes: &[u8]) {
        let from = (self.at - (self.len - self.held)) as usize;
        let there = device.tables.answering.get_mut(&qp).filter(|answering| answering.flow == flow);
        if let Some(answering) = there {
            answering.held[from..][..bytes.len()].copy_from_slice(bytes);
            answering.num_held = self.held as usize;
        }
    }
}

impl Inbox {
    /// Of a new connection.
    pub fn new() -> Self {
        let buffer = vec![0; BUFFER].into_boxed_slice();
        Self { buffer, start: 0, end: 0, inbound: Inbound::default(), arriving: None, bulk: false }
    }

    /// Reads once, and does what that asks for. `None` if nothing has come, else whether there may be more.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub fn read(
        &mut self,
        socket: &TcpStream,
        (link, conn): (&mut Link, Conn),
        now: Nanos,
        device: &mut Device<'_>,
    ) -> Result<Option<bool>, Ended> {
        let (direct, room) = self.prepare(device);
        let own = &mut self.buffer[self.end..][..room];
        let segs = if direct > 0 { &device.ctx.dst[..] } else { &[] };
        let got = match receive(socket, segs, own) {
            Ok(0) if direct > 0 || room > 0 => return Err(Ended::Socket(io::ErrorKind::UnexpectedEof.into())),
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Some(true)),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) && direct > 0 => {
                mem::touch(&device.ctx.dst);
                return Ok(Some(true));
            }
            Err(error) => return Err(Ended::Socket(error)),
        };
        let body = got.min(direct);
        if let Some(arriving) = &mut self.arriving {
            arriving.at += body as u32;
            self.inbound.consumed(body as u32);
        }
        self.end += got - body;
        device.ctx.count_bytes(body as u64);
        self.parse((link, conn), now, device)?;
        Ok(Some(got >= direct + room))
    }

    /// Where the next bytes go: how many of them to the context's destination, and how many may follow into the buffer.
    fn prepare(&mut self, device: &mut Device<'_>) -> (usize, usize) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == BUFFER {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = BUFFER - self.end;
        let Some(arriving) = self.arriving.as_mut().filter(|arriving| arriving.body_left() > 0) else {
            return (0, if self.bulk { room.min(BEYOND) } else { room });
        };
        let direct = arriving.place(device, u32::MAX) as usize;
        if direct == 0 {
            return (0, room);
        }
        let one_call: usize = device.ctx.dst.iter().take(MOST_PIECES - 1).map(Seg::len).sum();
        (direct.min(one_call), room.min(if self.bulk { BEYOND } else { room }))
    }

    /// Understands what is in the buffer.
    ///
    /// # Errors
    /// What the peer may not say.
    pub fn parse(&mut self, (link, conn): (&mut Link, Conn), now: Nanos, device: &mut Device<'_>) -> Result<(), Ended> {
        loop {
            let bytes = &self.buffer[self.start..self.end];
            let next = self.inbound.next(bytes).map_err(|malformed| {
                let why = Violation::from(malformed);
                link.on_malformed(now, conn, why, device);
                Ended::Violation(why)
            })?;
            match next {
                Next::More => return Ok(()),
                Next::Frame(packet, len) => {
                    self.start += len;
                    let landing = link.on_frame(now, conn, &packet, device).map_err(Ended::Violation)?;
                    if packet.payload > 0 {
                        self.arriving = Some(Arriving::new(landing, packet.payload));
                        self.bulk = packet.payload >= LONG;
                    }
                }
                Next::Payload(_) if bytes.is_empty() => return Ok(()),
                Next::Payload(left) => {
                    let taken = bytes.len().min(left as usize);
                    if let Some(arriving) = &mut self.arriving {
                        arriving.take(device, &bytes[..taken]);
                    }
                    self.inbound.consumed(taken as u32);
                    self.start += taken;
                }
                Next::Trailer(trailer, len) => {
                    self.start += len;
                    let Some(arriving) = self.arriving.take() else { continue };
                    if matches!(arriving.landing, Landing::Datagram(_)) {
                        device.tables.arrived = arriving.datagram;
                    }
                    let landed = if trailer == Trailer::Good { arriving.landed } else { Landed::Void };
                    link.on_payload(now, conn, landed, device);
                }
            }
        }
    }
}
