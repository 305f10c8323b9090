//! The GID table of a port.

use crate::overlay::Gid;

/// Entries that the guest's kernel filled.
#[derive(Debug, Clone)]
pub struct GidTable {
    entries: Vec<Option<Gid>>,
}

impl GidTable {
    /// An empty table of this size.
    pub fn new(size: u32) -> Self {
        Self { entries: vec![None; size as usize] }
    }

    /// Fills or clears an entry; false if there is no such entry.
    pub fn set(&mut self, index: usize, gid: Option<Gid>) -> bool {
        let Some(entry) = self.entries.get_mut(index) else {
            return false;
        };
        *entry = gid;
        true
    }

    /// The GID of an entry.
    pub fn get(&self, index: usize) -> Option<Gid> {
        self.entries.get(index).copied().flatten()
    }

    /// Filled entries with their indices.
    pub fn iter(&self) -> impl Iterator<Item = (usize, Gid)> {
        self.entries.iter().enumerate().filter_map(|(i, g)| g.map(|g| (i, g)))
    }
}
