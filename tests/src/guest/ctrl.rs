//! The control queue: typed commands, several at a time, and raw bytes for commands that no driver would send.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use freeflow_backend::stepped::SteppedNic;
use virtio_rdma::ctrl::{Extent, Header, MAX_REQUEST, MAX_RESPONSE, Opcode, ResponseHeader, Status};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::mem::{Buf, GuestMemory, Placement};
use super::vhost::Pulse;
use super::virtq::{Desc, Part, Virtq};
use super::{Error, Result};

/// Commands that can be under way at once.
pub const SLOTS: usize = 32;
/// Bytes of a slot: a request, a little more to send too much, and a response.
const SLOT: usize = MAX_REQUEST + 4096 + MAX_RESPONSE;
/// Where the response begins in a slot.
const RESPONSE: usize = MAX_REQUEST + 4096;
/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_secs(20);

/// A request ready to be sent.
#[derive(Debug, Clone)]
pub struct Request {
    /// What the device reads.
    pub bytes: Vec<u8>,
    /// Room for its answer.
    pub room: usize,
}

impl Request {
    /// A command with its structure, extents, and room for a response of `response` bytes after the header.
    pub fn new<T: IntoBytes + Immutable + ?Sized>(
        opcode: Opcode,
        body: &T,
        extents: &[Extent],
        response: usize,
    ) -> Self {
        let length = size_of::<Header>() + body.as_bytes().len() + extents.as_bytes().len();
        let header = Header { opcode: opcode.to_wire().into(), flags: 0.into(), length: (length as u32).into() };
        let bytes = [header.as_bytes(), body.as_bytes(), extents.as_bytes()].concat();
        Self { bytes, room: size_of::<ResponseHeader>() + response }
    }

    /// The command that `body` belongs to, answered with `R`.
    pub fn typed<T: IntoBytes + Immutable + ?Sized, R>(opcode: Opcode, body: &T, extents: &[Extent]) -> Self {
        Self::new(opcode, body, extents, size_of::<R>())
    }
}

/// What the device answered.
#[derive(Debug, Clone)]
pub struct Response {
    /// Bytes that the used ring says were written.
    pub written: usize,
    /// Those bytes.
    pub bytes: Vec<u8>,
}

impl Response {
    /// The status; checks the header against the specification.
    pub fn status(&self) -> Result<Status> {
        let (header, rest) =
            ResponseHeader::read_from_prefix(&self.bytes).map_err(|_| Error::BadResponse("no response header"))?;
        let status = Status::from_wire(header.status.get()).ok_or(Error::BadResponse("unknown status"))?;
        if header.length.get() as usize != self.bytes.len() {
            return Err(Error::BadResponse("length in the header is not the length written"));
        }
        if status != Status::Ok && !rest.is_empty() {
            return Err(Error::BadResponse("more than a header with an error"));
        }
        Ok(status)
    }

    /// An error unless the command succeeded.
    pub fn ok(&self) -> Result<()> {
        match self.status()? {
            Status::Ok => Ok(()),
            status => Err(Error::Refused(status)),
        }
    }

    /// The response's structure when the command succeeded.
    pub fn body<R: FromBytes>(&self) -> Result<R> {
        match self.status()? {
            Status::Ok => {
                let body = &self.bytes[size_of::<ResponseHeader>()..];
                R::read_from_bytes(body).map_err(|_| Error::BadResponse("size of the response"))
            }
            status => Err(Error::Refused(status)),
        }
    }
}

/// The control queue with its buffers.
#[derive(Debug)]
pub struct Ctrl {
    /// The virtqueue.
    pub virtq: Virtq,
    slots: Buf,
    link: Link,
}

/// How requests come to the device.
#[derive(Debug)]
pub enum Link {
    /// By the virtqueue, while the connection is.
    Queue(Pulse),
    /// By a call, without virtqueue and threads.
    Direct(Arc<Mutex<SteppedNic>>),
}

impl Ctrl {
    /// A control queue that the device does not know yet.
    pub fn new(memory: &GuestMemory, link: Link) -> Result<Self> {
        Ok(Self {
            virtq: Virtq::new(memory, 2 * SLOTS as u16)?,
            slots: memory.alloc(SLOTS * SLOT, Placement::Contiguous)?,
            link,
        })
    }

    /// Sends one request and waits for the answer.
    pub fn send(&mut self, request: &Request) -> Result<Response> {
        let mut responses = self.pipeline(std::slice::from_ref(request))?;
        Ok(responses.remove(0))
    }

    /// Sends requests with up to [`SLOTS`] under way at once, and returns their answers in the same order.
    pub fn pipeline(&mut self, requests: &[Request]) -> Result<Vec<Response>> {
        if let Link::Direct(nic) = &self.link {
            return Ok(requests.iter().map(|request| execute(nic, request)).collect());
        }
        let pulse = self.pulse()?;
        let mut heads = Vec::with_capacity(requests.len());
        let mut responses = Vec::with_capacity(requests.len());
        for (turn, request) in requests.iter().enumerate() {
            // Several at a time, so that the device is not notified of each.
            if heads.len() < requests.len() && heads.len() - turn <= SLOTS / 2 {
                let end = requests.len().min(turn + SLOTS);
                for (slot, request) in requests[..end].iter().enumerate().skip(heads.len()) {
                    heads.push(self.push(slot % SLOTS, request)?);
                }
                self.virtq.notify();
            }
            let deadline = Instant::now() + ANSWER;
            let (used, written) = self.virtq.pop_wait(deadline, &pulse)?.ok_or(Error::Timeout("a command"))?;
            if used != heads[turn] {
                return Err(Error::BadResponse("commands answered out of order"));
            }
            responses.push(self.response(turn % SLOTS, request.room, written as usize)?);
        }
        Ok(responses)
    }

    fn pulse(&self) -> Result<Pulse> {
        match &self.link {
            Link::Queue(pulse) => Ok(pulse.clone()),
            Link::Direct(_) => Err(Error::Disconnected),
        }
    }

    fn push(&mut self, slot: usize, request: &Request) -> Result<u16> {
        let at = slot * SLOT;
        self.slots.write(at, &request.bytes);
        self.slots.fill(at + RESPONSE, request.room, 0xa5);
        let mut parts = Vec::new();
        if !request.bytes.is_empty() {
            parts.push(Part { addr: self.slots.gpa(at), len: request.bytes.len() as u32, writable: false });
        }
        if request.room > 0 {
            parts.push(Part { addr: self.slots.gpa(at + RESPONSE), len: request.room as u32, writable: true });
        }
        self.virtq.push(&parts)
    }

    fn response(&self, slot: usize, room: usize, written: usize) -> Result<Response> {
        if written > room {
            return Err(Error::BadResponse("more written than there is room"));
        }
        let bytes = self.slots.read_vec(slot * SLOT + RESPONSE, room);
        if bytes[written..].iter().any(|&b| b != 0xa5) {
            return Err(Error::BadResponse("more written than said"));
        }
        Ok(Response { written, bytes: bytes[..written].to_vec() })
    }

    /// Sends one request in many small descriptors on both sides.
    pub fn send_scattered(&mut self, request: &Request, piece: usize) -> Result<Response> {
        self.slots.write(0, &request.bytes);
        let base = self.slots.gpa(0);
        let split = |start: usize, len: usize, writable| {
            (0..len).step_by(piece).map(move |at| Part {
                addr: base + (start + at) as u64,
                len: piece.min(len - at) as u32,
                writable,
            })
        };
        let room = request.room;
        self.slots.fill(RESPONSE, room, 0xa5);
        let parts: Vec<Part> = split(0, request.bytes.len(), false).chain(split(RESPONSE, room, true)).collect();
        let written = self.send_parts(&parts)?.ok_or(Error::Timeout("a command"))?;
        self.response(0, room, written as usize)
    }

    /// Makes one chain available and waits for it; `None` when the device does not return it.
    pub fn send_parts(&mut self, parts: &[Part]) -> Result<Option<u32>> {
        let pulse = self.pulse()?;
        self.virtq.push(parts)?;
        self.virtq.notify();
        Ok(self.virtq.pop_wait(Instant::now() + ANSWER, &pulse)?.map(|(_, written)| written))
    }

    /// Makes descriptors available exactly as given, and waits a while for the device to return them.
    pub fn send_raw(&mut self, descs: &[Desc], wait: Duration) -> Result<Option<u32>> {
        let pulse = self.pulse()?;
        self.virtq.push_raw(descs)?;
        self.virtq.notify();
        Ok(self.virtq.pop_wait(Instant::now() + wait, &pulse)?.map(|(_, written)| written))
    }

    /// Memory that raw descriptors may point into.
    pub fn scratch(&self) -> &Buf {
        &self.slots
    }
}

fn execute(nic: &Mutex<SteppedNic>, request: &Request) -> Response {
    let bytes = nic.lock().unwrap_or_else(PoisonError::into_inner).execute(&request.bytes, request.room);
    Response { written: bytes.len(), bytes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_rdma::ctrl::ObjectRequest;

    #[test]
    fn requests_carry_their_length() {
        let extents = [Extent { addr: 4096.into(), len: 1.into() }; 3];
        let body = ObjectRequest { number: 7.into(), reserved: 0.into() };
        let request = Request::new(Opcode::DeregMr, &body, &extents, 4);
        assert_eq!(request.bytes.len(), 8 + 8 + 48);
        assert_eq!(request.bytes[..8], [0x04, 0x02, 0, 0, 64, 0, 0, 0]);
        assert_eq!(request.room, 12);
    }

    #[test]
    fn responses_are_checked() {
        let ok = Response { written: 8, bytes: vec![0, 0, 0, 0, 8, 0, 0, 0] };
        assert_eq!(ok.status().unwrap(), Status::Ok);
        let refused = Response { written: 8, bytes: vec![3, 0, 0, 0, 8, 0, 0, 0] };
        assert_eq!(refused.body::<[u8; 8]>().unwrap_err().status(), Some(Status::NotFound));
        let short = Response { written: 8, bytes: vec![0, 0, 0, 0, 9, 0, 0, 0] };
        assert!(short.status().is_err());
    }
}
