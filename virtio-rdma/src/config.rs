//! The device's configuration space (virtio 2.5 Device Configuration Space).

use zerocopy::little_endian::{U16, U32, U64};

use crate::wire::wire;

/// First word of the configuration space: "FRDA" read as little-endian bytes.
pub const MAGIC: u32 = u32::from_le_bytes(*b"FRDA");
/// Bit of [`Config::status`]: the port is up.
pub const STATUS_LINK_UP: u16 = 1;
/// Number of the feature bit of on-demand paging: [`crate::ctrl::REG_ON_DEMAND`] and the commands on pages.
pub const F_ON_DEMAND: u32 = 0;
/// Number of control virtqueues; they come first.
pub const NUM_CTRL_QUEUES: usize = 1;

wire! {
    /// The configuration space. Read-only for the driver.
    Config = "virtio_rdma_config", 64 {
        /// [`MAGIC`]; a driver refuses a device without it.
        magic: U32,
        /// [`crate::ABI_VERSION`]; a driver refuses one that it does not know.
        version: U16,
        /// Port status, see [`STATUS_LINK_UP`]. A change would raise an interrupt; none happens yet.
        status: U16,
        /// Number of event virtqueues, at least 1: one for each completion vector.
        num_event_queues: U16,
        /// Number of doorbell virtqueues, at least 1: one for each data-path worker.
        num_doorbell_queues: U16,
        /// MAC of the guest's ordinary interface that this device rides beside.
        mac: [u8; 6],
        /// Largest MTU of the port, an `enum ib_mtu` (1: 256 to 5: 4096 bytes).
        max_mtu: u8,
        /// MTU in use, an `enum ib_mtu`.
        active_mtu: u8,
        /// Node GUID, big-endian as on the wire, an EUI-64 made of `mac`.
        node_guid: [u8; 8],
        /// Speed of the port in Mbit/s, for display only.
        speed_mbps: U32,
        /// Zero; later versions put more here.
        reserved: [U64; 4],
    }
}

impl Config {
    /// Number of virtqueues of the device: control, then event, then doorbell queues.
    pub fn num_queues(&self) -> usize {
        NUM_CTRL_QUEUES + usize::from(self.num_event_queues.get()) + usize::from(self.num_doorbell_queues.get())
    }

    /// Whether magic and version are those of this crate.
    pub fn is_ours(&self) -> bool {
        self.magic.get() == MAGIC && self.version.get() == crate::ABI_VERSION
    }
}
