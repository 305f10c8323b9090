//! QPs that fail for what no completion can say.

use virtio_rdma::event::EventType;

use crate::nic::Nic;
use crate::qp::Qp;

/// Why a QP fails whose completion could not be written.
pub(super) const OVERFLOW: &str = "its completion queue overflowed";

/// Something that no completion can say moves the QP to ERR.
pub(super) fn fatal(nic: &Nic, qp: &Qp, reason: &str) {
    if qp.fail() {
        tell_fatal(nic, qp, reason);
    }
}

/// The QP has just been moved to ERR for this.
pub(super) fn tell_fatal(nic: &Nic, qp: &Qp, reason: &str) {
    nic.warn(format_args!("QP {:#x} failed: {reason}", qp.id.qpn));
    nic.raise(EventType::QpFatal, qp.id.qpn);
}
