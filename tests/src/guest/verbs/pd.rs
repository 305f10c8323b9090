//! Protection domains.

use std::sync::Arc;

use virtio_rdma::ctrl::{ObjectResponse, Opcode};

use crate::guest::{Guest, Result};

/// A protection domain; clones are the same one.
#[derive(Debug, Clone)]
pub struct Pd(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    guest: Guest,
    generation: u64,
    number: u32,
}

impl Pd {
    /// Its number.
    pub fn number(&self) -> u32 {
        self.0.number
    }

    /// The guest that it belongs to.
    pub fn guest(&self) -> &Guest {
        &self.0.guest
    }
}

impl Guest {
    /// A new protection domain.
    pub fn alloc_pd(&self) -> Result<Pd> {
        let generation = self.generation();
        let response: ObjectResponse = self.command(Opcode::AllocPd, &[0u8; 0], &[])?;
        Ok(Pd(Arc::new(Inner { guest: self.clone(), generation, number: response.number.get() })))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.guest.destroy(self.generation, Opcode::DeallocPd, self.number);
    }
}
