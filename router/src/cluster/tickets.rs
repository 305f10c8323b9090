//! Which link a data connection belongs to: the secret that both hosts got over their session says so.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use freeflow_backend::PeerId;

use super::session::wire::Ticket;

/// Links that others may make connections for.
#[derive(Debug, Default)]
pub struct Tickets(Mutex<HashMap<Ticket, (PeerId, u16)>>);

impl Tickets {
    /// A peer has these, one for each link.
    pub fn add(&self, peer: PeerId, tickets: &[Ticket]) {
        let links = tickets.iter().zip(0..).map(|(ticket, link)| (*ticket, (peer, link)));
        self.all().extend(links);
    }

    /// A peer has none any more.
    pub fn remove(&self, peer: PeerId) {
        self.all().retain(|_, (owner, _)| *owner != peer);
    }

    /// Whose it is, and for which link.
    pub fn find(&self, ticket: &[u8; 32]) -> Option<(PeerId, u16)> {
        self.all().get(&Ticket(*ticket)).copied()
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Ticket, (PeerId, u16)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_for_one_link_of_one_peer_until_that_leaves() {
        let tickets = Tickets::default();
        tickets.add(PeerId(1), &[Ticket([1; 32]), Ticket([2; 32])]);
        tickets.add(PeerId(2), &[Ticket([3; 32])]);
        assert_eq!(tickets.find(&[2; 32]), Some((PeerId(1), 1)));
        assert_eq!(tickets.find(&[4; 32]), None);
        tickets.remove(PeerId(1));
        assert_eq!((tickets.find(&[2; 32]), tickets.find(&[3; 32])), (None, Some((PeerId(2), 0))));
    }
}
