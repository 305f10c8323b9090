//! Commands of the control virtqueue.
//!
//! A request is one descriptor chain: device-readable bytes ([`Header`], the command's own structure, and for some an
//! array of [`Extent`]s), then device-writable bytes for [`ResponseHeader`] and the command's response. Commands are executed in the order
//! in which they were made available; several may be under way.

mod device;
mod memory;
mod queues;

pub use device::*;
pub use memory::*;
pub use queues::*;

use zerocopy::little_endian::{U16, U32, U64};

use crate::ib::wire_enum;
use crate::wire::wire;

/// Largest request in bytes, header and extents included. Longer extent lists go in several commands
/// where the command allows it.
pub const MAX_REQUEST: usize = 64 * 1024;
/// Largest response in bytes.
pub const MAX_RESPONSE: usize = 4096;

wire! {
    /// Starts every request.
    Header = "virtio_rdma_ctrl_hdr", 8 {
        /// An [`Opcode`].
        opcode: U16,
        /// Zero.
        flags: U16,
        /// Bytes of the whole request, this header included.
        length: U32,
    }
}

wire! {
    /// Starts every response.
    ResponseHeader = "virtio_rdma_ctrl_resp", 8 {
        /// A [`Status`].
        status: U32,
        /// Bytes of the whole response, this header included; just this header unless the status is OK.
        length: U32,
    }
}

wire! {
    /// A piece of guest-physical memory.
    Extent = "virtio_rdma_extent", 16 {
        /// Guest-physical address of the first byte.
        addr: U64,
        /// Bytes, not zero.
        len: U64,
    }
}

wire_enum! {
    /// Commands. Ranges group them by class; numbers not listed are answered with [`Status::Unsupported`].
    Opcode: u16 {
        /// Free every object and area of the device. The first command of a driver.
        Reset = 0x0001,
        /// Limits: [`DeviceAttr`](super::DeviceAttr).
        QueryDevice = 0x0002,
        /// Share an area: [`SetArea`](super::SetArea).
        SetArea = 0x0003,
        /// Put a GID into the table: [`AddGid`](super::AddGid).
        AddGid = 0x0004,
        /// Clear an entry of the GID table: [`DelGid`](super::DelGid).
        DelGid = 0x0005,
        /// New protection domain.
        AllocPd = 0x0101,
        /// Free a protection domain.
        DeallocPd = 0x0102,
        /// Register memory: [`RegMr`](super::RegMr).
        RegMr = 0x0201,
        /// Further extents of a region: [`ExtendMr`](super::ExtendMr).
        ExtendMr = 0x0202,
        /// Change a region: [`ReregMr`](super::ReregMr).
        ReregMr = 0x0203,
        /// Free a region.
        DeregMr = 0x0204,
        /// New region for fast registration, without memory yet: [`AllocMr`](super::AllocMr).
        AllocMr = 0x0205,
        /// Give an on-demand region pages: [`MapPages`](super::MapPages).
        MapPages = 0x0206,
        /// Take pages of an on-demand region away: [`PageRange`](super::PageRange).
        UnmapPages = 0x0207,
        /// Pages of an on-demand region cannot be given: [`PageRange`](super::PageRange).
        DenyPages = 0x0208,
        /// New completion queue: [`CreateCq`](super::CreateCq).
        CreateCq = 0x0301,
        /// Free a completion queue.
        DestroyCq = 0x0302,
        /// Give a completion queue another ring: [`ResizeCq`](super::ResizeCq).
        ResizeCq = 0x0303,
        /// New queue pair: [`CreateQp`](super::CreateQp).
        CreateQp = 0x0401,
        /// Change a queue pair: [`ModifyQp`](super::ModifyQp).
        ModifyQp = 0x0402,
        /// Read back a queue pair's attributes.
        QueryQp = 0x0403,
        /// Free a queue pair.
        DestroyQp = 0x0404,
        /// New shared receive queue: [`CreateSrq`](super::CreateSrq).
        CreateSrq = 0x0501,
        /// Change a shared receive queue: [`ModifySrq`](super::ModifySrq).
        ModifySrq = 0x0502,
        /// Read back a shared receive queue's attributes: [`SrqAttr`](super::SrqAttr).
        QuerySrq = 0x0503,
        /// Free a shared receive queue.
        DestroySrq = 0x0504,
        /// Give a shared receive queue another ring: [`ResizeSrq`](super::ResizeSrq).
        ResizeSrq = 0x0505,
        /// New memory window: [`AllocMw`](super::AllocMw).
        AllocMw = 0x0601,
        /// Free a memory window.
        DeallocMw = 0x0602,
        /// A UD queue pair joins a multicast group: [`Mcast`](super::Mcast).
        AttachMcast = 0x0701,
        /// It leaves the group: [`Mcast`](super::Mcast).
        DetachMcast = 0x0702,
    }
}

/// First number of the range reserved for streams (sockets).
pub const OPCODES_STREAM: u16 = 0x0800;

wire_enum! {
    /// Outcome of a command, with the errno that a Linux driver returns for it.
    Status: u32 {
        /// Done.
        Ok = 0,
        /// A field or the length is wrong (`EINVAL`).
        Invalid = 1,
        /// A quota or a table of the device is full (`ENOMEM`).
        NoResources = 2,
        /// No such object (`EINVAL`).
        NotFound = 3,
        /// Other objects still use it (`EBUSY`).
        Busy = 4,
        /// Not offered by this device (`EOPNOTSUPP`).
        Unsupported = 5,
        /// The policy of the virtual NIC forbids it, such as a GID it was not given (`EPERM`).
        NotPermitted = 6,
        /// An extent is outside guest memory (`EFAULT`).
        BadAddress = 7,
        /// The object's state does not allow it (`EINVAL`).
        BadState = 8,
    }
}

wire! {
    /// Request that names one object and nothing else: `DEALLOC_PD`, `DEREG_MR`, `DESTROY_CQ`, `QUERY_QP`, `DESTROY_QP`, `QUERY_SRQ`, `DESTROY_SRQ`,
    /// `DEALLOC_MW`.
    ObjectRequest = "virtio_rdma_object_req", 8 {
        /// PD number, key, CQ, QP or SRQ number.
        number: U32,
        /// Zero.
        reserved: U32,
    }
}

wire! {
    /// Response that names one new object: `ALLOC_PD`, `REG_MR`, `ALLOC_MR`, `CREATE_CQ`, `CREATE_SRQ`, `ALLOC_MW`.
    ObjectResponse = "virtio_rdma_object_resp", 8 {
        /// PD number, key, CQ or SRQ number.
        number: U32,
        /// Zero.
        reserved: U32,
    }
}
