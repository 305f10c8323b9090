//! A NIC in software, for tests: it moves bytes between memory that was registered with it, and does on demand what a real one may do and
//! hardly ever does: completions of different queue pairs in any order and late, errors of every class, slow registration, small limits.
//!
//! It works while it is posted to or polled, so that what a test sees depends on nothing else. Only if somebody waits for an event of a late
//! one it works by itself.
//!
//! * [`Script`] says how it behaves, [`FakeNic`] is the device, with what a test may do to it and ask of it.
//! * [`world`] is what it has and what it does, [`pulse`] what keeps a late one going.

mod pulse;
mod script;
#[cfg(test)]
mod tests;
mod world;

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};
use virtio_rdma::ib::WcStatus;

use super::device::{
    Access, CompletionQueue, Connection, Device, DeviceError, Limits, MemoryRegion, PostError, ProtectionDomain,
    QueuePair, QueuePairSpec, RecvRequest, SendList, Sending, Trouble, Wc,
};
use crate::mr::Layout;
use crate::overlay::Gid;

use self::pulse::Shared;
pub use self::script::{Counts, Script, Timing};
use self::world::World;

/// The device.
#[derive(Debug)]
pub struct FakeNic {
    script: Script,
    cable: Arc<Cable>,
    world: Arc<Shared>,
    /// Which of those on the same network it is.
    port: usize,
    trouble: Arc<OwnedFd>,
    connecting: Arc<Gate>,
}

/// What NICs on the same network have in common. It ends with the last of them.
#[derive(Debug)]
struct Cable(Arc<Shared>);

impl Drop for Cable {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl FakeNic {
    /// One that behaves like this.
    ///
    /// # Panics
    /// When the system gives no descriptors.
    pub fn new(script: Script) -> Self {
        let world = Arc::new(Shared::new(World::new(&script)));
        Self::on(&Arc::new(Cable(world)), script)
    }

    /// The NIC of another host, on the same network.
    ///
    /// # Panics
    /// When the system gives no descriptors.
    #[must_use]
    pub fn beside(&self) -> Self {
        Self::on(&self.cable, self.script)
    }

    fn on(cable: &Arc<Cable>, script: Script) -> Self {
        let (world, trouble) = (cable.0.clone(), event());
        let port = world.lock().add_port(trouble.clone());
        Self { script, cable: cable.clone(), world, port, trouble, connecting: Arc::default() }
    }

    /// The send work request that is executed after so many others ends with this status.
    pub fn fail_send(&self, after: u64, status: WcStatus) {
        self.world.lock().fail_send(after, status);
    }

    /// The queue pair that is connected after so many others is not.
    pub fn refuse_connection(&self, after: u64) {
        self.world.lock().refuse_connection(after);
    }

    /// Connects no queue pair: who has one connected waits for it. Or goes on.
    pub fn hold_connecting(&self, hold: bool) {
        self.connecting.set(hold);
    }

    /// Takes a queue pair to ERR, as a broken cable or firmware would; with a number that does not exist nothing happens.
    pub fn break_qp(&self, number: u32) {
        self.world.lock().fail(number, true);
    }

    /// Its port loses its link, or has it again: hosts hear of that.
    pub fn set_link(&self, up: bool) {
        self.world.lock().tell(Trouble::Port { up });
    }

    /// Whether a host has not heard yet of what has gone wrong.
    pub fn has_trouble(&self) -> bool {
        self.world.lock().has_trouble()
    }

    /// It is pulled out: nothing that it has completes any more, and nothing can be made.
    pub fn remove(&self) {
        self.world.lock().remove();
    }

    /// Numbers of its queue pairs.
    pub fn qps(&self) -> Vec<u32> {
        self.world.lock().qp_numbers()
    }

    /// Executes nothing, or goes on.
    pub fn hold(&self, hold: bool) {
        self.world.lock().hold(hold);
    }

    /// Executes nothing until a completion queue is armed: then all, in the last moment before that counts. Whoever waits gets an event for
    /// nothing now.
    pub fn hold_until_armed(&self) {
        self.world.lock().hold_until_armed();
    }

    /// What its queue pairs were made to send with, ever.
    pub fn sending(&self) -> Vec<Sending> {
        self.world.lock().sending()
    }

    /// What it has and what it did.
    pub fn counts(&self) -> Counts {
        self.world.lock().counts()
    }
}

impl Device for FakeNic {
    #[expect(clippy::unnecessary_literal_bound, reason = "the trait's")]
    fn name(&self) -> &str {
        "fake0"
    }

    fn limits(&self) -> Limits {
        self.script.limits
    }

    fn gid(&self) -> Gid {
        Gid::link_local([2, 0xfa, 0xce, 0, 0, 0])
    }

    fn alloc_pd(&self) -> Result<Arc<dyn ProtectionDomain>, DeviceError> {
        let number = self.world.lock().add_pd()?;
        Ok(Arc::new(FakePd { gate: self.connecting.clone(), number, script: self.script, world: self.world.clone() }))
    }

    fn create_cq(&self, entries: u32) -> Result<Arc<dyn CompletionQueue>, DeviceError> {
        let event = event();
        let number = self.world.lock().add_cq(entries, event.clone())?;
        Ok(Arc::new(FakeCq { number, event, world: self.world.clone() }))
    }

    fn take_trouble(&self, out: &mut Vec<Trouble>) {
        self.world.lock().take_trouble(self.port, out);
    }

    fn trouble_fd(&self) -> BorrowedFd<'_> {
        self.trouble.as_fd()
    }
}

/// A descriptor for events.
fn event() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd"))
}

/// What threads wait at while it is shut.
#[derive(Debug, Default)]
struct Gate {
    shut: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn set(&self, shut: bool) {
        *self.shut.lock() = shut;
        self.changed.notify_all();
    }

    fn pass(&self) {
        self.changed.wait_while(&mut self.shut.lock(), |shut| *shut);
    }
}

#[derive(Debug)]
struct FakePd {
    number: u32,
    gate: Arc<Gate>,
    script: Script,
    world: Arc<Shared>,
}

impl ProtectionDomain for FakePd {
    fn register(&self, memory: &Arc<Layout>, iova: u64, access: Access) -> Result<Arc<dyn MemoryRegion>, DeviceError> {
        // Without the lock: others go on meanwhile.
        std::thread::sleep(self.script.registration);
        let key = self.world.lock().add_mr(self.number, memory.clone(), iova, access)?;
        Ok(Arc::new(FakeMr { key, world: self.world.clone() }))
    }

    fn create_qp(&self, spec: &QueuePairSpec<'_>) -> Result<Box<dyn QueuePair>, DeviceError> {
        let cq: &dyn Any = spec.cq.as_ref();
        let cq: &FakeCq = cq.downcast_ref().ok_or(DeviceError::Invalid("the completion queue"))?;
        let number = self.world.lock().add_qp(self.number, cq.number, spec)?;
        Ok(Box::new(FakeQp { number, gate: self.gate.clone(), world: self.world.clone() }))
    }
}

impl Drop for FakePd {
    fn drop(&mut self) {
        self.world.lock().remove_pd();
    }
}

#[derive(Debug)]
struct FakeMr {
    key: u32,
    world: Arc<Shared>,
}

impl MemoryRegion for FakeMr {
    fn lkey(&self) -> u32 {
        self.key
    }

    fn rkey(&self) -> u32 {
        self.key
    }
}

impl Drop for FakeMr {
    fn drop(&mut self) {
        self.world.lock().remove_mr(self.key);
    }
}

#[derive(Debug)]
struct FakeCq {
    number: u32,
    event: Arc<OwnedFd>,
    world: Arc<Shared>,
}

impl CompletionQueue for FakeCq {
    fn poll(&self, most: usize, out: &mut Vec<Wc>) {
        self.world.lock().poll(self.number, most, out);
    }

    fn arm(&self) -> Result<(), DeviceError> {
        self.world.lock().arm(self.number);
        self.world.keep_going();
        Ok(())
    }

    fn take_events(&self) {
        world::clear(&self.event);
    }

    fn events_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Drop for FakeCq {
    fn drop(&mut self) {
        self.world.lock().remove_cq(self.number);
    }
}

#[derive(Debug)]
struct FakeQp {
    number: u32,
    gate: Arc<Gate>,
    world: Arc<Shared>,
}

impl QueuePair for FakeQp {
    fn number(&self) -> u32 {
        self.number
    }

    fn connect(&self, connection: &Connection) -> Result<(), DeviceError> {
        self.gate.pass();
        self.world.lock().connect(self.number, connection)
    }

    fn start_sending(&self, sending: Sending) -> Result<(), DeviceError> {
        self.world.lock().start_sending(self.number, sending)
    }

    fn fail(&self) {
        self.world.lock().fail(self.number, false);
    }

    fn post_send(&self, list: &SendList) -> Result<(), PostError> {
        self.world.lock().post_send(self.number, list)
    }

    fn post_recv(&self, request: &RecvRequest<'_>) -> Result<(), PostError> {
        self.world.lock().post_recv(self.number, request)
    }
}

impl Drop for FakeQp {
    fn drop(&mut self) {
        self.world.lock().remove_qp(self.number);
    }
}
