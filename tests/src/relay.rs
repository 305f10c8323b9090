//! A bad network between two hosts, in user space: bytes are late, by more and less, come in pieces of any length, and now and then not before
//! TCP has sent a segment again. That is all that loss, delay and reordering on the way are to whoever reads from a connection.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How late bytes are, in microseconds.
const DELAY: Range<u64> = 100..3_000;
/// One piece in so many is lost on the way, and all behind it wait until it was sent again.
const LOST: u32 = 300;
/// How long that takes, in milliseconds. Linux waits for 200 at least when nothing follows.
const SENT_AGAIN: Range<u64> = 5..250;
/// Largest piece.
const PIECE: usize = 16 << 10;
/// Pieces on their way in one direction; who sends more has to wait.
const ON_THE_WAY: usize = 64;

/// Takes connections for one address.
#[derive(Debug)]
pub struct Relay {
    at: SocketAddr,
    stop: Arc<AtomicBool>,
    losses: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// To this address.
    ///
    /// # Errors
    /// When there is no port.
    pub fn to(to: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let at = listener.local_addr()?;
        let (stop, losses) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, count) = (stop.clone(), losses.clone());
        let thread = std::thread::spawn(move || {
            let mut threads = Vec::new();
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                // One that fails has ended, as connections do.
                if let Ok((one, other)) = stream.and_then(|one| Ok((one, TcpStream::connect(to)?))) {
                    threads.extend(pass_on(&one, &other, &count).into_iter().flatten());
                    threads.extend(pass_on(&other, &one, &count).into_iter().flatten());
                }
            }
            for thread in threads {
                thread.join().expect("bytes are passed on");
            }
        });
        Ok(Self { at, stop, losses, thread: Some(thread) })
    }

    /// Where it takes them.
    pub fn at(&self) -> SocketAddr {
        self.at
    }

    /// Pieces that were lost so far.
    pub fn losses(&self) -> usize {
        self.losses.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    /// Its connections must have ended.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(self.at));
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the relay ends");
        }
    }
}

/// What is on its way, and when it is there.
struct Piece {
    due: Instant,
    bytes: Vec<u8>,
}

/// Passes on what comes from one connection to another: the threads that do.
fn pass_on(from: &TcpStream, to: &TcpStream, losses: &Arc<AtomicUsize>) -> io::Result<[JoinHandle<()>; 2]> {
    let (from, to, losses) = (from.try_clone()?, to.try_clone()?, losses.clone());
    to.set_nodelay(true)?;
    let (sender, receiver) = sync_channel(ON_THE_WAY);
    let takes = std::thread::spawn(move || take(&from, &sender, &losses));
    Ok([takes, std::thread::spawn(move || give(&to, &receiver))])
}

fn take(mut from: &TcpStream, on: &SyncSender<Piece>, losses: &AtomicUsize) {
    let mut buffer = [0; PIECE];
    let mut due = Instant::now();
    loop {
        let most = rand::random_range(1..=PIECE);
        let Ok(count @ 1..) = from.read(&mut buffer[..most]) else { break };
        due = due.max(Instant::now() + Duration::from_micros(rand::random_range(DELAY)));
        if rand::random_ratio(1, LOST) {
            losses.fetch_add(1, Ordering::Relaxed);
            due += Duration::from_millis(rand::random_range(SENT_AGAIN));
        }
        if on.send(Piece { due, bytes: buffer[..count].to_vec() }).is_err() {
            break;
        }
    }
    // Nobody may go on to send what is not read.
    let _ = from.shutdown(Shutdown::Both);
}

fn give(mut to: &TcpStream, pieces: &Receiver<Piece>) {
    for Piece { due, bytes } in pieces {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&bytes).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}
