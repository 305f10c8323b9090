//! Log lines that a guest can cause, limited so that it cannot fill the disk.

use std::fmt;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::stats::Counter;

const LINES: u32 = 10;
const PER: Duration = Duration::from_secs(10);

/// At most 10 lines in 10 seconds; what is left out is counted and reported with the next window.
#[derive(Debug)]
pub struct LimitedLog {
    name: String,
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    start: Instant,
    lines: u32,
    suppressed: u64,
}

impl LimitedLog {
    /// For the virtual NIC of this name, which every line starts with.
    pub fn new(name: &str) -> Self {
        let window = Window { start: Instant::now(), lines: 0, suppressed: 0 };
        Self { name: name.to_owned(), window: Mutex::new(window) }
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

impl Window {
    /// Whether a line may be written now, and how many were not before it.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.start) >= PER {
            (self.start, self.lines) = (now, 0);
        }
        if self.lines >= LINES {
            self.suppressed += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_leaves_ten_lines_and_a_count() {
        let start = Instant::now();
        let mut window = Window { start, lines: 0, suppressed: 0 };
        let written = (0..1_000_000).filter(|_| window.admit(start).is_some()).count();
        assert_eq!(written, 10);
        assert_eq!(window.admit(start + PER), Some(1_000_000 - 10));
        assert_eq!(window.admit(start + PER), Some(0));
    }
}
