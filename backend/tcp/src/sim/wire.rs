//! Connections of the simulation: bytes under way, readers that get them in pieces, and what breaks.

use std::collections::VecDeque;

use super::device::Device;
use super::rng::Rng;
use crate::frame::Trailer;
use crate::host::{Landed, Landing};
use crate::link::{Link, Outgoing};
use crate::stream::{Inbound, Next};
use crate::{Conn, Nanos};

/// One direction.
#[derive(Debug, Default)]
pub(super) struct Pipe {
    bytes: VecDeque<u8>,
    /// What the writer could not put in yet: the rest of a frame.
    rest: VecDeque<u8>,
    pub(super) stalled: Nanos,
    /// Nothing more comes after what is in it.
    pub(super) cut: bool,
}

impl Pipe {
    /// Bytes that a reader could get now.
    fn ready(&self, now: Nanos) -> usize {
        if self.stalled > now { 0 } else { self.bytes.len() }
    }

    /// Moves what fits.
    fn fill(&mut self, room: usize) {
        let moved = room.saturating_sub(self.bytes.len()).min(self.rest.len());
        self.bytes.extend(self.rest.drain(..moved));
    }

    /// Breaks somewhere in what is under way.
    pub(super) fn cut(&mut self, rng: &mut Rng) {
        let kept = rng.below(self.bytes.len() as u64 + 1) as usize;
        self.bytes.truncate(kept);
        self.rest.clear();
        self.cut = true;
    }
}

/// One end of a connection.
#[derive(Debug, Default)]
pub(super) struct Socket {
    /// What the link calls it; the accepting side learns that from the first frame.
    pub(super) conn: Option<Conn>,
    pub(super) open: bool,
    /// When this end notices that the connection is broken.
    pub(super) notices: Option<Nanos>,
    inbound: Inbound,
    buffer: Vec<u8>,
    landing: Option<Landing>,
    landed: u32,
    outcome: Option<Landed>,
}

/// A TCP connection between two hosts: end 0 has dialled.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) ends: [Socket; 2],
    /// Pipe 0 leads away from end 0.
    pub(super) pipes: [Pipe; 2],
    /// When the other side sees it.
    pub(super) arrives: Nanos,
}

impl Wire {
    pub(super) fn new(conn: Conn, arrives: Nanos) -> Self {
        let dialled = Socket { conn: Some(conn), open: true, ..Socket::default() };
        let accepted = Socket { open: true, ..Socket::default() };
        Self { ends: [dialled, accepted], pipes: [Pipe::default(), Pipe::default()], arrives }
    }

    pub(super) fn is_dead(&self) -> bool {
        !self.ends[0].open && !self.ends[1].open
    }

    /// This end closes it; the other will notice.
    pub(super) fn close(&mut self, end: usize, notices: Nanos) {
        self.ends[end].open = false;
        self.pipes[end].rest.clear();
        self.pipes[end].cut = true;
        self.ends[1 - end].notices.get_or_insert(notices);
    }

    /// Sends what there is to send, as far as there is room. True if something was.
    pub(super) fn pump(
        &mut self,
        end: usize,
        link: &mut Link,
        device: &mut Device,
        now: Nanos,
        (room, frames): (usize, u64),
    ) -> bool {
        let Some(conn) = self.ends[end].conn.filter(|_| self.ends[end].open) else {
            return false;
        };
        let pipe = &mut self.pipes[end];
        let mut some = false;
        for _ in 0..frames {
            pipe.fill(room);
            if !pipe.rest.is_empty() || pipe.bytes.len() >= room {
                break;
            }
            let Some(out) = link.poll_transmit(now, conn, device) else { break };
            some = true;
            if pipe.cut {
                continue;
            }
            if !write(pipe, &out, device) {
                link.on_source_failed(now, &out, device);
            }
        }
        pipe.fill(room);
        some
    }

    /// Gives this end some of the bytes that are there. `Err`: the link has given the connection up.
    pub(super) fn deliver(
        &mut self,
        end: usize,
        link: &mut Link,
        device: &mut Device,
        now: Nanos,
        most: usize,
    ) -> Result<bool, ()> {
        let pipe = &mut self.pipes[1 - end];
        let count = pipe.ready(now).min(most);
        if !self.ends[end].open || now < self.arrives || count == 0 {
            return Ok(false);
        }
        let socket = &mut self.ends[end];
        socket.buffer.extend(pipe.bytes.drain(..count));
        socket.read(link, device, now).map(|()| true)
    }

    /// Whether bytes could move, now or when a stall ends.
    pub(super) fn next_time(&self, now: Nanos) -> Option<Nanos> {
        let pipes =
            [1, 0].into_iter().filter(|&end: &usize| self.ends[end].open && !self.pipes[1 - end].bytes.is_empty());
        let moves = pipes.map(|end| self.pipes[1 - end].stalled.max(self.arrives).max(now)).min();
        let notices = self.ends.iter().filter(|end| end.open).filter_map(|end| end.notices).min();
        [moves, notices].into_iter().flatten().min()
    }
}

/// False if there is not all of its payload.
fn write(pipe: &mut Pipe, out: &Outgoing, device: &mut Device) -> bool {
    pipe.rest.extend(out.packet.encode().as_bytes());
    assert_eq!(out.source.map_or(0, |source| source.len), out.packet.payload);
    let Some(source) = &out.source else {
        return true;
    };
    let payload = device.gather(source);
    let trailer = if payload.is_some() { Trailer::Good } else { Trailer::Void };
    pipe.rest.extend(payload.as_ref().unwrap_or(&vec![0x55; source.len as usize]));
    pipe.rest.extend(trailer.to_wire());
    payload.is_some()
}

impl Socket {
    fn read(&mut self, link: &mut Link, device: &mut Device, now: Nanos) -> Result<(), ()> {
        let mut start = 0;
        loop {
            match self.inbound.next(&self.buffer[start..]).expect("the peer sends frames") {
                Next::More => break,
                Next::Frame(packet, len) => {
                    start += len;
                    let Some(conn) = self.conn else {
                        let crate::frame::Frame::Hello(hello) = packet.frame else { panic!("no HELLO") };
                        self.conn = Some(link.accept(now, &hello, device).map_err(drop)?);
                        continue;
                    };
                    let landing = link.on_frame(now, conn, &packet, device).map_err(|why| {
                        assert!(why.is_of_the_times(), "the peer of this link did what it must not: {why}");
                    })?;
                    (self.landing, self.landed, self.outcome) = (Some(landing), 0, None);
                }
                Next::Payload(left) => {
                    let taken = (self.buffer.len() - start).min(left as usize);
                    if taken == 0 {
                        break;
                    }
                    let landing = self.landing.expect("a frame came before");
                    if self.outcome.is_none_or(|outcome| outcome == Landed::Good) {
                        self.outcome = Some(device.scatter(&landing, self.landed, &self.buffer[start..start + taken]));
                    }
                    self.landed += taken as u32;
                    self.inbound.consumed(taken as u32);
                    start += taken;
                }
                Next::Trailer(trailer, len) => {
                    start += len;
                    let landed =
                        if trailer == Trailer::Void { Landed::Void } else { self.outcome.unwrap_or(Landed::Good) };
                    let Some(conn) = self.conn else { continue };
                    link.on_payload(now, conn, landed, device);
                }
            }
        }
        self.buffer.drain(..start);
        Ok(())
    }
}

impl crate::Violation {
    /// Whether it can happen between two links that keep to the protocol.
    fn is_of_the_times(&self) -> bool {
        matches!(self, Self::Stale | Self::Bye(_) | Self::Silent)
    }
}
