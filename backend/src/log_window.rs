//! How many lines of a log somebody else may cause, so that he cannot fill the disk.

use std::time::{Duration, Instant};

/// Length of a window.
pub const PER: Duration = Duration::from_secs(10);

/// So many lines in [`PER`]; what is left out is counted, and told with the first line after it.
#[derive(Debug)]
pub struct LogWindow {
    most: u32,
    start: Instant,
    lines: u32,
    left_out: u64,
}

impl LogWindow {
    /// With this many lines in each window, the first of which begins now.
    pub fn new(most: u32, now: Instant) -> Self {
        Self { most, start: now, lines: 0, left_out: 0 }
    }

    /// Whether a line may be written now, and how many were not before it.
    pub fn admit(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.start) >= PER {
            (self.start, self.lines) = (now, 0);
        }
        if self.lines >= self.most {
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
    fn a_storm_leaves_so_many_lines_and_a_count() {
        for most in [10, 20] {
            let start = Instant::now();
            let mut window = LogWindow::new(most, start);
            let written = (0..1_000_000).filter(|_| window.admit(start).is_some()).count();
            assert_eq!(written, most as usize);
            assert_eq!(window.admit(start + PER), Some(1_000_000 - u64::from(most)));
            assert_eq!(window.admit(start + PER), Some(0));
        }
    }
}
