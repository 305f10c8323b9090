//! Log lines that a guest can cause, limited so that it cannot fill the disk.

use std::fmt;
use std::time::Instant;

use parking_lot::Mutex;

use super::stats::Counter;
use crate::log_window::LogWindow;

const LINES: u32 = 10;

/// At most 10 lines in 10 seconds; what is left out is counted and reported with the next window.
#[derive(Debug)]
pub struct LimitedLog {
    name: String,
    window: Mutex<LogWindow>,
}

impl LimitedLog {
    /// For the virtual NIC of this name, which every line starts with.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), window: Mutex::new(LogWindow::new(LINES, Instant::now())) }
    }

    /// Writes a line unless there were too many.
    pub fn write(&self, level: log::Level, suppressed: &Counter, line: fmt::Arguments<'_>) {
        match self.window.lock().admit(Instant::now()) {
            Some(0) => log::log!(level, "{}: {line}", self.name),
            Some(n) => log::log!(level, "{}: {line} ({n} lines before this were suppressed)", self.name),
            None => suppressed.add(1),
        }
    }
}
