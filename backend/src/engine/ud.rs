//! Unreliable datagrams on the same host (IBA 9.8.3): one copy into the destination's receive, after a GRH.
//! Those of the general service interface (IBA 3.9.2.2) are no different but for their `Q_Key`.

use std::net::IpAddr;
use std::sync::Arc;

use freeflow_tcp::frame::Datagram as Carried;
use virtio_rdma::area::AH_VALID;
use virtio_rdma::ib::{Access, GSI_QKEY, MULTICAST_QPN, QpType, SendFlags, WcFlags, WcOpcode, WcStatus};
use virtio_rdma::ring::{GRH_SIZE, SL_ROCE_V2_IPV4, SL_ROCE_V2_IPV6};

use super::complete::{RecvDone, Step, Word, complete_recv, note_limit};
use super::context::{Budget, Context, Gather, Side, Unreachable};
use super::cost;
use super::failure::fatal;
use super::job::Job;
use super::mcast::{self, Cast};
use super::{rc, tcp};
use crate::mem::{self, Source};
use crate::nic::Nic;
use crate::nic::meters::{Path, Way};
use crate::overlay::Gid;
use crate::qp::{Qp, Taken, WaitKind};
use crate::tcp::PeerId;
use crate::wqe::Op;

/// Bytes of the largest datagram: the port's MTU.
const MTU: u64 = 4096;

const IPV4_HEADER: u16 = 20;

/// How many times longer than for a receive a datagram waits for the memory of one.
const PAGE_PATIENCE: u32 = 10;

/// How many times longer it waits for room on the connection to its host, which may be a busy one.
const ROOM_PATIENCE: u32 = 10;

/// Where a datagram goes, as its address handle says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Route {
    source: Gid,
    destination: Gid,
    traffic_class: u8,
    flow_label: u32,
    hop_limit: u8,
}

/// What of a work request its destination is asked for and told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Datagram {
    /// Queue pair.
    pub(super) qpn: u32,
    /// `Q_Key`, not that of the request where it stands for the sender's own.
    pub(super) qkey: u32,
    /// With immediate data.
    pub(super) imm: bool,
}

/// Sends one datagram.
pub(super) fn step(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, job: &mut Job, budget: &mut Budget<'_>) -> Step {
    let Op::Datagram { imm, qpn, qkey, ah } = job.wqe.op else {
        return Step::Failed(WcStatus::LocQpOpErr);
    };
    let datagram = Datagram { qpn, qkey: sent_qkey(qp, qkey), imm };
    if let Some(cast) = job.cast.take() {
        return match gather_source(ctx, nic, qp, job) {
            Ok(()) => mcast::step(ctx, nic, qp, job, cast, datagram, budget),
            Err(reason) => {
                job.cast = Some(cast);
                unsent(reason)
            }
        };
    }
    let Some(route) = route(nic, qp, ah) else {
        return Step::Failed(WcStatus::LocQpOpErr);
    };
    // Too long is not an error of the request, it is just not sent (IBA C10-93.1.1; so does rxe).
    if job.wqe.length > MTU {
        let allowed = ctx.check_sges(nic, qp.id.pdn, Access::empty(), job.wqe.sges.as_slice());
        return if allowed.is_ok() { drop_it(nic) } else { Step::Failed(WcStatus::LocProtErr) };
    }
    // Before a receive is taken for it: what is the sender's fault must not cost the receiver one.
    if let Err(reason) = gather_source(ctx, nic, qp, job) {
        return unsent(reason);
    }
    let header = route.header(job.wqe.length as u16, imm);
    if qpn == MULTICAST_QPN && route.destination.is_multicast() {
        job.way = Way::here(Path::Multicast);
        let hosts = ctx.engine.overlay().hosts(nic.id);
        if !hosts.is_empty() {
            // Each is a message of its own.
            budget.take_more(hosts.len() - 1, job.wqe.length);
            send_to_hosts(ctx, nic, qp, &hosts, &route, datagram, job);
            // Sending has used the context's source.
            if let Err(reason) = gather_source(ctx, nic, qp, job) {
                return unsent(reason);
            }
        }
        return match nic.groups.members(route.destination) {
            Some(members) => mcast::step(ctx, nic, qp, job, Box::new(Cast::new(members, header)), datagram, budget),
            None => drop_it(nic),
        };
    }
    let Some((peer_nic, peer)) = find(ctx, nic, route.destination, datagram) else {
        return match ctx.engine.find_host(nic.id, route.destination) {
            Some(peer) if tcp::is_congested(ctx, peer, qp.id.qpn) => {
                Step::Wait(WaitKind::Room, ctx.engine.config().datagram_patience * ROOM_PATIENCE)
            }
            Some(peer) => {
                job.way = Way::to(Path::Tcp, peer);
                send_to_hosts(ctx, nic, qp, &[peer], &route, datagram, job);
                Step::Done
            }
            None => drop_it(nic),
        };
    };
    job.way = Way::here(Path::Local);
    match offer(ctx, qp.id.qpn, (&peer_nic, &peer), job, &header, imm) {
        Offered::Delivered => Step::Done,
        Offered::NoReceive if !peer.recv.lock().starved => {
            Step::Wait(WaitKind::Datagram, ctx.engine.config().datagram_patience)
        }
        Offered::Paging if !peer.recv.lock().starved => {
            Step::Wait(WaitKind::PeerPage, ctx.engine.config().datagram_patience * PAGE_PATIENCE)
        }
        Offered::NoReceive | Offered::Paging | Offered::Refused => drop_it(nic),
    }
}

/// Sends the datagram whose payload is gathered to other hosts.
fn send_to_hosts(
    ctx: &mut Context,
    nic: &Nic,
    qp: &Qp,
    peers: &[PeerId],
    route: &Route,
    datagram: Datagram,
    job: &Job,
) {
    let Some(tenant) = ctx.engine.overlay().tenant(nic.id) else { return };
    let carried = Carried {
        tenant,
        source_qpn: qp.id.qpn,
        destination_qpn: datagram.qpn,
        qkey: datagram.qkey,
        source: route.source.0,
        destination: route.destination.0,
        imm: datagram.imm.then_some(job.wqe.imm),
        solicited: job.wqe.flags.contains(SendFlags::SOLICITED),
        traffic_class: route.traffic_class,
        hop_limit: route.hop_limit,
        flow_label: route.flow_label & 0xf_ffff,
    };
    let mut payload = job.wqe.inline.clone();
    payload.resize(job.wqe.length as usize, 0);
    if !job.wqe.is_inline() {
        mem::read_all(&ctx.src, &mut payload);
    }
    ctx.charge(peers.len() as u64 * (cost::WQE + cost::bytes(job.wqe.length)));
    ctx.count_bytes(job.wqe.length);
    let Some((&last, others)) = peers.split_last() else { return };
    for &peer in others {
        tcp::send_datagram(ctx, nic, peer, carried, payload.clone());
    }
    tcp::send_datagram(ctx, nic, last, carried, payload);
}

/// What became of a datagram at its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offered {
    /// It is there.
    Delivered,
    /// No receive is posted.
    NoReceive,
    /// The memory of its receive is missing a page; the receive is for the next.
    Paging,
    /// The destination cannot take it.
    Refused,
}

/// Offers the datagram whose payload is gathered to a queue pair.
pub(super) fn offer(
    ctx: &mut Context,
    sender: u32,
    (peer_nic, peer): (&Arc<Nic>, &Arc<Qp>),
    job: &mut Job,
    header: &[u8; GRH_SIZE],
    imm: bool,
) -> Offered {
    ctx.charge(cost::VISIT);
    let (taken, ticket) = peer.recv.lock().take_datagram(GRH_SIZE as u64 + job.wqe.length, &mut job.recv);
    note_limit(peer_nic, peer);
    match taken {
        Taken::Empty => return Offered::NoReceive,
        Taken::TooShort => return Offered::Refused,
        Taken::Broken(reason) => {
            fatal(peer_nic, peer, reason);
            ctx.engine.attend(peer_nic, peer);
            return Offered::Refused;
        }
        Taken::Malformed => {
            refuse(ctx, peer_nic, peer, job.recv.wr_id, WcStatus::LocQpOpErr);
            return Offered::Refused;
        }
        Taken::Yes => {}
    }
    match place(ctx, (peer_nic, peer), job, header) {
        Ok(()) => {}
        Err(Unreachable::Refused(_)) => {
            refuse(ctx, peer_nic, peer, job.recv.wr_id, WcStatus::LocProtErr);
            return Offered::Refused;
        }
        Err(Unreachable::Paging) => {
            peer.recv.lock().give_back(ticket, std::mem::take(&mut job.recv));
            if !peer.responds() {
                // It may have been flushed just before.
                ctx.engine.attend(peer_nic, peer);
            }
            return Offered::Paging;
        }
    }
    let done = RecvDone {
        wr_id: job.recv.wr_id,
        status: WcStatus::Success,
        opcode: WcOpcode::Recv,
        byte_len: (GRH_SIZE as u64 + job.wqe.length) as u32,
        word: Word::imm(imm, job.wqe.imm),
        src_qp: sender,
        flags: WcFlags::GRH,
        sl: header_kind(header),
        solicited: job.wqe.flags.contains(SendFlags::SOLICITED),
    };
    complete_recv(ctx, peer_nic, peer, &done);
    Offered::Delivered
}

/// What a completion's `sl` says of the header in front of a datagram.
fn header_kind(header: &[u8; GRH_SIZE]) -> u8 {
    if header[0] >> 4 == 6 { SL_ROCE_V2_IPV6 } else { SL_ROCE_V2_IPV4 }
}

/// Copies header and payload into the receive.
fn place(
    ctx: &mut Context,
    (nic, qp): (&Arc<Nic>, &Arc<Qp>),
    job: &Job,
    header: &[u8; GRH_SIZE],
) -> Result<(), Unreachable> {
    ctx.dst.clear();
    let len = GRH_SIZE as u64 + job.wqe.length;
    let sges = job.recv.sges.as_slice();
    ctx.charge(cost::LOOKUP * sges.len() as u64 + cost::bytes(len));
    let to = Gather { nic, pdn: qp.id.recv_pdn(), need: Access::LOCAL_WRITE, sges, from: 0, len };
    ctx.gather(Side::Destination, &to)?;
    mem::copy(Source { own: &[header, &job.wqe.inline], guest: &ctx.src }, &ctx.dst);
    ctx.count_bytes(job.wqe.length);
    Ok(())
}

/// Patience with this datagram's destination has ended: until it posts a receive, or its host takes one more datagram, nobody waits for it again, since
/// what is queued behind may be for others.
pub(super) fn starve(ctx: &mut Context, nic: &Nic, qp: &Qp, job: &Job) {
    let Op::Datagram { imm, qpn, qkey, ah } = job.wqe.op else {
        return;
    };
    let datagram = Datagram { qpn, qkey: sent_qkey(qp, qkey), imm };
    let Some(route) = route(nic, qp, ah) else { return };
    if let Some((_, peer)) = find(ctx, nic, route.destination, datagram) {
        peer.recv.lock().starved = true;
    } else if let Some(host) = ctx.engine.find_host(nic.id, route.destination) {
        tcp::give_up_on(ctx, host, qp.id.qpn);
    }
}

/// What becomes of a datagram whose payload is not to be had now.
fn unsent(reason: Unreachable) -> Step {
    match reason {
        Unreachable::Refused(_) => Step::Failed(WcStatus::LocProtErr),
        Unreachable::Paging => Step::Wait(WaitKind::Page, rc::PAGE_PATIENCE),
    }
}

fn gather_source(ctx: &mut Context, nic: &Nic, qp: &Qp, job: &Job) -> Result<(), Unreachable> {
    ctx.src.clear();
    let (pdn, len) = (qp.id.pdn, job.wqe.length);
    let sges = job.wqe.sges.as_slice();
    ctx.charge(cost::LOOKUP * sges.len() as u64);
    ctx.gather(Side::Source, &Gather { nic, pdn, need: Access::empty(), sges, from: 0, len })
}

fn drop_it(nic: &Nic) -> Step {
    nic.counters.messages_dropped.add(1);
    Step::Done
}

fn route(nic: &Nic, qp: &Qp, ah: u32) -> Option<Route> {
    let record = nic.handles.load().as_ref()?.get(ah)?;
    if record.flags & AH_VALID == 0 || record.pdn.get() != qp.id.pdn {
        return None;
    }
    let source = nic.gids.load().get(record.sgid_index.get().into())?;
    Some(Route {
        source,
        destination: Gid(record.dgid),
        traffic_class: record.traffic_class,
        flow_label: record.flow_label.get(),
        hop_limit: record.hop_limit,
    })
}

fn find(ctx: &Context, nic: &Nic, destination: Gid, datagram: Datagram) -> Option<(Arc<Nic>, Arc<Qp>)> {
    let peer_nic = ctx.engine.find(nic.id, destination).filter(|n| n.is_running())?;
    let peer = peer_nic.qp(datagram.qpn)?;
    accepts(&peer, datagram.qkey).then_some((peer_nic, peer))
}

/// Whether a queue pair takes datagrams with this `Q_Key` now.
pub(super) fn accepts(peer: &Qp, qkey: u32) -> bool {
    peer.id.kind.is_datagram() && peer.responds() && own_qkey(peer) == qkey
}

/// The `Q_Key` of a request; with the top bit set it is the sender's own (IBA 10.2.5).
fn sent_qkey(qp: &Qp, qkey: u32) -> u32 {
    if qkey >> 31 == 0 { qkey } else { own_qkey(qp) }
}

fn own_qkey(qp: &Qp) -> u32 {
    if qp.id.kind == QpType::Gsi { GSI_QKEY } else { qp.qkey() }
}

/// The receiver's own fault: its receive completes in error and its QP fails.
fn refuse(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, wr_id: u64, status: WcStatus) {
    complete_recv(ctx, nic, qp, &RecvDone::error(wr_id, status));
    if qp.fail() {
        ctx.engine.attend(nic, qp);
    }
}

/// Bytes of the UDP datagram that a RoCE v2 NIC would have sent (IBA annex A17.3): headers, padding and ICRC are in its length.
fn datagram_length(payload: u16, imm: bool) -> u16 {
    const UDP: u16 = 8;
    const BTH: u16 = 12;
    const DETH: u16 = 8;
    const ICRC: u16 = 4;
    UDP + BTH + DETH + if imm { 4 } else { 0 } + payload.next_multiple_of(4) + ICRC
}

impl Route {
    /// That of a datagram from another host.
    pub(super) fn of(carried: &Carried) -> Self {
        Self {
            source: Gid(carried.source),
            destination: Gid(carried.destination),
            traffic_class: carried.traffic_class,
            flow_label: carried.flow_label,
            hop_limit: carried.hop_limit,
        }
    }

    /// The 40 bytes in front of the payload (IBA 8.3, annex A17.4.5.1).
    pub(super) fn header(&self, payload: u16, imm: bool) -> [u8; GRH_SIZE] {
        let datagram = datagram_length(payload, imm);
        match (self.source.address(), self.destination.address()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => self.ipv4(datagram, from.octets(), to.octets()),
            _ => self.ipv6(datagram),
        }
    }

    fn ipv4(&self, datagram: u16, from: [u8; 4], to: [u8; 4]) -> [u8; GRH_SIZE] {
        let mut header = [0; GRH_SIZE];
        let ip = &mut header[20..];
        (ip[0], ip[1]) = (0x45, self.traffic_class);
        ip[2..4].copy_from_slice(&(IPV4_HEADER + datagram).to_be_bytes());
        ip[6] = 0x40;
        (ip[8], ip[9]) = (self.hop_limit, 17);
        ip[12..16].copy_from_slice(&from);
        ip[16..20].copy_from_slice(&to);
        let sum = ip.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum::<u32>();
        let folded = (sum & 0xffff) + (sum >> 16);
        let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        header
    }

    fn ipv6(&self, datagram: u16) -> [u8; GRH_SIZE] {
        let mut header = [0; GRH_SIZE];
        let first = 6 << 28 | u32::from(self.traffic_class) << 20 | (self.flow_label & 0xf_ffff);
        header[..4].copy_from_slice(&first.to_be_bytes());
        header[4..6].copy_from_slice(&datagram.to_be_bytes());
        (header[6], header[7]) = (17, self.hop_limit);
        header[8..24].copy_from_slice(&self.source.0);
        header[24..].copy_from_slice(&self.destination.0);
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(from: &str, to: &str) -> Route {
        let gid = |s: &str| Gid::of(s.parse().unwrap());
        Route { source: gid(from), destination: gid(to), traffic_class: 3, flow_label: 0x12345, hop_limit: 64 }
    }

    #[test]
    fn an_ipv4_header_is_at_the_end_and_sums_to_zero() {
        let header = route("10.0.0.1", "10.0.0.2").header(99, false);
        assert_eq!(header[..20], [0; 20]);
        assert_eq!(header[22..24], (20 + 8 + 12 + 8 + 100 + 4u16).to_be_bytes());
        assert_eq!(header[32..36], [10, 0, 0, 1]);
        let sum: u32 = header[20..].chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn an_ipv6_header_fills_the_grh() {
        let header = route("fd00::1", "fd00::2").header(99, false);
        assert_eq!(header[..4], [0x60, 0x31, 0x23, 0x45]);
        assert_eq!(header[8..10], [0xfd, 0]);
        assert_eq!(header[39], 2);
    }
}
