//! What can go wrong in the guest.

use virtio_rdma::ctrl::Status;

/// Result of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the guest could not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The vhost-user connection failed.
    #[error("vhost-user: {0}")]
    Vhost(#[from] vhost::Error),
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The guest has no more memory.
    #[error("no {0} bytes of guest memory left")]
    OutOfMemory(usize),
    /// There is no guest memory at this address.
    #[error("no guest memory at {0:#x}")]
    NoSuchMemory(u64),
    /// The device did not answer.
    #[error("no answer to {0} in time")]
    Timeout(&'static str),
    /// The guest is not connected any more.
    #[error("not connected")]
    Disconnected,
    /// The configuration space is not that of our device.
    #[error("the device is not ours: {0}")]
    NotOurs(&'static str),
    /// The device answered with something that the specification does not allow.
    #[error("bad response: {0}")]
    BadResponse(&'static str),
    /// The device refused a command.
    #[error("refused with {0:?}")]
    Refused(Status),
    /// A ring or virtqueue has no room.
    #[error("ring is full")]
    Full,
}

impl Error {
    /// The status that the device refused a command with, if it did.
    pub fn status(&self) -> Option<Status> {
        match self {
            Self::Refused(status) => Some(*status),
            _ => None,
        }
    }
}
