//! The thread of one virtual NIC: it listens on the socket, and serves one VMM at a time.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::vhost_user::{BackendReqHandler, Error};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::session::Session;
use super::vring::Vring;
use crate::engine::Engine;
use crate::mem::Alarm;
use crate::nic::Nic;

/// Epoll data of what is not a virtqueue.
const CONNECTION: u64 = u64::MAX;
const STOP: u64 = u64::MAX - 1;
const LISTENER: u64 = u64::MAX - 2;
const ALARM: u64 = u64::MAX - 3;

/// A message must arrive whole within this time once it has begun.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// The running server of one virtual NIC.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: EventFd,
    connected: AtomicBool,
    counts: Mutex<(usize, usize, usize)>,
}

impl Server {
    /// Listens on `path` and starts the thread.
    ///
    /// # Errors
    /// When the socket is in use or cannot be made.
    pub fn start(
        path: &Path,
        nic: Arc<Nic>,
        engine: Arc<Engine>,
        vrings: Vec<Arc<parking_lot::Mutex<Vring>>>,
    ) -> io::Result<Self> {
        let listener = listen(path)?;
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let shared = Arc::new(Shared { stop, connected: AtomicBool::new(false), counts: Mutex::default() });
        let epoll = Arc::new(Epoll::new()?);
        let alarm = Alarm::new()?;
        let session = Session::new(nic.clone(), engine, vrings, epoll.clone(), alarm.clone());
        let session = Arc::new(Mutex::new(session));
        let thread = Thread { listener, epoll, alarm, nic, session, shared: shared.clone() };
        let name = format!("nic:{}", thread.nic.config.name);
        let thread = std::thread::Builder::new().name(name).spawn(move || thread.run())?;
        Ok(Self { path: path.to_owned(), shared, thread: Some(thread) })
    }

    /// Whether a VMM is connected.
    pub fn connected(&self) -> bool {
        self.shared.connected.load(Ordering::Relaxed)
    }

    /// Number of protection domains, regions and CQs.
    pub fn counts(&self) -> (usize, usize, usize) {
        *self.shared.counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Closes the connection, frees what its guest had, and removes the socket.
    pub fn stop(&mut self) {
        // Fails only when the counter is full, and then the thread is stopping.
        let _ = self.shared.stop.write(1);
        if let Some(thread) = self.thread.take() {
            if thread.join().is_err() {
                log::error!("the thread of {} has panicked", self.path.display());
            }
            if let Err(error) = std::fs::remove_file(&self.path) {
                log::debug!("cannot remove {}: {error}", self.path.display());
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Binds the socket; one that a dead daemon left behind is replaced.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        result => result,
    }
}

struct Thread {
    listener: UnixListener,
    epoll: Arc<Epoll>,
    alarm: Alarm,
    nic: Arc<Nic>,
    session: Arc<Mutex<Session>>,
    shared: Arc<Shared>,
}

/// Why serving a connection ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Disconnected,
    Stopped,
}

impl Thread {
    fn run(self) {
        if let Err(error) = self.accept_until_stopped() {
            log::error!("{}: no longer serving: {error}", self.nic.config.name);
        }
    }

    fn accept_until_stopped(&self) -> io::Result<()> {
        self.watch(&self.shared.stop, STOP)?;
        self.watch(&self.listener, LISTENER)?;
        self.watch(&self.alarm, ALARM)?;
        loop {
            let mut events = [EpollEvent::default(); 4];
            let count = wait(&self.epoll, -1, &mut events)?;
            if events[..count].iter().any(|e| e.data() == STOP) {
                return Ok(());
            }
            if !events[..count].iter().any(|e| e.data() == LISTENER) {
                continue;
            }
            let (stream, _) = self.listener.accept()?;
            // One VMM at a time; others wait in the listener's queue.
            self.epoll.ctl(ControlOperation::Delete, self.listener.as_raw_fd(), EpollEvent::default())?;
            let end = self.serve(stream);
            if end? == End::Stopped {
                return Ok(());
            }
            self.watch(&self.listener, LISTENER)?;
        }
    }

    fn watch(&self, fd: &impl AsRawFd, data: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, data))
    }

    /// Serves one VMM until it goes, then frees everything that it had.
    fn serve(&self, stream: UnixStream) -> io::Result<End> {
        log::info!("{}: a VMM has connected", self.nic.config.name);
        stream.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
        self.shared.connected.store(true, Ordering::Relaxed);
        let mut handler = BackendReqHandler::from_stream(stream, self.session.clone());
        self.watch(&handler, CONNECTION)?;
        let end = self.loop_on(&mut handler);
        self.epoll.ctl(ControlOperation::Delete, handler.as_raw_fd(), EpollEvent::default())?;
        self.session().stop();
        // It may have rung once more while the end was on its way.
        self.alarm.take();
        self.note_counts();
        self.shared.connected.store(false, Ordering::Relaxed);
        log::info!("{}: the VMM is gone", self.nic.config.name);
        end
    }

    fn loop_on(&self, handler: &mut BackendReqHandler<Mutex<Session>>) -> io::Result<End> {
        let mut unfinished = false;
        loop {
            let mut events = [EpollEvent::default(); 16];
            let count = wait(&self.epoll, if unfinished { 0 } else { -1 }, &mut events)?;
            let mut again = std::mem::take(&mut unfinished);
            for event in &events[..count] {
                match event.data() {
                    STOP => return Ok(End::Stopped),
                    CONNECTION => {
                        if let Err(error) = handler.handle_request()
                            && self.is_end(&error)
                        {
                            return Ok(End::Disconnected);
                        }
                    }
                    ALARM => {
                        if self.alarm.take() {
                            self.nic.warn(format_args!("the VMM has truncated its memory: disconnected"));
                            return Ok(End::Disconnected);
                        }
                    }
                    LISTENER => {}
                    0 => again = true,
                    vring => _ = self.session().kicked(vring as usize),
                }
            }
            if again {
                unfinished = self.session().kicked(0);
            }
            self.note_counts();
        }
    }

    /// Whether the connection is over; a refused message alone is the VMM's to handle.
    fn is_end(&self, error: &Error) -> bool {
        match error {
            Error::Disconnected
            | Error::SocketBroken(_)
            | Error::PartialMessage
            | Error::SocketError(_)
            | Error::SocketConnect(_) => true,
            other => {
                self.nic.warn(format_args!("vhost-user: {other}"));
                !matches!(other, Error::InvalidParam | Error::InvalidOperation(_) | Error::ReqHandlerError(_))
            }
        }
    }

    fn session(&self) -> std::sync::MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn note_counts(&self) {
        let counts = self.session().counts();
        *self.shared.counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = counts;
    }
}

fn wait(epoll: &Epoll, timeout: i32, events: &mut [EpollEvent]) -> io::Result<usize> {
    match epoll.wait(timeout, events) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        result => result,
    }
}
