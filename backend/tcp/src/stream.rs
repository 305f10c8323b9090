//! Where in the stream of a connection one is: frame, payload, trailer. For whoever reads from the socket.

use crate::frame::{HEAD, Malformed, Packet, TRAILER, Trailer};

/// What bytes mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Too few of them yet.
    More,
    /// This many bytes were head and body of a frame.
    Frame(Packet, usize),
    /// Up to this many bytes are payload: those at hand, the rest straight from the socket.
    Payload(u32),
    /// This many bytes were the trailer.
    Trailer(Trailer, usize),
}

/// The reading end of a connection.
#[derive(Debug, Clone, Copy, Default)]
pub struct Inbound {
    /// Payload bytes of the present frame that have yet to come.
    payload: u32,
    /// A trailer is due after them.
    trailer: bool,
}

impl Inbound {
    /// What comes next, given the bytes at hand. Nothing is consumed of [`Next::Payload`]: see [`Inbound::consumed`].
    ///
    /// # Errors
    /// When they are no frame.
    pub fn next(&mut self, bytes: &[u8]) -> Result<Next, Malformed> {
        if self.payload > 0 {
            return Ok(Next::Payload(self.payload));
        }
        if self.trailer {
            let Some(raw) = bytes.first_chunk::<TRAILER>() else {
                return Ok(Next::More);
            };
            self.trailer = false;
            return Ok(Next::Trailer(Trailer::parse(*raw)?, TRAILER));
        }
        let Some((packet, len)) = Packet::parse(bytes)? else {
            return Ok(Next::More);
        };
        self.payload = packet.payload;
        self.trailer = packet.payload > 0;
        Ok(Next::Frame(packet, len))
    }

    /// So many bytes of the payload have been taken.
    pub fn consumed(&mut self, bytes: u32) {
        self.payload = self.payload.saturating_sub(bytes);
    }

    /// Bytes that must be at hand before anything can be said of them.
    pub fn at_least(&self) -> usize {
        if self.trailer { TRAILER } else { HEAD }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::frame::tests::packet;

    fn stream(packets: &[Packet]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for packet in packets {
            bytes.extend_from_slice(packet.encode().as_bytes());
            bytes.resize(bytes.len() + packet.payload as usize, 0xab);
            if packet.payload > 0 {
                bytes.extend_from_slice(&Trailer::Good.to_wire());
            }
        }
        bytes
    }

    proptest! {
        #[test]
        fn frames_come_out_however_the_stream_is_cut(packets in vec(packet(), 1..6), cuts in vec(1..90usize, 1..40)) {
            let bytes = stream(&packets);
            let (mut inbound, mut out, mut start, mut end) = (Inbound::default(), Vec::new(), 0, 0);
            let mut cuts = cuts.iter().cycle();
            while end < bytes.len() || start < end {
                match inbound.next(&bytes[start..end]).unwrap() {
                    Next::More => end = (end + cuts.next().unwrap()).min(bytes.len()),
                    Next::Frame(packet, len) => { out.push(packet); start += len; }
                    Next::Payload(_) if start == end => end = (end + cuts.next().unwrap()).min(bytes.len()),
                    Next::Payload(left) => {
                        let taken = (left as usize).min(end - start);
                        inbound.consumed(taken as u32);
                        start += taken;
                    }
                    Next::Trailer(trailer, len) => { prop_assert_eq!(trailer, Trailer::Good); start += len; }
                }
            }
            prop_assert_eq!(out, packets);
        }

        #[test]
        fn garbage_is_refused_or_waits_for_more(bytes in vec(any::<u8>(), 0..400)) {
            let (mut inbound, mut start) = (Inbound::default(), 0);
            loop {
                match inbound.next(&bytes[start..]) {
                    Err(_) | Ok(Next::More) => break,
                    Ok(Next::Frame(_, len) | Next::Trailer(_, len)) => start += len,
                    Ok(Next::Payload(_)) if start == bytes.len() => break,
                    Ok(Next::Payload(left)) => {
                        let taken = (left as usize).min(bytes.len() - start);
                        inbound.consumed(taken as u32);
                        start += taken;
                    }
                }
            }
        }
    }
}
