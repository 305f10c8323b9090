//! Log lines that somebody on the network can cause, limited so that nobody can fill the disk.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use freeflow_backend::log_window::LogWindow;

/// Lines in each window of 10 seconds.
const LINES: u32 = 20;

/// At most [`LINES`] lines in a window; how many were left out is said with the next.
#[derive(Debug)]
pub struct LimitedLog(Mutex<LogWindow>);

impl Default for LimitedLog {
    fn default() -> Self {
        Self(Mutex::new(LogWindow::new(LINES, Instant::now())))
    }
}

impl LimitedLog {
    /// Writes a line, unless there were too many.
    pub fn write(&self, level: log::Level, line: fmt::Arguments<'_>) {
        let admitted = self.0.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now());
        match admitted {
            Some(0) => log::log!(level, "{line}"),
            Some(n) => log::log!(level, "{line} ({n} lines before this were left out)"),
            None => {}
        }
    }
}
