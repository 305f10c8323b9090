//! A guest in this process: vhost-user frontend and driver over memfd memory.
//!
//! Written from `docs/device.md`; it shares nothing with the device but the ABI crate. It behaves like a good driver
//! unless asked not to: rings, virtqueues and areas can be reached as raw memory, and commands sent as raw bytes.

pub mod ctrl;
pub mod doorbell;
mod error;
pub mod events;
pub mod mem;
mod setup;
pub mod verbs;
pub mod vhost;
pub mod virtq;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freeflow_backend::stepped::SteppedNic;
use virtio_rdma::config::Config;
use virtio_rdma::ctrl::{DeviceAttr, Extent, ObjectRequest, Opcode, Status};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use error::{Error, Result};
pub use setup::link_local;

use ctrl::{Ctrl, Request, Response};
use doorbell::DoorbellArea;
use events::Events;
use mem::{Buf, GuestMemory, Placement};
use verbs::AhTable;
use vhost::Connection;

/// Bytes of a GID.
pub type Gid = [u8; 16];

/// How a guest is made.
#[derive(Debug, Clone)]
pub struct GuestConfig {
    /// Bytes of memory, when `memory` is not given.
    pub memory_size: u64,
    /// Memory of an earlier connection.
    pub memory: Option<Arc<GuestMemory>>,
    /// GIDs to add besides the link-local one, which is entry 0.
    pub gids: Vec<Gid>,
    /// How rings and areas lie in memory.
    pub rings: Placement,
    /// Feature bits that are not accepted.
    pub declined: u64,
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self { memory_size: 64 << 20, memory: None, gids: Vec::new(), rings: Placement::Contiguous, declined: 0 }
    }
}

/// A connected guest; clones are the same guest. It disconnects when the last clone and the last object are gone.
#[derive(Debug, Clone)]
pub struct Guest(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    connection: Mutex<Option<Connection>>,
    connected: AtomicBool,
    /// Counts resets, so that objects of before do not destroy those of after.
    generation: AtomicU64,
    memory: Arc<GuestMemory>,
    placement: Placement,
    config: Config,
    attr: DeviceAttr,
    ctrl: Mutex<Ctrl>,
    events: Events,
    doorbells: Vec<Arc<DoorbellArea>>,
    doorbell_queues: Vec<virtq::Virtq>,
    arm: Buf,
    ahs: AhTable,
    gids: Vec<Gid>,
}

impl Guest {
    /// Connects to a virtual NIC's socket and brings the device up.
    pub fn connect(socket: &Path, config: GuestConfig) -> Result<Self> {
        let inner = setup::connect(socket, config)?;
        let guest = Self(Arc::new(inner));
        guest.give_areas_and_gids()?;
        Ok(guest)
    }

    /// Brings up a device that has neither VMM nor threads.
    pub fn direct(nic: &Arc<Mutex<SteppedNic>>, config: GuestConfig) -> Result<Self> {
        let guest = Self(Arc::new(setup::direct(nic, config)?));
        guest.give_areas_and_gids()?;
        Ok(guest)
    }

    /// The configuration space as read at start.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// The device's limits.
    pub fn attr(&self) -> &DeviceAttr {
        &self.0.attr
    }

    /// Its memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.0.memory
    }

    /// Entries of the GID table that were filled at start: the link-local one, then those of the configuration.
    pub fn gids(&self) -> &[Gid] {
        &self.0.gids
    }

    /// The event queues.
    pub fn events(&self) -> &Events {
        &self.0.events
    }

    /// The address handle table.
    pub fn ahs(&self) -> &AhTable {
        &self.0.ahs
    }

    /// The doorbell areas.
    pub fn doorbells(&self) -> &[Arc<DoorbellArea>] {
        &self.0.doorbells
    }

    /// The area of arm words.
    pub fn arm_words(&self) -> &Buf {
        &self.0.arm
    }

    /// How rings are placed unless asked otherwise.
    pub fn placement(&self) -> Placement {
        self.0.placement
    }

    /// Allocates adjacent memory for the application.
    pub fn alloc(&self, len: usize) -> Result<Arc<Buf>> {
        self.alloc_placed(len, Placement::Contiguous)
    }

    /// Allocates memory for the application.
    pub fn alloc_placed(&self, len: usize, placement: Placement) -> Result<Arc<Buf>> {
        self.0.memory.alloc(len, placement).map(Arc::new)
    }

    /// Takes all free memory below an address, so that whatever comes next lies above it.
    pub fn hog_below(&self, gpa: u64) -> Vec<Buf> {
        let one = || self.0.memory.alloc(mem::PAGE as usize, Placement::Contiguous).ok();
        std::iter::from_fn(one).take_while(|buf| buf.gpa(0) < gpa).collect()
    }

    /// The control queue, for pipelines and raw commands.
    pub fn ctrl(&self) -> MutexGuard<'_, Ctrl> {
        self.0.ctrl.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a command and returns its answer, whatever it is.
    pub fn send(&self, request: &Request) -> Result<Response> {
        if !self.is_connected() {
            return Err(Error::Disconnected);
        }
        self.ctrl().send(request)
    }

    /// Sends commands, several of which are under way at once, and returns their answers in the same order.
    pub fn pipeline(&self, requests: &[Request]) -> Result<Vec<Response>> {
        if !self.is_connected() {
            return Err(Error::Disconnected);
        }
        self.ctrl().pipeline(requests)
    }

    /// Sends a command that answers with a structure.
    pub fn command<T, R>(&self, opcode: Opcode, body: &T, extents: &[Extent]) -> Result<R>
    where
        T: IntoBytes + Immutable + ?Sized,
        R: FromBytes,
    {
        self.send(&Request::typed::<T, R>(opcode, body, extents))?.body()
    }

    /// Sends a command that answers with a status alone.
    pub fn command_status<T>(&self, opcode: Opcode, body: &T, extents: &[Extent]) -> Result<Status>
    where
        T: IntoBytes + Immutable + ?Sized,
    {
        self.send(&Request::new(opcode, body, extents, 0))?.status()
    }

    /// As [`command_status`](Self::command_status), with anything but `OK` an error.
    pub fn command_ok<T>(&self, opcode: Opcode, body: &T, extents: &[Extent]) -> Result<()>
    where
        T: IntoBytes + Immutable + ?Sized,
    {
        self.send(&Request::new(opcode, body, extents, 0))?.ok()
    }

    /// Whether the connection was neither closed by us nor found closed.
    pub fn is_connected(&self) -> bool {
        self.0.connected.load(Relaxed)
    }

    /// Closes the connection without a word, as a guest that is killed does.
    pub fn disconnect(&self) {
        self.0.connected.store(false, Relaxed);
        self.connection().take();
    }

    /// Destroys an object of this generation; what was reset or disconnected is gone already.
    fn destroy(&self, generation: u64, opcode: Opcode, number: u32) {
        if self.is_connected() && self.generation() == generation {
            let body = ObjectRequest { number: number.into(), reserved: 0.into() };
            // A test that wants to know destroys by itself; a device that fails here fails elsewhere too.
            let _ = self.command_status(opcode, &body, &[]);
        }
    }

    fn generation(&self) -> u64 {
        self.0.generation.load(Relaxed)
    }

    /// Runs something on the vhost-user connection.
    pub fn with_connection<T>(&self, f: impl FnOnce(&mut Connection) -> Result<T>) -> Result<T> {
        f(self.connection().as_mut().ok_or(Error::Disconnected)?)
    }

    fn connection(&self) -> MutexGuard<'_, Option<Connection>> {
        self.0.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
