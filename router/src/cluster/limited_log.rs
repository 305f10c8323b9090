//! Log lines that somebody on the network can cause, limited so that nobody can fill the disk.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines in each [`PER`].
const LINES: u32 = 20;
const PER: Duration = Duration::from_secs(10);

/// At most [`LINES`] lines in [`PER`]; how many were left out is said with the next.
#[derive(Debug, Default)]
pub struct LimitedLog(Mutex<Window>);

#[derive(Debug, Default)]
struct Window {
    start: Option<Instant>,
    lines: u32,
    left_out: u64,
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

impl Window {
    /// Whether a line may be written now, and how many were not before it.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.start.is_none_or(|start| now.saturating_duration_since(start) >= PER) {
            (self.start, self.lines) = (Some(now), 0);
        }
        if self.lines >= LINES {
            self.left_out += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_limited_and_what_is_left_out_is_counted() {
        let (mut window, start) = (Window::default(), Instant::now());
        let admitted = (0..1000).filter(|_| window.admit(start).is_some()).count();
        assert_eq!(admitted, LINES as usize);
        assert_eq!(window.admit(start + PER), Some(1000 - u64::from(LINES)));
        assert_eq!(window.admit(start + PER), Some(0));
    }
}
