//! What two hosts say to each other of queue pairs that they connect over their NICs (`docs/nic.md`, "Between hosts"): so that these can do
//! without the rest of this protocol.
//!
//! Notes keep their order on one connection and are lost with it. Whoever asks asks again; every answer says all there is.

use zerocopy::IntoBytes;

use super::codec::{MAX_WAIT_US, read, truth, up_to, zero};
use super::layout::{self, kind};
use super::{FlowId, Malformed, Open, Packet};
use crate::Nanos;

/// One queue pair's connection over the NIC, for what it sends. Numbered by the side that sends, and not again in its epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PairId(pub u64);

/// A queue pair on a host's NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NicEnd {
    /// Its number there.
    pub qpn: u32,
    /// First PSN that it sends with.
    pub psn: u32,
    /// Code of the port's MTU.
    pub mtu: u8,
    /// GID of the port.
    pub gid: [u8; 16],
}

/// Why two ends are not connected, if they are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Apart {
    /// No such queue pair, or it is not ready yet: ask again later.
    NotThere,
    /// It has no queue pair on a NIC of this fabric, or that cannot be connected.
    NoNic,
}

/// Why no more receives were given to the NIC, if that is so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Short {
    /// None is posted: wait for so long (RNR NAK).
    NotReady(Nanos),
    /// The next one is not for the NIC.
    NotForNic,
}

/// A note.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// Asks for the end of the queue pair that `open` is for, which is connected to this end then.
    Pair {
        /// Who, to whom; its number of a flow is the pair's.
        open: Open,
        /// The asking queue pair's end.
        end: NicEnd,
        /// Both NICs must be on the same.
        fabric: u64,
    },
    /// Answers it. Also said without a question, when nothing more is to be sent to the end for now.
    Paired {
        /// The pair.
        pair: PairId,
        /// The end, or why there is none.
        end: Result<NicEnd, Apart>,
    },
    /// Nothing is under way to the end, and nothing will be until [`Note::Paired`] names it again.
    Held {
        /// The pair.
        pair: PairId,
    },
    /// Asks what a key stands for on the NIC.
    Key {
        /// The pair.
        pair: PairId,
        /// The guest's.
        key: u32,
    },
    /// Answers it.
    Grant {
        /// The pair.
        pair: PairId,
        /// The guest's.
        key: u32,
        /// What that is, if it is something for the NIC.
        grant: Option<NicKey>,
    },
    /// What a key stood for is about to go.
    Revoke {
        /// The pair.
        pair: PairId,
        /// The guest's.
        key: u32,
    },
    /// It is not used any more.
    Revoked {
        /// The pair.
        pair: PairId,
        /// The guest's.
        key: u32,
    },
    /// Asks for receives to be given to the NIC.
    Wanted(Wanted),
    /// Answers it.
    Given {
        /// The pair.
        pair: PairId,
        /// So many messages find a receive there, counted from the first.
        given: u64,
        /// Why it is no more, if more was asked for.
        short: Option<Short>,
    },
}

/// What a guest's key stands for on the NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NicKey {
    /// The NIC's key.
    pub key: u32,
    /// What peers may do (`IBV_ACCESS_*`).
    pub access: u32,
    /// First byte, as peers know it.
    pub addr: u64,
    /// Bytes.
    pub length: u64,
}

/// Messages that are to find receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The pair.
    pub pair: PairId,
    /// How many messages, counted from the first.
    pub total: u64,
    /// Of the last 64 of them, those with a solicited event: message `n` at bit `n` mod 64.
    pub solicited: u64,
    /// In the same way, those that take a receive but do not put anything there.
    pub bare: u64,
}

impl Note {
    /// Whose it is.
    pub fn pair(&self) -> PairId {
        match *self {
            Self::Pair { open, .. } => PairId(open.flow.0),
            Self::Paired { pair, .. }
            | Self::Held { pair }
            | Self::Key { pair, .. }
            | Self::Grant { pair, .. }
            | Self::Revoke { pair, .. }
            | Self::Revoked { pair, .. }
            | Self::Given { pair, .. } => pair,
            Self::Wanted(wanted) => wanted.pair,
        }
    }

    pub(super) fn encode(&self, header: impl Fn(u8, &[u8]) -> super::Header) -> super::Header {
        match *self {
            Self::Pair { ref open, end, fabric } => {
                let body = layout::Pair {
                    open: open.into(),
                    gid: end.gid,
                    qpn: end.qpn.into(),
                    psn_mtu: (end.psn | u32::from(end.mtu) << 24).into(),
                    fabric: fabric.into(),
                };
                header(kind::PAIR, body.as_bytes())
            }
            Self::Paired { pair, end } => header(kind::PAIRED, paired(pair, end).as_bytes()),
            Self::Held { pair } => header(kind::HELD, pair_key(pair, 0).as_bytes()),
            Self::Key { pair, key } => header(kind::KEY, pair_key(pair, key).as_bytes()),
            Self::Revoke { pair, key } => header(kind::REVOKE, pair_key(pair, key).as_bytes()),
            Self::Revoked { pair, key } => header(kind::REVOKED, pair_key(pair, key).as_bytes()),
            Self::Grant { pair, key, grant } => header(kind::GRANT, granted(pair, key, grant).as_bytes()),
            Self::Wanted(wanted) => {
                let body = layout::Wanted {
                    pair: wanted.pair.0.into(),
                    total: wanted.total.into(),
                    solicited: wanted.solicited.into(),
                    bare: wanted.bare.into(),
                };
                header(kind::WANTED, body.as_bytes())
            }
            Self::Given { pair, given, short } => header(kind::GIVEN, given_body(pair, given, short).as_bytes()),
        }
    }

    pub(super) fn parse(what: u8, body: &[u8]) -> Result<Self, Malformed> {
        Ok(match what {
            kind::PAIR => {
                let raw = read::<layout::Pair>(body)?;
                let open = raw.open.try_into()?;
                Self::Pair { open, end: nic_end(raw.qpn.get(), raw.psn_mtu.get(), raw.gid)?, fabric: raw.fabric.get() }
            }
            kind::PAIRED => parse_paired(&read(body)?)?,
            kind::HELD => match named(&read(body)?)? {
                (pair, 0) => Self::Held { pair },
                _ => return Err(Malformed::Field("reserved field")),
            },
            kind::KEY => named(&read(body)?).map(|(pair, key)| Self::Key { pair, key })?,
            kind::REVOKE => named(&read(body)?).map(|(pair, key)| Self::Revoke { pair, key })?,
            kind::REVOKED => named(&read(body)?).map(|(pair, key)| Self::Revoked { pair, key })?,
            kind::GRANT => parse_granted(&read(body)?)?,
            kind::WANTED => {
                let raw = read::<layout::Wanted>(body)?;
                Self::Wanted(Wanted {
                    pair: PairId(raw.pair.get()),
                    total: raw.total.get(),
                    solicited: raw.solicited.get(),
                    bare: raw.bare.get(),
                })
            }
            kind::GIVEN => parse_given(&read(body)?)?,
            other => return Err(Malformed::Kind(other)),
        })
    }
}

impl From<Note> for Packet {
    fn from(note: Note) -> Self {
        Self::bare(super::Frame::Note(note))
    }
}

impl From<FlowId> for PairId {
    fn from(flow: FlowId) -> Self {
        Self(flow.0)
    }
}

fn nic_end(qpn: u32, psn_mtu: u32, gid: [u8; 16]) -> Result<NicEnd, Malformed> {
    let (psn, mtu) = (psn_mtu & 0xff_ffff, (psn_mtu >> 24) as u8);
    let qpn = up_to(qpn, 0xff_ffff, "QP number")?;
    if !(1..=5).contains(&mtu) {
        return Err(Malformed::Field("MTU"));
    }
    Ok(NicEnd { qpn, psn, mtu, gid })
}

fn paired(pair: PairId, end: Result<NicEnd, Apart>) -> layout::Paired {
    let pair = pair.0.into();
    match end {
        Ok(end) => layout::Paired {
            pair,
            gid: end.gid,
            qpn: end.qpn.into(),
            psn_mtu: (end.psn | u32::from(end.mtu) << 24).into(),
            ..layout::Paired::default()
        },
        Err(Apart::NotThere) => layout::Paired { pair, apart: 1, ..layout::Paired::default() },
        Err(Apart::NoNic) => layout::Paired { pair, apart: 2, ..layout::Paired::default() },
    }
}

fn parse_paired(raw: &layout::Paired) -> Result<Note, Malformed> {
    let pair = PairId(raw.pair.get());
    let end = match raw.apart {
        0 => Ok(nic_end(raw.qpn.get(), raw.psn_mtu.get(), raw.gid)?),
        1 => Err(Apart::NotThere),
        2 => Err(Apart::NoNic),
        _ => return Err(Malformed::Field("why there is no end")),
    };
    zero(paired(pair, end).as_bytes() == raw.as_bytes())?;
    Ok(Note::Paired { pair, end })
}

fn pair_key(pair: PairId, key: u32) -> layout::PairKey {
    layout::PairKey { pair: pair.0.into(), key: key.into(), ..layout::PairKey::default() }
}

fn named(raw: &layout::PairKey) -> Result<(PairId, u32), Malformed> {
    zero(raw.reserved.get() == 0)?;
    Ok((PairId(raw.pair.get()), raw.key.get()))
}

fn granted(pair: PairId, key: u32, grant: Option<NicKey>) -> layout::Granted {
    let named = layout::Granted { pair: pair.0.into(), key: key.into(), ..layout::Granted::default() };
    grant.map_or(named, |grant| layout::Granted {
        nic_key: grant.key.into(),
        addr: grant.addr.into(),
        length: grant.length.into(),
        access: grant.access.into(),
        known: 1,
        ..named
    })
}

fn parse_granted(raw: &layout::Granted) -> Result<Note, Malformed> {
    let grant =
        NicKey { key: raw.nic_key.get(), access: raw.access.get(), addr: raw.addr.get(), length: raw.length.get() };
    let grant = truth(raw.known, "whether a key is known")?.then_some(grant);
    let (pair, key) = (PairId(raw.pair.get()), raw.key.get());
    zero(granted(pair, key, grant).as_bytes() == raw.as_bytes())?;
    Ok(Note::Grant { pair, key, grant })
}

fn given_body(pair: PairId, given: u64, short: Option<Short>) -> layout::Given {
    let (why, wait_us) = match short {
        None => (0, 0),
        Some(Short::NotReady(wait)) => (1, wait.as_micros()),
        Some(Short::NotForNic) => (2, 0),
    };
    let (pair, total) = (pair.0.into(), given.into());
    layout::Given { pair, total, wait_us: wait_us.into(), short: why, reserved: [0; 3] }
}

fn parse_given(raw: &layout::Given) -> Result<Note, Malformed> {
    let short = match raw.short {
        0 => None,
        1 => Some(Short::NotReady(Nanos::from_micros(up_to(raw.wait_us.get(), MAX_WAIT_US, "time to wait")?))),
        2 => Some(Short::NotForNic),
        _ => return Err(Malformed::Field("why there are no receives")),
    };
    let (pair, given) = (PairId(raw.pair.get()), raw.total.get());
    zero(given_body(pair, given, short).as_bytes() == raw.as_bytes())?;
    Ok(Note::Given { pair, given, short })
}
