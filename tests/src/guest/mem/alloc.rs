//! Allocator of guest-physical pages: arithmetic only.

use std::collections::BTreeMap;

use super::PAGE;

/// How the pages of an allocation lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Adjacent, in order.
    Contiguous,
    /// No two of them adjacent, in descending order: one extent for each page.
    Fragmented,
    /// In as few pieces as there are, across regions if need be.
    Anywhere,
}

/// Guest-physical bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) gpa: u64,
    pub(super) len: u64,
}

/// The free pages.
#[derive(Debug, Default)]
pub(super) struct Allocator {
    free: BTreeMap<u64, u64>,
    /// Memory that was unplugged: what is given back there is forgotten.
    forbidden: Vec<Range>,
}

impl Allocator {
    /// Makes whole pages available, and joins them with their neighbours.
    pub(super) fn give(&mut self, range: Range) {
        if range.len == 0 || self.forbidden.iter().any(|f| f.gpa <= range.gpa && range.gpa - f.gpa < f.len) {
            return;
        }
        let mut range = range;
        if let Some((&gpa, &len)) = self.free.range(..range.gpa).next_back()
            && gpa + len == range.gpa
        {
            self.free.remove(&gpa);
            range = Range { gpa, len: len + range.len };
        }
        if let Some(len) = self.free.remove(&(range.gpa + range.len)) {
            range.len += len;
        }
        self.free.insert(range.gpa, range.len);
    }

    /// Forgets memory for good.
    pub(super) fn forbid(&mut self, range: Range) {
        self.free.retain(|&gpa, _| gpa < range.gpa || gpa >= range.gpa + range.len);
        self.forbidden.push(range);
    }

    /// Takes at least `len` bytes in whole pages.
    pub(super) fn take(&mut self, len: u64, placement: Placement) -> Option<Vec<Range>> {
        let len = len.max(1).next_multiple_of(PAGE);
        match placement {
            Placement::Contiguous => self.take_run(len).map(|r| vec![r]),
            Placement::Fragmented => self.take_fragmented(len),
            Placement::Anywhere => self.take_anywhere(len),
        }
    }

    fn take_run(&mut self, len: u64) -> Option<Range> {
        let (&gpa, &have) = self.free.iter().find(|&(_, &have)| have >= len)?;
        self.free.remove(&gpa);
        self.give(Range { gpa: gpa + len, len: have - len });
        Some(Range { gpa, len })
    }

    /// Every second page of a run of twice the size.
    fn take_fragmented(&mut self, len: u64) -> Option<Vec<Range>> {
        let run = self.take_run(2 * len)?;
        let pages = len / PAGE;
        for i in 0..pages {
            self.give(Range { gpa: run.gpa + (2 * i + 1) * PAGE, len: PAGE });
        }
        Some((0..pages).rev().map(|i| Range { gpa: run.gpa + 2 * i * PAGE, len: PAGE }).collect())
    }

    fn take_anywhere(&mut self, len: u64) -> Option<Vec<Range>> {
        if self.free.values().sum::<u64>() < len {
            return None;
        }
        let mut taken = Vec::new();
        let mut missing = len;
        while missing > 0 {
            let (&gpa, &have) = self.free.iter().max_by_key(|&(_, &have)| have)?;
            let range = self.take_at(gpa, have.min(missing));
            missing -= range.len;
            taken.push(range);
        }
        Some(taken)
    }

    fn take_at(&mut self, gpa: u64, len: u64) -> Range {
        let have = self.free.remove(&gpa).unwrap_or(0);
        self.give(Range { gpa: gpa + len, len: have - len });
        Range { gpa, len }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocator(pages: u64) -> Allocator {
        let mut alloc = Allocator::default();
        alloc.give(Range { gpa: PAGE, len: pages * PAGE });
        alloc
    }

    #[test]
    fn pages_come_back_and_join() {
        let mut alloc = allocator(16);
        let a = alloc.take(3 * PAGE, Placement::Contiguous).unwrap();
        let b = alloc.take(1, Placement::Fragmented).unwrap();
        let c = alloc.take(4 * PAGE, Placement::Fragmented).unwrap();
        for range in b.into_iter().chain(a).chain(c) {
            alloc.give(range);
        }
        assert_eq!(alloc.free.len(), 1);
        assert_eq!(alloc.free[&PAGE], 16 * PAGE);
    }

    #[test]
    fn fragments_are_not_adjacent() {
        let ranges = allocator(16).take(8 * PAGE, Placement::Fragmented).unwrap();
        assert_eq!(ranges.len(), 8);
        assert!(ranges.windows(2).all(|w| w[0].gpa == w[1].gpa + 2 * PAGE));
    }

    #[test]
    fn anywhere_spans_regions() {
        let mut alloc = allocator(4);
        alloc.give(Range { gpa: 1 << 32, len: 4 * PAGE });
        assert_eq!(alloc.take(6 * PAGE, Placement::Contiguous), None);
        assert_eq!(alloc.take(6 * PAGE, Placement::Anywhere).unwrap().len(), 2);
        assert_eq!(alloc.take(3 * PAGE, Placement::Anywhere), None);
    }

    #[test]
    fn unplugged_memory_is_not_taken_back() {
        let mut alloc = allocator(4);
        let range = alloc.take(PAGE, Placement::Contiguous).unwrap()[0];
        alloc.forbid(Range { gpa: PAGE, len: 4 * PAGE });
        alloc.give(range);
        assert!(alloc.free.is_empty());
    }
}
