//! Address handles (docs/device.md, 4.3).

use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::{Mutex, PoisonError};

use virtio_rdma::area::{AH_STRIDE, AH_VALID, AddressHandle};

use super::Pd;
use crate::guest::mem::Buf;
use crate::guest::{Error, Gid, Guest, Result};

/// Where an address handle leads.
#[derive(Debug, Clone, Copy)]
pub struct AhAttr {
    /// Destination GID.
    pub dgid: Gid,
    /// Index of the source GID.
    pub sgid_index: u16,
    /// Flow label, 20 bits.
    pub flow_label: u32,
    /// Traffic class.
    pub traffic_class: u8,
    /// Hop limit.
    pub hop_limit: u8,
}

impl AhAttr {
    /// To a GID from an entry of the own table.
    pub fn to(dgid: Gid, sgid_index: u16) -> Self {
        Self { dgid, sgid_index, flow_label: 0, traffic_class: 0, hop_limit: 64 }
    }
}

/// The table of address handles.
#[derive(Debug)]
pub struct AhTable {
    buf: Buf,
    count: u32,
    used: Mutex<Vec<u32>>,
}

impl AhTable {
    pub(in crate::guest) fn new(buf: Buf, count: u32) -> Self {
        Self { buf, count, used: Mutex::default() }
    }

    /// The memory.
    pub fn buf(&self) -> &Buf {
        &self.buf
    }

    /// Forgets all records, after a reset.
    pub(in crate::guest) fn clear(&self) {
        self.used().clear();
    }

    /// Fills a record, valid flag last.
    pub fn write(&self, number: u32, record: AddressHandle) {
        let at = number as usize * AH_STRIDE;
        let slot = self.buf.slot(at, AH_STRIDE).expect("a record does not straddle pages");
        slot.put(0, &AddressHandle { flags: 0, ..record });
        let flags = self.buf.word32(at);
        let rest = flags.load(Relaxed) & !0xff;
        flags.store(rest | u32::from(record.flags), Release);
    }

    fn take(&self) -> Result<u32> {
        let mut used = self.used();
        let number = (1..self.count).find(|n| !used.contains(n)).ok_or(Error::Full)?;
        used.push(number);
        Ok(number)
    }

    fn give(&self, number: u32) {
        self.buf.word32(number as usize * AH_STRIDE).fetch_and(!u32::from(AH_VALID), Release);
        self.used().retain(|&n| n != number);
    }

    fn used(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An address handle.
#[derive(Debug)]
pub struct Ah {
    guest: Guest,
    number: u32,
    _pd: Pd,
}

impl Pd {
    /// A new address handle.
    pub fn create_ah(&self, attr: AhAttr) -> Result<Ah> {
        let number = self.guest().ahs().take()?;
        let record = AddressHandle {
            flags: AH_VALID,
            port_num: 1,
            sgid_index: attr.sgid_index.into(),
            pdn: self.number().into(),
            dgid: attr.dgid,
            flow_label: attr.flow_label.into(),
            hop_limit: attr.hop_limit,
            traffic_class: attr.traffic_class,
            ..AddressHandle::default()
        };
        self.guest().ahs().write(number, record);
        Ok(Ah { guest: self.guest().clone(), number, _pd: self.clone() })
    }
}

impl Ah {
    /// What UD work requests name it by.
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for Ah {
    fn drop(&mut self) {
        self.guest.ahs().give(self.number);
    }
}
