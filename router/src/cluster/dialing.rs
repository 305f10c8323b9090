//! Connections to other hosts: for sessions, and for data when workers ask for them.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use freeflow_backend::tcp::Conn;
use freeflow_backend::{Dialer, PeerId};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::HostName;
use super::entrance::HANDSHAKE;
use super::node::Shared;
use super::status::count;
use super::tls::server_name;

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(3);

/// A data connection that a worker asks for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    pub peer: PeerId,
    pub link: u16,
    pub conn: Conn,
}

/// Workers ask here. There is no more than one question for each lane at a time.
#[derive(Debug)]
pub struct Asking(pub mpsc::UnboundedSender<Wanted>);

impl Dialer for Asking {
    fn dial(&self, peer: PeerId, link: u16, conn: Conn) {
        // When this router stops, nobody needs an answer.
        let _ = self.0.send(Wanted { peer, link, conn });
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = timeout(CONNECT, TcpStream::connect(address)).await;
    let stream = stream.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it does not answer"))??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A session's connection to the host of this name: TLS has found that it is this one.
pub async fn session(name: HostName, address: SocketAddr, shared: Arc<Shared>) -> Result<TlsStream<TcpStream>, String> {
    let meant = server_name(&name)?;
    let stream = connect(address).await.map_err(|error| format!("cannot connect to {address}: {error}"))?;
    let handshake = shared.tls.load().connector().connect(meant, stream);
    match timeout(HANDSHAKE, handshake).await {
        Ok(stream) => stream.map_err(|error| format!("who answers at {address} is not accepted: {error}")),
        Err(_) => Err(format!("who answers at {address} does not speak TLS")),
    }
}

/// A data connection, for whoever asked for it.
pub async fn data(wanted: Wanted, address: Option<SocketAddr>, shared: Arc<Shared>) {
    let made = match address {
        Some(address) => connect(address).await.and_then(TcpStream::into_std),
        None => Err(io::Error::new(io::ErrorKind::NotFound, "the host is gone")),
    };
    let counts = &shared.board.counts;
    count(if made.is_ok() { &counts.data_dialed } else { &counts.data_failed });
    shared.carrier.dialed(wanted.peer, wanted.link, wanted.conn, made);
}
