//! The port where other hosts connect: their sessions, which begin with TLS, and their data connections, which begin with a ticket. Whoever does not say
//! in time which it is, or says anything else, is cut.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use freeflow_tcp::frame::{Frame, Hello, MAX_HEADER, Packet};
use log::Level;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::HostName;
use super::node::{Event, Shared};
use super::status::count;
use super::tls::proven;

/// Who has not said who it is, at most, from everywhere and from one address.
const WAITING: usize = 256;
const WAITING_OF_ONE: usize = 32;
/// How long a data connection may take to say what it is.
const FIRST_FRAME: Duration = Duration::from_secs(2);
/// How long TLS may take.
pub const HANDSHAKE: Duration = Duration::from_secs(3);
/// First byte of TLS: a record with a handshake (RFC 8446 section 5.1).
const TLS: u8 = 0x16;
/// First byte of a data connection: the kind of HELLO.
const DATA: u8 = 0x01;

/// Takes connections for ever.
pub async fn serve(listener: TcpListener, shared: Arc<Shared>, events: mpsc::Sender<Event>) {
    let waiting = Arc::new(Waiting::default());
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                count(&shared.board.counts.accepted);
                let Some(place) = Place::take(&waiting, from.ip()) else {
                    count(&shared.board.counts.refused_busy);
                    continue;
                };
                tokio::spawn(admit(stream, from, place, shared.clone(), events.clone()));
            }
            Err(error) => {
                shared.log.write(Level::Warn, format_args!("cannot take a connection of another host: {error}"));
                // No descriptors, probably: it does not help to try at once.
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn admit(stream: TcpStream, from: SocketAddr, place: Place, shared: Arc<Shared>, events: mpsc::Sender<Event>) {
    let refused = match timeout(FIRST_FRAME, first_byte(&stream)).await {
        Ok(Ok(TLS)) => session(stream, from, &shared, &events).await,
        Ok(Ok(DATA)) => timeout(FIRST_FRAME, data(stream, &shared)).await.unwrap_or(Err(Refused::Slow)),
        Ok(Ok(other)) => Err(Refused::Garbage(format!("it begins with {other:#04x}"))),
        Ok(Err(error)) => Err(Refused::Garbage(error.to_string())),
        Err(_) => Err(Refused::Slow),
    };
    drop(place);
    let Err(refused) = refused else { return };
    count(refused.counter(&shared));
    shared.log.write(Level::Warn, format_args!("a connection from {from} is refused: {refused}"));
    if matches!(refused, Refused::Certificate(_)) {
        // Nobody is there any more to whom it matters, if this fails.
        let _ = events.send(Event::Refused(from.ip(), refused.to_string())).await;
    }
}

async fn first_byte(stream: &TcpStream) -> io::Result<u8> {
    let mut byte = [0];
    match stream.peek(&mut byte).await? {
        0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it was closed again")),
        _ => Ok(byte[0]),
    }
}

async fn session(
    stream: TcpStream,
    from: SocketAddr,
    shared: &Shared,
    events: &mpsc::Sender<Event>,
) -> Result<(), Refused> {
    // A session is a few short messages.
    let _ = stream.set_nodelay(true);
    let handshake = shared.tls.load().acceptor().accept(stream);
    let stream = match timeout(HANDSHAKE, handshake).await {
        Ok(stream) => stream.map_err(|error| Refused::Certificate(error.to_string()))?,
        Err(_) => return Err(Refused::Slow),
    };
    let known = shared.directory.snapshot();
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let hosts = certificate.map(|certificate| proven(certificate, known.hosts().map(|(name, _)| name)));
    let hosts: Vec<HostName> = hosts.unwrap_or_default();
    if hosts.is_empty() {
        return Err(Refused::Certificate("its certificate is for no host of the directory".to_owned()));
    }
    // It fails only when this router stops.
    let _ = events.send(Event::Accepted(Box::new(stream), hosts, from)).await;
    Ok(())
}

async fn data(mut stream: TcpStream, shared: &Shared) -> Result<(), Refused> {
    let _ = stream.set_nodelay(true);
    let mut first = vec![0; MAX_HEADER];
    let read = stream.read_exact(&mut first).await;
    read.map_err(|error| Refused::Garbage(error.to_string()))?;
    let hello = hello(&first)?;
    let (peer, link) = shared.tickets.find(&hello.ticket).ok_or(Refused::Ticket)?;
    let stream = stream.into_std().map_err(|error| Refused::Garbage(error.to_string()))?;
    count(&shared.board.counts.data_accepted);
    shared.carrier.accepted(peer, link, stream, first);
    Ok(())
}

fn hello(first: &[u8]) -> Result<Hello, Refused> {
    match Packet::parse(first) {
        Ok(Some((Packet { frame: Frame::Hello(hello), .. }, _))) => Ok(hello),
        Ok(_) => Err(Refused::Garbage("its first frame is not HELLO".to_owned())),
        Err(error) => Err(Refused::Garbage(error.to_string())),
    }
}

/// Why a connection is not taken.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("it did not say in time what it is")]
    Slow,
    #[error("no session and no data: {0}")]
    Garbage(String),
    #[error("{0}")]
    Certificate(String),
    #[error("data that belongs to no session")]
    Ticket,
}

impl Refused {
    fn counter<'a>(&self, shared: &'a Shared) -> &'a std::sync::atomic::AtomicU64 {
        let counts = &shared.board.counts;
        match self {
            Self::Slow => &counts.refused_slow,
            Self::Garbage(_) => &counts.refused_garbage,
            Self::Certificate(_) => &counts.refused_certificate,
            Self::Ticket => &counts.refused_ticket,
        }
    }
}

/// How many wait, by address.
#[derive(Debug, Default)]
struct Waiting(Mutex<HashMap<IpAddr, usize>>);

/// One of them.
#[derive(Debug)]
struct Place {
    waiting: Arc<Waiting>,
    address: IpAddr,
}

impl Place {
    /// `None`: too many wait.
    fn take(waiting: &Arc<Waiting>, address: IpAddr) -> Option<Self> {
        let mut all = waiting.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.values().sum::<usize>() >= WAITING || all.get(&address).is_some_and(|n| *n >= WAITING_OF_ONE) {
            return None;
        }
        *all.entry(address).or_default() += 1;
        Some(Self { waiting: waiting.clone(), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.waiting.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n) = all.get_mut(&self.address) {
            *n -= 1;
            if *n == 0 {
                all.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_few_and_come_back() {
        let waiting = Arc::new(Waiting::default());
        let address = |n: usize| IpAddr::from([10, 0, (n / 256) as u8, (n % 256) as u8]);
        let of_one: Vec<_> = (0..100).map_while(|_| Place::take(&waiting, address(0))).collect();
        assert_eq!(of_one.len(), WAITING_OF_ONE);
        let others: Vec<_> = (1..1000).map_while(|n| Place::take(&waiting, address(n))).collect();
        assert_eq!(of_one.len() + others.len(), WAITING);
        drop(of_one);
        assert!(Place::take(&waiting, address(0)).is_some());
        drop(others);
        assert!(waiting.0.lock().unwrap().is_empty());
    }
}
