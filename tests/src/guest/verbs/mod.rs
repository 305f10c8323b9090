//! Verbs objects over the control queue and the rings. Dropping one destroys it; what uses an object keeps it alive.

mod ah;
mod connect;
mod cq;
mod mr;
mod mw;
mod paged;
mod pd;
mod qp;
mod ring;
mod rings;
mod srq;
mod wr;

pub use ah::{Ah, AhAttr, AhTable};
pub use connect::{RC_INIT, RC_RTR, RC_RTS, Rc, RcOptions, UD_INIT, connect, connect_side, ip_gid};
pub use cq::{Cq, Wc};
pub use mr::{MAX_EXTENTS, Mr, MrSpec};
pub use mw::{Bind, FastMr, GuestMr, Mw, MwType, next_key};
pub use paged::{Fault, PagedMr};
pub use pd::Pd;
pub use qp::{Qp, QpSpec};
pub use ring::Ring;
pub use srq::Srq;
pub use wr::{Op, PART, Payload, Remote, SendWr, Sge};
