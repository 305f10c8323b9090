//! Memory regions: what a key allows, and where its bytes are (IBA 10.6).

use std::sync::Arc;

use parking_lot::RwLock;
use virtio_rdma::ib::Access;

use crate::mem::{Extent, Map, Seg};
use crate::nic::keys::RandomKeyMap;

/// Why a key, address and length were refused. The guest sees a protection or access error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No such key now.
    #[error("no region has key {0:#x}")]
    NoSuchKey(u32),
    /// The region is in another protection domain.
    #[error("key {0:#x} is of another protection domain")]
    WrongPd(u32),
    /// The region does not allow this kind of access.
    #[error("key {0:#x} does not allow this access")]
    Access(u32),
    /// Some of the bytes are outside the region.
    #[error("{len} bytes at {addr:#x} are not in the region of key {key:#x}")]
    OutOfBounds {
        /// The key.
        key: u32,
        /// First byte.
        addr: u64,
        /// Bytes.
        len: u64,
    },
}

/// A complete memory region. Immutable: a change makes a new one under the same key.
#[derive(Debug)]
pub struct Mr {
    /// lkey and rkey.
    pub key: u32,
    /// Protection domain.
    pub pdn: u32,
    /// What may be done with it.
    pub access: Access,
    /// Address of the first byte.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    extents: Arc<Layout>,
}

/// Where the bytes of a region are.
#[derive(Debug, Default)]
pub struct Layout {
    extents: Vec<Extent>,
    /// For each extent the offset in the region at which it starts.
    starts: Vec<u64>,
    length: u64,
}

impl Layout {
    /// Appends memory; neighbours are merged.
    pub fn push(&mut self, extent: Extent) {
        let len = extent.len();
        match self.extents.last_mut() {
            Some(last) if last.touches(&extent) => last.join(&extent),
            _ => {
                self.starts.push(self.length);
                self.extents.push(extent);
            }
        }
        self.length += len;
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Whether all of it is still guest memory.
    pub fn is_in(&self, map: &Map) -> bool {
        self.extents.iter().all(|e| map.contains(e.region()))
    }

    /// Appends the segments of `len` bytes from `offset` on, which the caller has checked to be inside.
    fn segments(&self, offset: u64, len: u64, out: &mut Vec<Seg>) {
        let (mut at, mut left) = (offset, len);
        let mut index = self.starts.partition_point(|&s| s <= at).saturating_sub(1);
        while left > 0 {
            let seg = self.extents[index].slice(at - self.starts[index], left);
            at += seg.len() as u64;
            left -= seg.len() as u64;
            index += 1;
            out.push(seg);
        }
    }
}

impl Mr {
    /// A region whose memory is complete.
    pub fn new(key: u32, pdn: u32, access: Access, iova: u64, layout: Arc<Layout>) -> Self {
        Self { key, pdn, access, iova, length: layout.length, extents: layout }
    }

    /// Its memory, to be shared with a successor.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.extents
    }

    /// Checks that `len` bytes at `addr` may be accessed this way by a QP of protection domain `pdn`.
    ///
    /// # Errors
    /// What does not hold.
    pub fn check(&self, pdn: u32, need: Access, addr: u64, len: u64) -> Result<(), KeyError> {
        if self.pdn != pdn {
            return Err(KeyError::WrongPd(self.key));
        }
        if !self.access.contains(need) {
            return Err(KeyError::Access(self.key));
        }
        let inside = addr.checked_sub(self.iova).and_then(|o| o.checked_add(len)).is_some_and(|end| end <= self.length);
        if inside { Ok(()) } else { Err(KeyError::OutOfBounds { key: self.key, addr, len }) }
    }

    /// Appends where `len` bytes at `addr` are. They were checked by [`check`](Self::check).
    pub fn segments(&self, addr: u64, len: u64, out: &mut Vec<Seg>) {
        self.extents.segments(addr - self.iova, len, out);
    }
}

/// The regions of one virtual NIC that work, by key. Workers read it, the control queue changes it.
#[derive(Debug, Default)]
pub struct KeyTable {
    live: RwLock<RandomKeyMap<Arc<Mr>>>,
}

impl KeyTable {
    /// The region of this key.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, key: u32) -> Result<Arc<Mr>, KeyError> {
        self.live.read().get(&key).cloned().ok_or(KeyError::NoSuchKey(key))
    }

    /// Makes a region work, in place of what had its key.
    pub fn insert(&self, mr: Arc<Mr>) {
        self.live.write().insert(mr.key, mr);
    }

    /// Makes a key work no longer for work that starts from now on. What is under way ends with the
    /// worker's quantum, see [`crate::engine::quiesce`].
    pub fn remove(&self, key: u32) {
        self.live.write().remove(&key);
    }

    /// Removes all, for the caller to free once no worker uses them.
    pub fn take(&self) -> RandomKeyMap<Arc<Mr>> {
        std::mem::take(&mut *self.live.write())
    }
}
