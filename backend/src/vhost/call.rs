//! Interrupting a guest through a descriptor that its VMM chose, without ever waiting for that VMM.
//!
//! The VMM holds the same open file. It may make it blocking and fill it at any moment, so nobody that others wait for
//! may write to it: not the workers, and not the virtual NIC's thread, which has to free what the guest had.
//! * An eventfd is signalled by the kernel, which does not block ([`Signaller`]). One more microsecond than a write.
//! * A pipe, which is what User-mode Linux gives (it cannot have signals from eventfds), is written by a thread that
//!   does nothing else, the [`Courier`]. `RWF_NOWAIT` would not do: a pipe's reader holds its lock while it copies to
//!   memory that may be paged in by the VMM itself.
//! * Anything else is refused: even asking a file what it is can block where the VMM serves its file system.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::aio::Signaller;

/// Whether a descriptor is an eventfd, found out without asking the file.
pub fn is_eventfd(file: &File) -> bool {
    target(file).is_ok_and(|target| target == Path::new("anon_inode:[eventfd]"))
}

fn is_pipe(file: &File) -> bool {
    // Paths of files begin with a slash.
    target(file).is_ok_and(|target| target.to_string_lossy().starts_with("pipe:["))
}

fn target(file: &File) -> io::Result<std::path::PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The call descriptor of one virtqueue.
#[derive(Debug)]
pub struct Call {
    file: Arc<File>,
    signaller: Option<&'static Signaller>,
    courier: Arc<Courier>,
    index: usize,
}

impl Call {
    /// `file`, for virtqueue `index`.
    ///
    /// # Errors
    /// When it is neither an eventfd nor a pipe, or there is no thread to write it.
    pub fn new(file: File, index: usize, courier: &Arc<Courier>) -> io::Result<Self> {
        let signaller = match (is_eventfd(&file), is_pipe(&file)) {
            (true, _) => Signaller::get(),
            (_, true) => None,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither an eventfd nor a pipe")),
        };
        let file = Arc::new(file);
        courier.serve(index, file.clone())?;
        Ok(Self { file, signaller, courier: courier.clone(), index })
    }

    /// Interrupts the guest. Never blocks.
    pub fn ring(&self) {
        if self.signaller.is_none_or(|signaller| signaller.signal(&self.file).is_err()) {
            self.courier.ring(self.index);
        }
    }
}

/// A thread that writes to descriptors that may block, for one virtual NIC. Should its VMM block it, nobody waits: it is
/// never joined.
#[derive(Debug, Default)]
pub struct Courier {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// By virtqueue.
    files: Vec<Option<Arc<File>>>,
    /// Bits of the virtqueues to interrupt for; a virtual NIC has at most 64 virtqueues.
    rung: u64,
    started: bool,
    ended: bool,
}

impl Courier {
    /// Rings for virtqueue `index` go to `file` from now on.
    fn serve(self: &Arc<Self>, index: usize, file: Arc<File>) -> io::Result<()> {
        let mut state = self.state.lock();
        if !state.started {
            let courier = self.clone();
            std::thread::Builder::new().name("courier".to_owned()).spawn(move || courier.run())?;
            state.started = true;
        }
        if state.files.len() <= index {
            state.files.resize(index + 1, None);
        }
        let old = state.files[index].replace(file);
        // Closing a pipe can block, and workers want the lock.
        drop(state);
        drop(old);
        Ok(())
    }

    fn ring(&self, index: usize) {
        self.state.lock().rung |= 1 << index;
        self.wake.notify_one();
    }

    /// Forgets all descriptors.
    pub fn clear(&self) {
        let mut state = self.state.lock();
        state.rung = 0;
        let old = std::mem::take(&mut state.files);
        drop(state);
        drop(old);
    }

    /// Ends the thread, when its VMM lets it.
    pub fn end(&self) {
        self.state.lock().ended = true;
        self.wake.notify_one();
    }

    fn run(&self) {
        while let Some(file) = self.next() {
            // Fails when the pipe is full or closed: nobody is left who must be woken.
            let _ = (&*file).write(&1u64.to_ne_bytes());
        }
    }

    /// Waits for a ring; `None` at the end.
    fn next(&self) -> Option<Arc<File>> {
        let mut state = self.state.lock();
        loop {
            if state.ended {
                return None;
            }
            if state.rung == 0 {
                self.wake.wait(&mut state);
                continue;
            }
            let index = state.rung.trailing_zeros() as usize;
            state.rung &= state.rung - 1;
            if let Some(Some(file)) = state.files.get(index) {
                return Some(file.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::{Duration, Instant};

    use super::*;

    fn pipe() -> (io::PipeReader, File) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, File::from(std::os::fd::OwnedFd::from(writer)))
    }

    #[test]
    fn a_pipe_is_rung() {
        let (mut reader, writer) = pipe();
        let courier = Arc::default();
        let call = Call::new(writer, 63, &courier).unwrap();
        for _ in 0..3 {
            call.ring();
            reader.read_exact(&mut [0; 8]).unwrap();
        }
        courier.end();
    }

    #[test]
    fn a_full_pipe_blocks_nobody() {
        let (mut reader, writer) = pipe();
        let mut filler = writer.try_clone().unwrap();
        filler.write_all(&vec![0; 1 << 16]).unwrap();
        let courier = Arc::default();
        let call = Call::new(writer, 0, &courier).unwrap();
        let start = Instant::now();
        for _ in 0..1000 {
            call.ring();
        }
        assert!(start.elapsed() < Duration::from_secs(5));
        // What was asked for arrives when there is room.
        reader.read_exact(&mut vec![0; (1 << 16) + 8]).unwrap();
        courier.end();
    }

    #[test]
    fn files_are_refused() {
        let file = File::open("/dev/null").unwrap();
        assert!(!is_eventfd(&file));
        assert!(Call::new(file, 0, &Arc::default()).is_err());
    }
}
