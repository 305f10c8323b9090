//! Helpers that bring QPs up, and a bundle of one RC end.

use std::net::IpAddr;

use virtio_rdma::ctrl::{AddressVector, QpAttr};
use virtio_rdma::ib::{Access, QpMask, QpState, QpType};

use super::{Cq, Mr, Pd, Qp, QpSpec};
use crate::guest::ctrl::Response;
use crate::guest::{Gid, Guest, Result};
use crate::mesh::Network;
use crate::router::network_of_tests;

/// The GID of an address.
pub fn ip_gid(ip: IpAddr) -> Gid {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Attributes of an RC connection that tests vary.
#[derive(Debug, Clone, Copy)]
pub struct RcOptions {
    /// Entry of the GID table on each side.
    pub gid_index: u16,
    /// Local ACK timeout.
    pub timeout: u8,
    /// Retries.
    pub retry_cnt: u8,
    /// RNR retries.
    pub rnr_retry: u8,
    /// RNR timer code.
    pub min_rnr_timer: u8,
    /// Remote access allowed by the QP.
    pub access: Access,
    /// PSN of a's send queue; b's is one more.
    pub psn: u32,
}

impl Default for RcOptions {
    fn default() -> Self {
        Self {
            gid_index: 0,
            // Half a second in all; four where connections break all the time.
            timeout: if network_of_tests() == Network::Good { 14 } else { 17 },
            retry_cnt: 7,
            rnr_retry: 7,
            min_rnr_timer: 1,
            access: Access::REMOTE_READ | Access::REMOTE_WRITE | Access::REMOTE_ATOMIC,
            psn: 0x00ab_cdef,
        }
    }
}

/// RESET to INIT of an RC QP.
pub const RC_INIT: QpMask = QpMask::STATE.union(QpMask::PKEY_INDEX).union(QpMask::PORT).union(QpMask::ACCESS_FLAGS);
/// INIT to RTR of an RC QP.
pub const RC_RTR: QpMask = QpMask::STATE
    .union(QpMask::AV)
    .union(QpMask::PATH_MTU)
    .union(QpMask::DEST_QPN)
    .union(QpMask::RQ_PSN)
    .union(QpMask::MAX_DEST_RD_ATOMIC)
    .union(QpMask::MIN_RNR_TIMER);
/// RTR to RTS of an RC QP.
pub const RC_RTS: QpMask = QpMask::STATE
    .union(QpMask::TIMEOUT)
    .union(QpMask::RETRY_CNT)
    .union(QpMask::RNR_RETRY)
    .union(QpMask::SQ_PSN)
    .union(QpMask::MAX_QP_RD_ATOMIC);
/// What only RC QPs have.
const RELIABLE: QpMask = QpMask::TIMEOUT
    .union(QpMask::RETRY_CNT)
    .union(QpMask::RNR_RETRY)
    .union(QpMask::MAX_QP_RD_ATOMIC)
    .union(QpMask::MAX_DEST_RD_ATOMIC)
    .union(QpMask::MIN_RNR_TIMER);
/// RESET to INIT of a UD QP.
pub const UD_INIT: QpMask = QpMask::STATE.union(QpMask::PKEY_INDEX).union(QpMask::PORT).union(QpMask::QKEY);

impl Qp {
    /// RESET to INIT of an RC QP.
    pub fn to_init(&self, access: Access) -> Result<()> {
        let (mask, attr) = Self::init(access);
        self.modify(mask, attr)
    }

    fn init(access: Access) -> (QpMask, QpAttr) {
        let attr = QpAttr {
            qp_state: QpState::Init.to_wire(),
            port_num: 1,
            access_flags: access.bits().into(),
            ..QpAttr::default()
        };
        (RC_INIT, attr)
    }

    /// What a transition of this QP may name: UC knows no retries, RNR or READs.
    fn mask(&self, mask: QpMask) -> QpMask {
        if self.spec().kind == QpType::Rc { mask } else { mask - RELIABLE }
    }

    /// INIT to RTR of an RC or UC QP.
    pub fn to_rtr(&self, dgid: Gid, dest_qpn: u32, rq_psn: u32, o: &RcOptions) -> Result<()> {
        let (mask, attr) = self.rtr(dgid, dest_qpn, rq_psn, o);
        self.modify(mask, attr)
    }

    fn rtr(&self, dgid: Gid, dest_qpn: u32, rq_psn: u32, o: &RcOptions) -> (QpMask, QpAttr) {
        let av = AddressVector { dgid, sgid_index: o.gid_index.into(), hop_limit: 64, ..AddressVector::default() };
        let attr = QpAttr {
            qp_state: QpState::Rtr.to_wire(),
            path_mtu: self.guest().config().active_mtu,
            dest_qpn: dest_qpn.into(),
            rq_psn: rq_psn.into(),
            max_dest_rd_atomic: 1,
            min_rnr_timer: o.min_rnr_timer,
            av,
            ..QpAttr::default()
        };
        (self.mask(RC_RTR), attr)
    }

    /// RTR to RTS of an RC or UC QP.
    pub fn to_rts(&self, sq_psn: u32, o: &RcOptions) -> Result<()> {
        let (mask, attr) = self.rts(sq_psn, o);
        self.modify(mask, attr)
    }

    fn rts(&self, sq_psn: u32, o: &RcOptions) -> (QpMask, QpAttr) {
        let attr = QpAttr {
            qp_state: QpState::Rts.to_wire(),
            timeout: o.timeout,
            retry_cnt: o.retry_cnt,
            rnr_retry: o.rnr_retry,
            sq_psn: sq_psn.into(),
            max_rd_atomic: 1,
            ..QpAttr::default()
        };
        (self.mask(RC_RTS), attr)
    }

    /// RESET to RTS of an RC QP whose peer may not exist.
    pub fn to_rts_alone(&self, dgid: Gid, dest_qpn: u32, o: &RcOptions) -> Result<()> {
        self.to_init(o.access)?;
        self.to_rtr(dgid, dest_qpn, o.psn, o)?;
        self.to_rts(o.psn, o)
    }

    /// RESET to RTS of a UD or GSI QP.
    pub fn to_ud(&self, qkey: u32) -> Result<()> {
        let attr = QpAttr { qp_state: QpState::Init.to_wire(), port_num: 1, qkey: qkey.into(), ..QpAttr::default() };
        let mask = if self.spec().kind == QpType::Gsi { UD_INIT - QpMask::PORT } else { UD_INIT };
        self.modify(mask, attr)?;
        self.modify_state(QpState::Rtr)?;
        let attr = QpAttr { qp_state: QpState::Rts.to_wire(), sq_psn: 1.into(), ..QpAttr::default() };
        self.modify(QpMask::STATE | QpMask::SQ_PSN, attr)
    }
}

/// Connects two RC QPs, which may be of one guest, or one and the same.
pub fn connect(a: &Qp, b: &Qp, o: &RcOptions) -> Result<()> {
    let gid = |qp: &Qp| qp.guest().gids()[usize::from(o.gid_index)];
    let same = std::ptr::eq(a, b);
    let (psn_a, psn_b) = (o.psn, if same { o.psn } else { o.psn + 1 });
    let ends: &[(&Qp, &Qp, u32, u32)] =
        if same { &[(a, a, psn_a, psn_a)] } else { &[(a, b, psn_a, psn_b), (b, a, psn_b, psn_a)] };
    for (qp, peer, _, peer_psn) in ends {
        qp.to_init(o.access)?;
        qp.to_rtr(gid(peer), peer.number(), *peer_psn, o)?;
    }
    for (qp, _, psn, _) in ends {
        qp.to_rts(*psn, o)?;
    }
    Ok(())
}

/// Brings QPs of one guest from RESET to RTS, each connected to its counterpart in `peers`, with the commands in a pipeline. The peers' side is theirs.
pub fn connect_side(qps: &[Qp], peers: &[Qp], o: &RcOptions) -> Result<()> {
    let (Some(first), Some(peer)) = (qps.first(), peers.first()) else {
        return Ok(());
    };
    let (guest, gid) = (first.guest(), peer.guest().gids()[usize::from(o.gid_index)]);
    let commands = |qp: &Qp, peer: &Qp| {
        let steps = [Qp::init(o.access), qp.rtr(gid, peer.number(), o.psn, o), qp.rts(o.psn, o)];
        steps.map(|(mask, attr)| qp.modify_request(mask, attr))
    };
    let requests: Vec<_> = qps.iter().zip(peers).flat_map(|(qp, peer)| commands(qp, peer)).collect();
    guest.pipeline(&requests)?.iter().try_for_each(Response::ok)
}

/// One end of an RC connection with everything that belongs to it.
#[derive(Debug)]
pub struct Rc {
    /// The QP.
    pub qp: Qp,
    /// CQ of both queues.
    pub cq: Cq,
    /// A region of its own.
    pub mr: Mr,
    /// The protection domain.
    pub pd: Pd,
}

impl Rc {
    /// An unconnected end with a region of `len` bytes.
    pub fn new(guest: &Guest, spec: QpSpec, len: usize) -> Result<Self> {
        let pd = guest.alloc_pd()?;
        let cq = guest.create_cq(spec.send_depth + spec.recv_depth)?;
        let mr = pd.reg_new(len)?;
        let qp = pd.create_qp(spec, &cq)?;
        Ok(Self { qp, cq, mr, pd })
    }

    /// Two connected ends with regions of `len` bytes.
    pub fn pair(a: &Guest, b: &Guest, len: usize) -> Result<(Self, Self)> {
        Self::pair_with(a, b, &QpSpec::rc(), len, &RcOptions::default())
    }

    /// As [`pair`](Self::pair), with everything chosen.
    pub fn pair_with(a: &Guest, b: &Guest, spec: &QpSpec, len: usize, o: &RcOptions) -> Result<(Self, Self)> {
        let ends = (Self::new(a, spec.clone(), len)?, Self::new(b, spec.clone(), len)?);
        connect(&ends.0.qp, &ends.1.qp, o)?;
        Ok(ends)
    }

    /// A second connected pair, whose ends share their protection domains with these.
    pub fn sibling(of: (&Self, &Self), spec: &QpSpec, len: usize) -> Result<(Self, Self)> {
        let end = |rc: &Self| -> Result<Self> {
            let cq = rc.pd.guest().create_cq(255)?;
            let qp = rc.pd.create_qp(spec.clone(), &cq)?;
            Ok(Self { qp, cq, mr: rc.pd.reg_new(len)?, pd: rc.pd.clone() })
        };
        let ends = (end(of.0)?, end(of.1)?);
        connect(&ends.0.qp, &ends.1.qp, &RcOptions { psn: 77, ..RcOptions::default() })?;
        Ok(ends)
    }
}
