//! What keeps a late fake NIC going while nobody polls it: a thread that works while somebody waits for an event.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::world::World;

/// How long it lets each piece of its work take.
const PIECE: Duration = Duration::from_micros(20);

/// The world, shared with the thread.
#[derive(Debug)]
pub(super) struct Shared {
    world: Mutex<World>,
    changed: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Shared {
    pub fn new(world: World) -> Self {
        Self { world: Mutex::new(world), changed: Condvar::new(), thread: Mutex::default() }
    }

    /// Whoever has it may give the thread something to do.
    pub fn lock(&self) -> MutexGuard<'_, World> {
        self.changed.notify_one();
        self.world.lock()
    }

    /// Somebody waits for an event: from now on there is a thread, if it needs one.
    pub fn keep_going(self: &Arc<Self>) {
        let mut thread = self.thread.lock();
        if thread.is_none() && self.world.lock().is_late() {
            let shared = self.clone();
            let spawned = std::thread::Builder::new().name("fake-nic".to_owned()).spawn(move || shared.run());
            *thread = Some(spawned.expect("a thread"));
        }
    }

    pub fn stop(&self) {
        self.world.lock().stop();
        self.changed.notify_one();
        if let Some(thread) = self.thread.lock().take() {
            // It does not panic.
            let _ = thread.join();
        }
    }

    fn run(&self) {
        let mut world = self.world.lock();
        while !world.is_stopped() {
            if world.is_waited_for() {
                world.work();
                MutexGuard::unlocked(&mut world, || std::thread::sleep(PIECE));
            } else {
                // Whoever changes something says so before it does.
                self.changed.wait_for(&mut world, Duration::from_millis(1));
            }
        }
    }
}
