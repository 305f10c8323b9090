//! What a peer may not do. Its connection is closed for it, and the rest of the session goes on.

use crate::frame::{Bye, Malformed};

/// Why a connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// What came is not a frame.
    #[error("malformed frame: {0}")]
    Malformed(#[from] Malformed),
    /// A frame that does not belong where it came: before or after another.
    #[error("unexpected {0}")]
    Unexpected(&'static str),
    /// The frame of a flow came on a connection that is not that flow's.
    #[error("a frame on the wrong connection")]
    Lane,
    /// An answer to something that was not sent, or that takes back what was said before.
    #[error("an answer that cannot be: {0}")]
    Answer(&'static str),
    /// A message or a part of one that is not the next.
    #[error("a message out of order: {0}")]
    Order(&'static str),
    /// A second beginning, by another QP or after messages.
    #[error("a flow that is opened twice")]
    OpenedTwice,
    /// No version in common.
    #[error("no version in common: the peer speaks {0} to {1}")]
    Version(u16, u16),
    /// Not the host that was meant, another number of connections, a wrong ticket, or not the newest connection.
    #[error("wrong {0} in HELLO")]
    Refused(&'static str),
    /// The peer ends it.
    #[error("the peer closes the connection: {0:?}")]
    Bye(Bye),
    /// Nothing came for too long.
    #[error("the peer is silent")]
    Silent,
    /// It was replaced by a newer one, or has ended before.
    #[error("a connection of before")]
    Stale,
}

impl Violation {
    /// What the peer is told.
    pub fn bye(&self) -> Bye {
        match self {
            Self::Version(..) => Bye::Version,
            Self::Refused(_) | Self::Stale => Bye::Refused,
            Self::Silent => Bye::Silent,
            Self::Bye(_) => Bye::Shutdown,
            _ => Bye::Protocol,
        }
    }
}
