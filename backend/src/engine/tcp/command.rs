//! What a worker is told of links: by the router, whose threads never touch them.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;

use freeflow_tcp::frame::PairId;

use crate::engine::Engine;
use crate::overlay::NicId;
use crate::tcp::{Conn, PeerId, Peering};

/// Something to do for the worker that a link belongs to.
#[derive(Debug)]
pub enum Command {
    /// There is another host; this is one of its links.
    Join(Arc<Peering>, u16),
    /// It is gone, with all its links.
    Leave(PeerId),
    /// A connection was made, or could not be.
    Dialed(PeerId, u16, Conn, io::Result<TcpStream>),
    /// The peer has made one, and this is its first frame.
    Accepted(PeerId, u16, TcpStream, Vec<u8>),
    /// A queue pair of this host is connected over the hosts' NICs to one of the peer's that has asked for it, or cannot be.
    Paired(PeerId, u16, PairId),
    /// Other hosts are to send nothing over their NICs to a virtual NIC, whose guest does not run.
    Hold(NicId),
}

impl Engine {
    /// Another host can be reached.
    pub fn join(&self, peering: Peering) {
        let links = peering.tickets.len() as u16;
        let peering = Arc::new(peering);
        for link in 0..links {
            self.tell(link, Command::Join(peering.clone(), link));
        }
    }

    /// It cannot any more.
    pub fn leave(&self, peer: PeerId) {
        for mailbox in &self.mailboxes {
            mailbox.command(Command::Leave(peer));
        }
    }

    /// A connection was made, or could not be.
    pub fn dialed(&self, peer: PeerId, link: u16, conn: Conn, made: io::Result<TcpStream>) {
        self.tell(link, Command::Dialed(peer, link, conn, made));
    }

    /// The peer has made a connection.
    pub fn accepted(&self, peer: PeerId, link: u16, stream: TcpStream, first: Vec<u8>) {
        self.tell(link, Command::Accepted(peer, link, stream, first));
    }

    /// What a peer has asked for was seen to.
    pub fn paired(&self, peer: PeerId, link: u16, pair: PairId) {
        self.tell(link, Command::Paired(peer, link, pair));
    }

    /// Other hosts are to send nothing over their NICs to a virtual NIC.
    pub(in super::super) fn hold(&self, nic: NicId) {
        self.mailboxes.iter().for_each(|mailbox| mailbox.command(Command::Hold(nic)));
    }

    /// A link's worker is told.
    fn tell(&self, link: u16, command: Command) {
        self.mailboxes[usize::from(link) % self.mailboxes.len()].command(command);
    }
}
