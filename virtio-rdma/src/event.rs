//! Records that the device writes into buffers of the event virtqueues.

use zerocopy::little_endian::{U16, U32};

use crate::ib::wire_enum;
use crate::wire::wire;

wire! {
    /// One event. The device fills one buffer with one event.
    Event = "virtio_rdma_event", 16 {
        /// An [`EventType`].
        kind: U16,
        /// Of a page fault, 1 if the pages are to be written; else zero.
        write: U16,
        /// Number of the object: a CQ number, QP number, SRQ number, key or port, by `kind`.
        number: U32,
        /// Of a page fault, the first page; else zero.
        page: U32,
        /// Of a page fault, how many pages; else zero.
        count: U32,
    }
}

wire_enum! {
    /// What happened. A driver ignores kinds that it does not know.
    EventType: u16 {
        /// An armed CQ has a completion; comes on the event queue of the CQ's vector.
        Completion = 1,
        /// A CQ overflowed (`IB_EVENT_CQ_ERR`).
        CqError = 2,
        /// A QP failed without a completion that could say so (`IB_EVENT_QP_FATAL`).
        QpFatal = 16,
        /// Request error seen by the responder (`IB_EVENT_QP_REQ_ERR`).
        QpRequestError = 17,
        /// Access error seen by the responder (`IB_EVENT_QP_ACCESS_ERR`).
        QpAccessError = 18,
        /// The first message arrived while in RTR (`IB_EVENT_COMM_EST`).
        CommEstablished = 19,
        /// The send queue has drained (`IB_EVENT_SQ_DRAINED`).
        SqDrained = 20,
        /// Last WQE of an SRQ consumer reached (`IB_EVENT_QP_LAST_WQE_REACHED`).
        LastWqeReached = 21,
        /// SRQ failed (`IB_EVENT_SRQ_ERR`).
        SrqError = 32,
        /// SRQ limit reached (`IB_EVENT_SRQ_LIMIT_REACHED`).
        SrqLimit = 33,
        /// A request needs pages of an on-demand region; `number` is its key.
        PageFault = 48,
        /// The device can do no more until it is reset (`IB_EVENT_DEVICE_FATAL`).
        DeviceFatal = 64,
    }
}
