//! A thread that answers connections, one at a time.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// A socket that takes connections.
pub trait Listener: AsFd + Send + Sized + 'static {
    /// A connection.
    type Stream;

    /// The same socket once more.
    ///
    /// # Errors
    /// When the system gives no descriptor.
    fn again(&self) -> io::Result<Self>;

    /// Waits for the next connection.
    ///
    /// # Errors
    /// What the system says.
    fn next(&self) -> io::Result<Self::Stream>;
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    fn again(&self) -> io::Result<Self> {
        self.try_clone()
    }

    fn next(&self) -> io::Result<UnixStream> {
        self.accept().map(|(stream, _)| stream)
    }
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    fn again(&self) -> io::Result<Self> {
        self.try_clone()
    }

    fn next(&self) -> io::Result<TcpStream> {
        self.accept().map(|(stream, _)| stream)
    }
}

/// The thread. Dropping it ends it, after the connection that it answers.
#[derive(Debug)]
pub struct Acceptor<L: Listener> {
    listener: L,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl<L: Listener> Acceptor<L> {
    /// A thread of this name that gives every connection to `answer`. What goes wrong with one is for the log, and the next one's turn.
    ///
    /// # Errors
    /// When the system gives no thread or descriptor.
    pub fn start(
        name: &'static str,
        listener: L,
        answer: impl Fn(L::Stream) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, incoming) = (stop.clone(), listener.again()?);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            loop {
                let stream = incoming.next();
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                if let Err(error) = stream.and_then(&answer) {
                    log::debug!("{name}: {error}");
                }
            }
        })?;
        Ok(Self { listener, stop, thread: Some(thread) })
    }
}

impl<L: Listener> Drop for Acceptor<L> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread from `accept`, which fails from now on. Connecting would too, but a daemon that is sealed cannot.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}
