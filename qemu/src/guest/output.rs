//! Copies what the guest appends to a file to one of this process's own outputs, without ever blocking on it.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A pipe that polls as writable takes this much without blocking (`PIPE_BUF`).
const CHUNK: usize = 4096;
/// After this much the memory of what was copied is given back.
const GIVE_BACK: u64 = 1 << 20;

/// How far a copy came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All that is there has been copied.
    Done,
    /// The reader of our output has to catch up.
    Blocked,
    /// The reader of our output is gone.
    Closed,
}

/// A file that grows, and where it goes.
#[derive(Debug)]
pub struct Tail<O> {
    path: PathBuf,
    file: Option<File>,
    copied: u64,
    freed: u64,
    output: O,
}

impl<O: AsFd> Tail<O> {
    /// Follows `path`, which may not exist yet.
    pub fn new(path: &Path, output: O) -> Self {
        Self { path: path.to_owned(), file: None, copied: 0, freed: 0, output }
    }

    /// The output, to wait for when blocked.
    pub fn output(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }

    /// Copies what is new.
    pub fn pump(&mut self) -> Result<Progress> {
        if self.file.is_none() {
            self.file = open(&self.path)?;
        }
        let Some(file) = &self.file else { return Ok(Progress::Done) };
        let mut buffer = [0; CHUNK];
        loop {
            let length = file.read_at(&mut buffer, self.copied).context("cannot read the guest's output")?;
            if length == 0 {
                return Ok(Progress::Done);
            }
            if !writable(self.output.as_fd())? {
                return Ok(Progress::Blocked);
            }
            match nix::unistd::write(&self.output, &buffer[..length]) {
                Ok(written) => self.copied += written as u64,
                Err(Errno::EAGAIN) => return Ok(Progress::Blocked),
                Err(Errno::EPIPE | Errno::EIO) => return Ok(Progress::Closed),
                Err(error) => return Err(error).context("cannot write the guest's output"),
            }
            if self.copied - self.freed >= GIVE_BACK {
                let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                // Only saves memory: the file system may not be able to.
                let _ = fallocate(file, hole, self.freed.cast_signed(), (self.copied - self.freed).cast_signed());
                self.freed = self.copied;
            }
        }
    }
}

fn open(path: &Path) -> Result<Option<File>> {
    match File::options().read(true).write(true).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot open {}", path.display())),
    }
}

fn writable(output: BorrowedFd<'_>) -> Result<bool> {
    let mut fds = [PollFd::new(output, PollFlags::POLLOUT)];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(error).context("cannot wait for the output"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    fn pipe() -> (File, OwnedFd) {
        let (read, write) = nix::unistd::pipe().unwrap();
        (File::from(read), write)
    }

    #[test]
    fn every_byte_arrives_however_slow_the_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let (mut read, write) = pipe();
        let mut tail = Tail::new(&path, write);
        assert_eq!(tail.pump().unwrap(), Progress::Done);
        let data: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
        fs::write(&path, &data).unwrap();
        let mut got = Vec::new();
        while tail.pump().unwrap() == Progress::Blocked {
            let mut some = [0; 10_000];
            let length = read.read(&mut some).unwrap();
            got.extend_from_slice(&some[..length]);
        }
        drop(tail);
        read.read_to_end(&mut got).unwrap();
        assert!(got == data, "{} bytes of {}", got.len(), data.len());
    }

    #[test]
    fn a_reader_that_leaves_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        fs::write(&path, "text").unwrap();
        let (read, write) = pipe();
        drop(read);
        assert_eq!(Tail::new(&path, write).pump().unwrap(), Progress::Closed);
    }
}
