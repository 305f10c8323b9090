//! The state machine of queue pairs: which `MODIFY_QP` is allowed (IBA 10.3.1, 11.2.5.2; the masks are
//! those of Linux `ib_modify_qp_is_ok`).

use virtio_rdma::ib::{QpMask, QpState, QpType};

/// Attributes that a transition must and may name.
struct Masks {
    required: QpMask,
    optional: QpMask,
}

const NONE: QpMask = QpMask::empty();
const START: QpMask = QpMask::PKEY_INDEX.union(QpMask::PORT);
const PATH: QpMask = QpMask::AV.union(QpMask::PATH_MTU).union(QpMask::DEST_QPN).union(QpMask::RQ_PSN);
const RESPONDER: QpMask = QpMask::MAX_DEST_RD_ATOMIC.union(QpMask::MIN_RNR_TIMER);
const REQUESTER: QpMask =
    QpMask::TIMEOUT.union(QpMask::RETRY_CNT).union(QpMask::RNR_RETRY).union(QpMask::MAX_QP_RD_ATOMIC);
const MIGRATION: QpMask = QpMask::ALT_PATH.union(QpMask::PATH_MIG_STATE);

/// Whether a QP of this type may go from `from` to `to` with these attributes.
pub fn allowed(kind: QpType, from: QpState, to: QpState, mask: QpMask, named_current: Option<QpState>) -> bool {
    use QpState::{Rtr, Rts, Sqd, Sqe};
    if mask.contains(QpMask::CUR_STATE) && !matches!(named_current, Some(Rtr | Rts | Sqd | Sqe)) {
        return false;
    }
    let Some(Masks { required, optional }) = masks(kind, from, to) else {
        return false;
    };
    mask.contains(required) && (required | optional | QpMask::STATE).contains(mask)
}

fn masks(kind: QpType, from: QpState, to: QpState) -> Option<Masks> {
    use QpState::{Err, Init, Reset, Rtr, Rts, Sqd, Sqe};
    let connected = matches!(kind, QpType::Rc | QpType::Uc);
    let reliable = kind == QpType::Rc;
    let pick = |when_connected: QpMask, otherwise: QpMask| {
        if connected { when_connected } else { otherwise }
    };
    let if_rc = |mask: QpMask| if reliable { mask } else { NONE };
    let (required, optional) = match (from, to) {
        (Reset, Err) => return None,
        (_, Reset | Err) => (NONE, NONE),
        (Reset, Init) if kind == QpType::Gsi => (QpMask::PKEY_INDEX | QpMask::QKEY, NONE),
        (Reset, Init) => (START | pick(QpMask::ACCESS_FLAGS, QpMask::QKEY), NONE),
        (Init, Init) => (NONE, START | pick(QpMask::ACCESS_FLAGS, QpMask::QKEY)),
        (Init, Rtr) => (
            pick(PATH, NONE) | if_rc(RESPONDER),
            QpMask::PKEY_INDEX | pick(QpMask::ALT_PATH | QpMask::ACCESS_FLAGS, QpMask::QKEY),
        ),
        (Rtr, Rts) => (QpMask::SQ_PSN | if_rc(REQUESTER), running(connected, reliable)),
        (Rts | Sqd, Rts) => (NONE, running(connected, reliable)),
        (Rts, Sqd) => (NONE, QpMask::EN_SQD_ASYNC_NOTIFY),
        (Sqe, Rts) if !reliable => (NONE, QpMask::CUR_STATE | pick(QpMask::ACCESS_FLAGS, QpMask::QKEY)),
        (Sqd, Sqd) => (
            NONE,
            QpMask::PKEY_INDEX
                | pick(QpMask::AV | QpMask::ACCESS_FLAGS | MIGRATION, QpMask::QKEY)
                | if_rc(QpMask::PORT | REQUESTER | RESPONDER),
        ),
        _ => return None,
    };
    Some(Masks { required, optional })
}

fn running(connected: bool, reliable: bool) -> QpMask {
    let by_type = if connected { QpMask::ACCESS_FLAGS | MIGRATION } else { QpMask::QKEY };
    let rnr = if reliable { QpMask::MIN_RNR_TIMER } else { NONE };
    QpMask::CUR_STATE | by_type | rnr
}

#[cfg(test)]
mod tests {
    use super::*;

    const RC_INIT: QpMask = START.union(QpMask::ACCESS_FLAGS).union(QpMask::STATE);

    #[test]
    fn an_rc_qp_comes_up_in_order() {
        let ok = |from, to, mask| allowed(QpType::Rc, from, to, mask, None);
        assert!(ok(QpState::Reset, QpState::Init, RC_INIT));
        assert!(ok(QpState::Init, QpState::Rtr, PATH | RESPONDER | QpMask::STATE));
        assert!(ok(QpState::Rtr, QpState::Rts, REQUESTER | QpMask::SQ_PSN | QpMask::STATE));
        assert!(!ok(QpState::Reset, QpState::Rtr, PATH | RESPONDER));
        assert!(!ok(QpState::Reset, QpState::Rts, NONE));
        assert!(!ok(QpState::Init, QpState::Rts, REQUESTER | QpMask::SQ_PSN));
    }

    #[test]
    fn a_missing_or_surplus_attribute_is_refused() {
        let ok = |mask| allowed(QpType::Rc, QpState::Reset, QpState::Init, mask, None);
        assert!(!ok(RC_INIT - QpMask::PORT));
        assert!(!ok(RC_INIT | QpMask::QKEY));
        assert!(allowed(QpType::Ud, QpState::Reset, QpState::Init, START | QpMask::QKEY, None));
        assert!(!allowed(QpType::Ud, QpState::Reset, QpState::Init, RC_INIT, None));
    }

    #[test]
    fn reset_is_always_reachable_and_error_from_all_but_it() {
        for &kind in QpType::ALL {
            for &from in QpState::ALL {
                assert!(allowed(kind, from, QpState::Reset, QpMask::STATE, None));
                assert_eq!(allowed(kind, from, QpState::Err, QpMask::STATE, None), from != QpState::Reset);
            }
        }
    }

    #[test]
    fn only_unreliable_qps_leave_sqe_for_rts() {
        assert!(allowed(QpType::Ud, QpState::Sqe, QpState::Rts, QpMask::STATE, None));
        assert!(!allowed(QpType::Rc, QpState::Sqe, QpState::Rts, QpMask::STATE, None));
    }

    #[test]
    fn the_named_current_state_must_be_one_that_can_be_assumed() {
        let mask = QpMask::STATE | QpMask::CUR_STATE;
        assert!(allowed(QpType::Ud, QpState::Rts, QpState::Rts, mask, Some(QpState::Rts)));
        assert!(!allowed(QpType::Ud, QpState::Rts, QpState::Rts, mask, Some(QpState::Init)));
        assert!(!allowed(QpType::Ud, QpState::Rts, QpState::Rts, mask, None));
    }
}
