//! The thread of one virtual NIC: it listens on the socket, and serves one VMM at a time.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::{BackendReqHandler, Error};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::session::Session;
use super::socket::Socket;
use super::vring::Vring;
use crate::engine::Engine;
use crate::mem::Alarm;
use crate::nic::Nic;

/// Epoll data of what is not a virtqueue.
const CONNECTION: u64 = u64::MAX;
const STOP: u64 = u64::MAX - 1;
const LISTENER: u64 = u64::MAX - 2;
const ALARM: u64 = u64::MAX - 3;
const HELPER: u64 = u64::MAX - 4;

/// How long a VMM may leave our answers unread, or a message without its body, before it is disconnected.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// Rest after an error of the host's, such as having no descriptors left, before the next try.
const PAUSE: Duration = Duration::from_millis(100);
/// How long [`Server::stop`] waits for a thread that its VMM may have managed to block.
const STOP_WITHIN: Duration = Duration::from_secs(10);

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
    /// The VMM's, so that it can be cut.
    connection: Mutex<Option<UnixStream>>,
    stop_by: OnceLock<Instant>,
}

impl Server {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system gives no descriptors or no thread.
    pub fn start(
        Socket { path, listener }: Socket,
        nic: Arc<Nic>,
        engine: Arc<Engine>,
        vrings: Vec<Arc<parking_lot::Mutex<Vring>>>,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let shared = Arc::new(Shared {
            stop,
            connected: AtomicBool::new(false),
            counts: Mutex::default(),
            connection: Mutex::default(),
            stop_by: OnceLock::new(),
        });
        let epoll = Arc::new(Epoll::new()?);
        let alarm = Alarm::new()?;
        let helper = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let session = Session::new(nic.clone(), engine, vrings, epoll.clone(), alarm.clone(), &helper);
        let session = Arc::new(Mutex::new(session));
        let thread = Thread { listener, epoll, alarm, helper, nic, session, shared: shared.clone() };
        thread.watch_all()?;
        let name = format!("nic:{}", thread.nic.config.name);
        let thread = std::thread::Builder::new().name(name).spawn(move || thread.run())?;
        Ok(Self { path, shared, thread: Some(thread) })
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

    /// Begins what [`stop`](Self::stop) waits for: cuts the connection, which also ends reads and writes under way.
    pub fn begin_stop(&self) {
        self.shared.stop_by.get_or_init(|| Instant::now() + STOP_WITHIN);
        // Fails only when the counter is full, and then the thread is stopping.
        let _ = self.shared.stop.write(1);
        if let Some(connection) = &*self.shared.connection() {
            // Fails when the VMM has gone, which is as good.
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Closes the connection, frees what its guest had, and removes the socket. A thread that does not end in time is left
    /// behind: no VMM may hold up the others' end.
    pub fn stop(&mut self) {
        self.begin_stop();
        if let Some(thread) = self.thread.take() {
            if !self.has_ended(&thread) {
                log::error!("the thread of {} does not end: its VMM blocks it", self.path.display());
            } else if thread.join().is_err() {
                log::error!("the thread of {} has panicked", self.path.display());
            }
            if let Err(error) = std::fs::remove_file(&self.path) {
                log::debug!("cannot remove {}: {error}", self.path.display());
            }
        }
    }

    /// Waits for the thread's end, but not for ever.
    fn has_ended(&self, thread: &JoinHandle<()>) -> bool {
        let by = self.shared.stop_by.get().copied();
        while !thread.is_finished() && by.is_none_or(|by| Instant::now() < by) {
            std::thread::sleep(Duration::from_micros(200));
        }
        thread.is_finished()
    }
}

impl Shared {
    fn connection(&self) -> std::sync::MutexGuard<'_, Option<UnixStream>> {
        self.connection.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Thread {
    listener: UnixListener,
    epoll: Arc<Epoll>,
    alarm: Alarm,
    helper: Arc<EventFd>,
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
        loop {
            let end = self.next_vmm().and_then(|next| match next {
                Some(stream) => self.serve(&stream),
                None => Ok(End::Stopped),
            });
            match end {
                Ok(End::Stopped) => return,
                Ok(End::Disconnected) => {}
                Err(error) => {
                    self.nic.warn(format_args!("cannot serve a VMM: {error}"));
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    fn watch_all(&self) -> io::Result<()> {
        self.watch(&self.shared.stop, STOP)?;
        self.watch(&self.alarm, ALARM)?;
        self.watch(&*self.helper, HELPER)?;
        // Not yet: it is armed for each VMM.
        let event = EpollEvent::new(EventSet::ONE_SHOT, LISTENER);
        self.epoll.ctl(ControlOperation::Add, self.listener.as_raw_fd(), event)
    }

    fn watch(&self, fd: &impl AsRawFd, data: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, data))
    }

    /// Waits for a VMM; `None` when we are to stop. One VMM at a time; others wait in the listener's queue.
    fn next_vmm(&self) -> io::Result<Option<UnixStream>> {
        let once = EpollEvent::new(EventSet::IN | EventSet::ONE_SHOT, LISTENER);
        self.epoll.ctl(ControlOperation::Modify, self.listener.as_raw_fd(), once)?;
        loop {
            let mut events = [EpollEvent::default(); 4];
            let count = wait(&self.epoll, -1, &mut events)?;
            let is_there = |data| events[..count].iter().any(|e| e.data() == data);
            if is_there(STOP) {
                return Ok(None);
            }
            if is_there(LISTENER) {
                return Ok(Some(self.listener.accept()?.0));
            }
            // What late workers have to say about the guest before.
            self.alarm.take();
            self.forget_help();
        }
    }

    /// Serves one VMM until it goes, then frees everything that it had.
    fn serve(&self, stream: &UnixStream) -> io::Result<End> {
        self.nic.info(format_args!("a VMM has connected"));
        let end = self.serve_connection(stream);
        // The VMM may have descriptors of it too: it does not go by itself. Fails if it was not there yet.
        let _ = self.epoll.ctl(ControlOperation::Delete, stream.as_raw_fd(), EpollEvent::default());
        self.session().stop();
        // It may have rung once more while the end was on its way.
        self.alarm.take();
        self.note_counts();
        *self.shared.connection() = None;
        self.shared.connected.store(false, Ordering::Relaxed);
        self.nic.info(format_args!("the VMM is gone"));
        end
    }

    fn serve_connection(&self, stream: &UnixStream) -> io::Result<End> {
        stream.set_read_timeout(Some(Duration::from_secs(PATIENCE.tv_sec.cast_unsigned())))?;
        let mut handler = BackendReqHandler::from_stream(stream.try_clone()?, self.session.clone());
        *self.shared.connection() = Some(stream.try_clone()?);
        // From here on `begin_stop` cuts it; before, it could not.
        if self.shared.stop_by.get().is_some() {
            return Ok(End::Stopped);
        }
        self.shared.connected.store(true, Ordering::Relaxed);
        self.watch(stream, CONNECTION)?;
        loop {
            let mut events = [EpollEvent::default(); 16];
            let timeout = if self.session().is_unfinished() { 0 } else { -1 };
            let count = wait(&self.epoll, timeout, &mut events)?;
            for event in &events[..count] {
                if let Some(end) = self.handle(event.data(), stream, &mut handler)? {
                    return Ok(end);
                }
            }
            self.session().go_on();
            self.note_counts();
        }
    }

    fn handle(
        &self,
        data: u64,
        stream: &UnixStream,
        handler: &mut BackendReqHandler<Mutex<Session>>,
    ) -> io::Result<Option<End>> {
        match data {
            STOP => return Ok(Some(End::Stopped)),
            CONNECTION => return self.handle_message(stream, handler),
            ALARM => {
                if self.alarm.take() {
                    self.nic.warn(format_args!("the VMM has truncated its memory: disconnected"));
                    return Ok(Some(End::Disconnected));
                }
            }
            HELPER => {
                self.forget_help();
                self.session().kicked_all();
            }
            LISTENER => {}
            vring => self.session().kicked(vring as usize),
        }
        Ok(None)
    }

    fn handle_message(
        &self,
        stream: &UnixStream,
        handler: &mut BackendReqHandler<Mutex<Session>>,
    ) -> io::Result<Option<End>> {
        if !has_room(stream)? {
            self.nic.warn(format_args!("the VMM does not read our answers: disconnected"));
            return Ok(Some(End::Disconnected));
        }
        let result = handler.handle_request();
        Ok(result.err().filter(|error| self.is_end(error)).map(|_| End::Disconnected))
    }

    fn forget_help(&self) {
        // Fails when nobody has called for help.
        let _ = self.helper.read();
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

/// Whether an answer can be sent without waiting for the VMM: a socket that is writable has room for several. The protocol's
/// library would try for ever to write what a timeout has interrupted.
fn has_room(stream: &UnixStream) -> io::Result<bool> {
    match poll(&mut [PollFd::new(stream, PollFlags::OUT)], Some(&PATIENCE)) {
        Err(rustix::io::Errno::INTR) => Ok(true),
        result => Ok(result? > 0),
    }
}

fn wait(epoll: &Epoll, timeout: i32, events: &mut [EpollEvent]) -> io::Result<usize> {
    match epoll.wait(timeout, events) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        result => result,
    }
}
