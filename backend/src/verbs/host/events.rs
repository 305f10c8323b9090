//! What the device tells without being asked. Nothing waits here: whoever wants to know waits for a descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::epoll;

use super::super::device::Trouble;
use super::Shared;
use super::choose::best_gid;
use super::context::Event;

/// The events of a device.
#[derive(Debug)]
pub struct Events {
    nic: Arc<Shared>,
    /// Has the device's descriptor in it until the device goes, whose descriptor is readable for ever then.
    fd: OwnedFd,
    gone: AtomicBool,
}

impl Events {
    /// Of this device.
    pub fn of(nic: &Arc<Shared>) -> io::Result<Self> {
        let fd = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&fd, nic.context.events(), epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        Ok(Self { nic: nic.clone(), fd, gone: AtomicBool::new(false) })
    }

    /// Readable while there may be some.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// What went wrong since the last call.
    pub fn take(&self, out: &mut Vec<Trouble>) {
        while !self.gone.load(Ordering::Acquire) {
            match self.nic.context.next_event() {
                Ok(event) => out.extend(self.note(event)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // What the kernel says of a device that it has taken away.
                    log::warn!("the host's NIC has no more events: {error}");
                    out.extend(self.end());
                }
            }
        }
    }

    fn note(&self, event: Event) -> Option<Trouble> {
        match event {
            Event::Pair(number) => Some(Trouble::QueuePair(number)),
            Event::Completions => Some(Trouble::CompletionQueue),
            Event::Port { port, up } if port == self.nic.port => Some(Trouble::Port { up }),
            Event::Removed => self.end(),
            Event::Gids => {
                self.look_at_gids();
                None
            }
            Event::Port { .. } | Event::Other => None,
        }
    }

    /// The device is gone; `None` if that was said before.
    fn end(&self) -> Option<Trouble> {
        if self.gone.swap(true, Ordering::AcqRel) {
            return None;
        }
        if let Err(error) = epoll::delete(&self.fd, self.nic.context.events()) {
            log::error!("events of a NIC that is gone cannot be ignored: {error}");
        }
        Some(Trouble::Removed)
    }

    /// Queue pairs that are connected keep what they have; those to come use what there is now.
    fn look_at_gids(&self) {
        match self.nic.context.gids().map(|gids| best_gid(self.nic.port, &gids)) {
            Ok(Some(best)) => *self.nic.gid.lock() = best,
            Ok(None) => log::warn!("the host's NIC has no RoCE v2 GID any more"),
            Err(error) => log::warn!("the host's NIC does not show its GIDs: {error}"),
        }
    }
}
