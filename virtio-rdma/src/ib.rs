//! Numbers of the InfiniBand verbs that cross the ABI unchanged, as `ib_verbs.h` has them.

use bitflags::bitflags;

/// QP number of the general service interface (IBA 3.9.2.2).
pub const GSI_QPN: u32 = 1;
/// `Q_Key` of the general service interface, whatever its QP was given (IBA 10.2.5).
pub const GSI_QKEY: u32 = 0x8001_0000;
/// Destination QP number of multicast datagrams (IBA 10.5.2).
pub const MULTICAST_QPN: u32 = 0xff_ffff;

bitflags! {
    /// Access flags of a memory region or of a QP (`enum ib_access_flags`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Access: u32 {
        /// The registering side may write through the local key.
        const LOCAL_WRITE = 1;
        /// Peers may RDMA WRITE.
        const REMOTE_WRITE = 1 << 1;
        /// Peers may RDMA READ.
        const REMOTE_READ = 1 << 2;
        /// Peers may use atomics.
        const REMOTE_ATOMIC = 1 << 3;
        /// Memory windows may be bound to the region.
        const MW_BIND = 1 << 4;
        /// Addresses start at zero.
        const ZERO_BASED = 1 << 5;
        /// A hint of the application; no meaning to the device.
        const HUGETLB = 1 << 7;
        /// Peers may FLUSH to global visibility.
        const FLUSH_GLOBAL = 1 << 8;
        /// Writes may become visible in any order.
        const RELAXED_ORDERING = 1 << 20;
    }

    /// Attributes named in a MODIFY_QP (`enum ib_qp_attr_mask`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct QpMask: u32 {
        /// `qp_state`
        const STATE = 1;
        /// `cur_qp_state`
        const CUR_STATE = 1 << 1;
        /// `en_sqd_async_notify`
        const EN_SQD_ASYNC_NOTIFY = 1 << 2;
        /// `access_flags`
        const ACCESS_FLAGS = 1 << 3;
        /// `pkey_index`
        const PKEY_INDEX = 1 << 4;
        /// `port_num`
        const PORT = 1 << 5;
        /// `qkey`
        const QKEY = 1 << 6;
        /// The address vector.
        const AV = 1 << 7;
        /// `path_mtu`
        const PATH_MTU = 1 << 8;
        /// `timeout`
        const TIMEOUT = 1 << 9;
        /// `retry_cnt`
        const RETRY_CNT = 1 << 10;
        /// `rnr_retry`
        const RNR_RETRY = 1 << 11;
        /// `rq_psn`
        const RQ_PSN = 1 << 12;
        /// `max_rd_atomic`
        const MAX_QP_RD_ATOMIC = 1 << 13;
        /// Alternate path; refused.
        const ALT_PATH = 1 << 14;
        /// `min_rnr_timer`
        const MIN_RNR_TIMER = 1 << 15;
        /// `sq_psn`
        const SQ_PSN = 1 << 16;
        /// `max_dest_rd_atomic`
        const MAX_DEST_RD_ATOMIC = 1 << 17;
        /// Path migration state; refused.
        const PATH_MIG_STATE = 1 << 18;
        /// Capabilities; refused, rings do not resize.
        const CAP = 1 << 19;
        /// `dest_qpn`
        const DEST_QPN = 1 << 20;
    }

    /// Flags of a send work request (`enum ib_send_flags`).
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct SendFlags: u32 {
        /// Wait for earlier READs and atomics.
        const FENCE = 1;
        /// Make a completion on success.
        const SIGNALED = 1 << 1;
        /// Make the peer's completion a solicited event.
        const SOLICITED = 1 << 2;
        /// The payload is in the WQE.
        const INLINE = 1 << 3;
    }

    /// Flags of a completion (`enum ib_wc_flags`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct WcFlags: u32 {
        /// The first 40 bytes of the receive buffer hold a GRH.
        const GRH = 1;
        /// `imm_data` is valid.
        const WITH_IMM = 1 << 1;
        /// `imm_data` is the rkey that the peer invalidated. The number is that of libibverbs; the kernel's own is another.
        const WITH_INV = 1 << 3;
    }
}

macro_rules! wire_enum {
    ($(#[$meta:meta])* $name:ident: $repr:ty { $($(#[$vmeta:meta])* $variant:ident = $value:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr($repr)]
        pub enum $name { $($(#[$vmeta])* $variant = $value,)* }

        impl $name {
            /// All values, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The value with this number on the wire, if there is one.
            pub const fn from_wire(raw: $repr) -> Option<Self> {
                match raw { $($value => Some(Self::$variant),)* _ => None }
            }

            /// Its number on the wire.
            pub const fn to_wire(self) -> $repr { self as $repr }
        }
    };
}
pub(crate) use wire_enum;

wire_enum! {
    /// Transport of a queue pair (`enum ib_qp_type`).
    QpType: u8 {
        /// General service interface, QP 1.
        Gsi = 1,
        /// Reliable connected.
        Rc = 2,
        /// Unreliable connected.
        Uc = 3,
        /// Unreliable datagram.
        Ud = 4,
    }
}

impl QpType {
    /// Whether each work request names its own destination.
    pub const fn is_datagram(self) -> bool {
        matches!(self, Self::Ud | Self::Gsi)
    }
}

wire_enum! {
    /// State of a queue pair (`enum ib_qp_state`; IBA 10.3.1).
    QpState: u8 {
        /// Reset.
        Reset = 0,
        /// Initialized.
        Init = 1,
        /// Ready to receive.
        Rtr = 2,
        /// Ready to send.
        Rts = 3,
        /// Send queue drained.
        Sqd = 4,
        /// Send queue error.
        Sqe = 5,
        /// Error.
        Err = 6,
    }
}

wire_enum! {
    /// Operation of a send work request (`enum ib_wr_opcode`).
    WrOpcode: u32 {
        /// RDMA WRITE.
        RdmaWrite = 0,
        /// RDMA WRITE with immediate.
        RdmaWriteWithImm = 1,
        /// SEND.
        Send = 2,
        /// SEND with immediate.
        SendWithImm = 3,
        /// RDMA READ.
        RdmaRead = 4,
        /// Compare and swap.
        AtomicCmpAndSwp = 5,
        /// Fetch and add.
        AtomicFetchAndAdd = 6,
        /// Local invalidate.
        LocalInv = 7,
        /// Bind a memory window.
        BindMw = 8,
        /// SEND with invalidate.
        SendWithInv = 9,
        /// FLUSH (IBA A19).
        Flush = 14,
        /// ATOMIC WRITE (IBA A19).
        AtomicWrite = 15,
        /// Fast registration; kernel QPs only.
        RegMr = 32,
    }
}

wire_enum! {
    /// Operation named in a completion (`enum ib_wc_opcode`).
    WcOpcode: u32 {
        /// SEND.
        Send = 0,
        /// RDMA WRITE.
        RdmaWrite = 1,
        /// RDMA READ.
        RdmaRead = 2,
        /// Compare and swap.
        CompSwap = 3,
        /// Fetch and add.
        FetchAdd = 4,
        /// Bind a memory window.
        BindMw = 5,
        /// Local invalidate.
        LocalInv = 6,
        /// FLUSH.
        Flush = 8,
        /// ATOMIC WRITE.
        AtomicWrite = 9,
        /// Fast registration. No program sees it, and kernels differ in their number for it: this one is ours.
        RegMr = 64,
        /// Receive of a SEND.
        Recv = 128,
        /// Receive consumed by an RDMA WRITE with immediate.
        RecvRdmaWithImm = 129,
    }
}

wire_enum! {
    /// Status of a completion (`enum ib_wc_status`; IBA 11.6.2).
    WcStatus: u32 {
        /// Done.
        Success = 0,
        /// A buffer was too short or an SGE list too long.
        LocLenErr = 1,
        /// The work request itself is malformed.
        LocQpOpErr = 2,
        /// A local key, address or length does not hold.
        LocProtErr = 4,
        /// Flushed: the QP is in error.
        WrFlushErr = 5,
        /// Memory window bind failed.
        MwBindErr = 6,
        /// The responder refused the request.
        RemInvReqErr = 9,
        /// A remote key, address or length does not hold.
        RemAccessErr = 10,
        /// The responder failed on its own side.
        RemOpErr = 11,
        /// No answer within timeout and retries.
        RetryExcErr = 12,
        /// The responder had no receive within the RNR retries.
        RnrRetryExcErr = 13,
        /// Anything else.
        GeneralErr = 21,
    }
}

wire_enum! {
    /// What the atomics of a device are atomic with (`enum ib_atomic_cap`; IBA 11.2.1.2).
    AtomicCap: u32 {
        /// There are none.
        None = 0,
        /// Those of QPs of the same device.
        Hca = 1,
        /// Those of every QP and of processors.
        Glob = 2,
    }
}
