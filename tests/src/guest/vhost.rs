//! The vhost-user frontend: what a VMM does for the guest.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use ::vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use ::vhost::vhost_user::{Frontend, VhostUserFrontend};
use ::vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_rdma::config::{Config, F_ON_DEMAND};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::mem::Region;
use super::virtq::Virtq;
use super::{Error, Result};
use crate::sys;

/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;
/// Longest wait for the socket to appear.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest wait for an answer. A device that needs longer hangs.
const ANSWER: Duration = Duration::from_secs(20);

/// A vhost-user connection.
pub struct Connection {
    frontend: Frontend,
    stream: Arc<UnixStream>,
    protocol: VhostUserProtocolFeatures,
    features: u64,
    base_first: bool,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("protocol", &self.protocol).finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects to a virtual NIC's socket and negotiates features: all that the device offers but for those declined.
    pub fn open(socket: &Path, declined: u64) -> Result<Self> {
        let stream = connect(socket)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut frontend = Frontend::from_stream(stream.try_clone()?, 256);
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        if offered & VERSION_1 == 0 {
            return Err(Error::NotOurs("VIRTIO_F_VERSION_1 is not offered"));
        }
        let known = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | 1 << F_ON_DEMAND;
        let features = VERSION_1 | (offered & known & !declined);
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE;
        let protocol = frontend.get_protocol_features()? & wanted;
        frontend.set_protocol_features(protocol)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_features(features)?;
        Ok(Self { frontend, stream: Arc::new(stream), protocol, features, base_first: false })
    }

    /// Reads the configuration space.
    pub fn config(&mut self) -> Result<Config> {
        let mut config = Config::new_zeroed();
        let size = size_of::<Config>() as u32;
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) = self.frontend.get_config(0, size, flags, config.as_bytes())?;
        config = Config::read_from_bytes(&bytes).map_err(|_| Error::BadResponse("size of the configuration"))?;
        Ok(config)
    }

    /// Number of virtqueues that the device has.
    pub fn num_queues(&mut self) -> Result<u64> {
        Ok(self.frontend.get_queue_num()?)
    }

    /// What was negotiated.
    pub fn protocol(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    /// Gives the device the whole memory table, replacing the one before.
    pub fn set_memory(&self, regions: &[Region]) -> Result<()> {
        let infos: Vec<VhostUserMemoryRegionInfo> = regions.iter().map(Region::info).collect();
        self.frontend.set_mem_table(&infos)?;
        Ok(())
    }

    /// Plugs one region in.
    pub fn add_region(&mut self, region: &Region) -> Result<()> {
        self.frontend.add_mem_region(&region.info())?;
        Ok(())
    }

    /// Unplugs one region.
    pub fn remove_region(&mut self, region: &Region) -> Result<()> {
        Ok(self.frontend.remove_mem_region(&region.info())?)
    }

    /// Sets a virtqueue up and starts it at an index of the available ring.
    pub fn start_queue(&mut self, index: usize, queue: &Virtq, base: u16) -> Result<()> {
        self.frontend.set_vring_num(index, queue.size())?;
        if self.base_first {
            self.frontend.set_vring_base(index, base)?;
        }
        self.frontend.set_vring_addr(index, &queue.layout())?;
        if !self.base_first {
            self.frontend.set_vring_base(index, base)?;
        }
        self.frontend.set_vring_call(index, &queue.call)?;
        self.frontend.set_vring_kick(index, &queue.kick)?;
        Ok(self.frontend.set_vring_enable(index, true)?)
    }

    /// From now on the base of a virtqueue is told before its addresses, as User-mode Linux does; QEMU does it after.
    pub fn tell_base_first(&mut self) {
        self.base_first = true;
    }

    /// Stops a virtqueue, and returns the index of the available ring that it would go on with.
    pub fn stop_queue(&mut self, index: usize) -> Result<u16> {
        Ok(self.frontend.get_vring_base(index)? as u16)
    }

    /// Resets the virtio device.
    pub fn reset(&mut self) -> Result<()> {
        Ok(self.frontend.reset_device()?)
    }

    /// Tells the device again what the driver accepted, as after a reset.
    pub fn set_features_again(&self) -> Result<()> {
        Ok(self.frontend.set_features(self.features)?)
    }

    /// Tells whether the connection still is.
    pub fn pulse(&self) -> Pulse {
        Pulse(Arc::downgrade(&self.stream))
    }

    /// The raw frontend, to misbehave with.
    pub fn frontend(&mut self) -> &mut Frontend {
        &mut self.frontend
    }
}

/// Tells whether a connection still is, without keeping it open.
#[derive(Debug, Clone)]
pub struct Pulse(Weak<UnixStream>);

impl Pulse {
    /// Whether neither side has closed the connection.
    pub fn beats(&self) -> bool {
        self.0.upgrade().is_some_and(|stream| !sys::is_hung_up(stream.as_fd()))
    }
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + CONNECT;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() >= deadline => return Err(e.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}
