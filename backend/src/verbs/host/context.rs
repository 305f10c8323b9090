#![expect(unsafe_code, reason = "calls libibverbs")]
//! Devices as libibverbs lists them, and one of them opened.

use std::ffi::{CStr, c_int};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rdma_sys::{
    ibv_ack_async_event, ibv_async_event, ibv_close_device, ibv_context, ibv_device_attr, ibv_free_device_list,
    ibv_get_async_event, ibv_get_device_list, ibv_get_device_name, ibv_gid_entry, ibv_open_device, ibv_port_attr,
    ibv_port_state, ibv_query_device,
};

use virtio_rdma::ib::AtomicCap;

use super::super::device::Limits;
use crate::overlay::Gid;

/// `IBV_LINK_LAYER_ETHERNET`, a preprocessor constant.
const ETHERNET: u8 = 2;
/// `IBV_GID_TYPE_ROCE_V2` of `ibv_gid_entry`, whose enumeration the bindings lack.
const ROCE_V2: u32 = 2;

unsafe extern "C" {
    /// Behind the inline function `ibv_query_gid_table`, and so not in the bindings.
    fn _ibv_query_gid_table(
        context: *mut ibv_context,
        entries: *mut ibv_gid_entry,
        max_entries: usize,
        flags: u32,
        entry_size: usize,
    ) -> isize;
}

/// What the system says of the last call.
pub fn last_error() -> io::Error {
    io::Error::last_os_error()
}

/// Names of all devices.
pub fn names() -> io::Result<Vec<String>> {
    with_devices(|devices| devices.iter().map(|device| name_of(*device)).collect())
}

fn name_of(device: *mut rdma_sys::ibv_device) -> String {
    // SAFETY: `device` is an entry of a list that has not been freed; its name is a string inside it.
    unsafe { CStr::from_ptr(ibv_get_device_name(device)) }.to_string_lossy().into_owned()
}

fn with_devices<T>(look: impl FnOnce(&[*mut rdma_sys::ibv_device]) -> T) -> io::Result<T> {
    let mut count: c_int = 0;
    // SAFETY: `count` may be written to.
    let list = unsafe { ibv_get_device_list(&raw mut count) };
    if list.is_null() {
        return Err(last_error());
    }
    // SAFETY: the library says that this many entries are there.
    let found = look(unsafe { std::slice::from_raw_parts(list, count as usize) });
    // SAFETY: the list is of `ibv_get_device_list` and freed once; nothing of it is kept, opened devices aside, which the library counts.
    unsafe { ibv_free_device_list(list) };
    Ok(found)
}

/// A device that is open.
#[derive(Debug)]
pub struct Context(NonNull<ibv_context>);

// SAFETY: libibverbs may be called for one context from many threads at a time (its documentation says so of every verb), and our fields
// do not change.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// What can be said of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// Up.
    pub active: bool,
    /// Not InfiniBand.
    pub ethernet: bool,
    /// Code of the MTU that it has now.
    pub mtu: u8,
}

/// An entry of a GID table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GidEntry {
    /// Port.
    pub port: u8,
    /// Index in the port's table.
    pub index: u8,
    /// The GID.
    pub gid: Gid,
    /// For RoCE v2.
    pub roce_v2: bool,
}

/// What a device tells without being asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The queue pair of this number is in error.
    Pair(u32),
    /// A completion queue overflowed.
    Completions,
    /// A port is up or down.
    Port {
        /// Which.
        port: u8,
        /// Up.
        up: bool,
    },
    /// The GID table of a port has changed.
    Gids,
    /// The device is gone.
    Removed,
    /// Nothing that matters to us.
    Other,
}

impl Context {
    /// Opens the device of this name; `None` if there is none.
    pub fn open(name: &str) -> io::Result<Option<Self>> {
        with_devices(|devices| {
            let Some(device) = devices.iter().find(|device| name_of(**device) == name) else { return Ok(None) };
            // SAFETY: the device is an entry of a list that has not been freed.
            let context = NonNull::new(unsafe { ibv_open_device(*device) }).ok_or_else(last_error)?;
            let context = Self(context);
            do_not_wait(context.events())?;
            Ok(Some(context))
        })?
    }

    /// For calls of the library.
    pub fn as_ptr(&self) -> *mut ibv_context {
        self.0.as_ptr()
    }

    /// Readable when there is an event.
    pub fn events(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open, and has this descriptor as long as it is, which is as long as `self`.
        unsafe { BorrowedFd::borrow_raw((*self.as_ptr()).async_fd) }
    }

    /// How much the device can do; of inline data nothing is known, and the port is not looked at.
    pub fn limits(&self) -> io::Result<Limits> {
        let attr = self.attr()?;
        let number = |n: c_int| u32::try_from(n).unwrap_or(0);
        Ok(Limits {
            qps: number(attr.max_qp),
            wrs: number(attr.max_qp_wr),
            sges: number(attr.max_sge),
            inline: 0,
            cqs: number(attr.max_cq),
            cqes: number(attr.max_cqe),
            mrs: number(attr.max_mr),
            reads: attr.max_qp_rd_atom.min(attr.max_qp_init_rd_atom).clamp(0, 255) as u8,
            mtu: 0,
            atomics: AtomicCap::from_wire(attr.atomic_cap).unwrap_or(AtomicCap::None),
        })
    }

    /// Number of ports.
    pub fn ports(&self) -> io::Result<u8> {
        Ok(self.attr()?.phys_port_cnt)
    }

    fn attr(&self) -> io::Result<ibv_device_attr> {
        let mut attr = MaybeUninit::<ibv_device_attr>::zeroed();
        // SAFETY: the context is open, and `attr` may be written to.
        errno(unsafe { ibv_query_device(self.as_ptr(), attr.as_mut_ptr()) })?;
        // SAFETY: all zeroes is a value of this structure of numbers, and so is what the library wrote.
        Ok(unsafe { attr.assume_init() })
    }

    /// A port as it is now.
    pub fn port(&self, port: u8) -> io::Result<Port> {
        let mut attr = MaybeUninit::<ibv_port_attr>::zeroed();
        // SAFETY: the context is open, and `attr` may be written to; it is the structure of the bindings' own function.
        errno(unsafe { rdma_sys::___ibv_query_port(self.as_ptr(), port, attr.as_mut_ptr()) })?;
        // SAFETY: all zeroes is a value of this structure of numbers, and so is what the library wrote.
        let attr = unsafe { attr.assume_init() };
        let active = attr.state == ibv_port_state::IBV_PORT_ACTIVE;
        Ok(Port { active, ethernet: attr.link_layer == ETHERNET, mtu: attr.active_mtu as u8 })
    }

    /// The GID tables of all ports.
    pub fn gids(&self) -> io::Result<Vec<GidEntry>> {
        const MOST: usize = 1024;
        let mut entries: Vec<ibv_gid_entry> = Vec::with_capacity(MOST);
        // SAFETY: the context is open, and there is room for so many entries of this size.
        let count =
            unsafe { _ibv_query_gid_table(self.as_ptr(), entries.as_mut_ptr(), MOST, 0, size_of::<ibv_gid_entry>()) };
        let count = usize::try_from(count).map_err(|_| io::Error::from_raw_os_error(-count as i32))?;
        // SAFETY: the library has written so many, and not more than it was told that there is room for.
        unsafe { entries.set_len(count.min(MOST)) };
        Ok(entries.iter().filter_map(gid_entry).collect())
    }

    /// The next event; `WouldBlock` if there is none.
    pub fn next_event(&self) -> io::Result<Event> {
        let mut event = MaybeUninit::<ibv_async_event>::zeroed();
        // SAFETY: the context is open, and `event` may be written to.
        if unsafe { ibv_get_async_event(self.as_ptr(), event.as_mut_ptr()) } != 0 {
            return Err(last_error());
        }
        // SAFETY: the library wrote an event. Its type is read as a number, since newer libraries have types that the enumeration lacks.
        let kind = unsafe { (&raw const (*event.as_ptr()).event_type).cast::<u32>().read() };
        // SAFETY: the event is of the library, whose kind says which part of the element it has. What it names is not destroyed before
        // the event is acknowledged.
        let what = unsafe { meaning(kind, event.as_ptr()) };
        // SAFETY: it is acknowledged once.
        unsafe { ibv_ack_async_event(event.as_mut_ptr()) };
        Ok(what)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: whoever has an object of the context keeps it, so there is none left, and nobody uses it after this.
        unsafe { ibv_close_device(self.as_ptr()) };
    }
}

/// Reading from it fails where it would wait.
pub fn do_not_wait(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// What a verb returns: zero, or an error number.
pub fn errno(result: c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        -1 => Err(last_error()),
        error => Err(io::Error::from_raw_os_error(error.abs())),
    }
}

fn gid_entry(entry: &ibv_gid_entry) -> Option<GidEntry> {
    // SAFETY: any 16 bytes are a GID.
    let gid = Gid(unsafe { entry.gid.raw });
    let (port, index) = (u8::try_from(entry.port_num).ok()?, u8::try_from(entry.gid_index).ok()?);
    Some(GidEntry { port, index, gid, roce_v2: entry.gid_type == ROCE_V2 })
}

/// # Safety
/// `event` is one that the library gave, of this kind, and not yet acknowledged.
unsafe fn meaning(kind: u32, event: *const ibv_async_event) -> Event {
    use rdma_sys::ibv_event_type as of;
    // SAFETY: the caller's; the element is read as what the kind says that it is.
    let port = || unsafe { (*event).element.port_num as u8 };
    match kind {
        _ if kind == of::IBV_EVENT_CQ_ERR as u32 => Event::Completions,
        _ if [of::IBV_EVENT_QP_FATAL, of::IBV_EVENT_QP_REQ_ERR, of::IBV_EVENT_QP_ACCESS_ERR]
            .iter()
            .any(|known| *known as u32 == kind) =>
        {
            // SAFETY: as above; the queue pair is there until the event is acknowledged.
            Event::Pair(unsafe { (*(*event).element.qp).qp_num })
        }
        _ if kind == of::IBV_EVENT_PORT_ACTIVE as u32 => Event::Port { port: port(), up: true },
        _ if kind == of::IBV_EVENT_PORT_ERR as u32 => Event::Port { port: port(), up: false },
        _ if kind == of::IBV_EVENT_GID_CHANGE as u32 => Event::Gids,
        _ if kind == of::IBV_EVENT_DEVICE_FATAL as u32 => Event::Removed,
        _ => Event::Other,
    }
}
