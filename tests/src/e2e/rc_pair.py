"""Two connected RC queue pairs of one virtual NIC, for the scripts beside this one."""

import threading

import pyverbs.enums as e
from pyverbs.addr import AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

ACCESS = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE | e.IBV_ACCESS_REMOTE_READ


class Nic:
    """A context with a CQ that everybody shares."""

    def __init__(self, device, gid_index, cqes=64):
        self.ctx = Context(name=device)
        self.pd = PD(self.ctx)
        self.cq = CQ(self.ctx, cqes)
        self.gid_index = gid_index
        self.gid = self.ctx.query_gid(1, gid_index)
        self.lock, self.done = threading.Lock(), {}

    def wait(self, wr_id):
        """Polls for everybody until this request is done; its status."""
        while True:
            with self.lock:
                if wr_id in self.done:
                    return self.done.pop(wr_id)
                for wc in self.cq.poll(16)[1]:
                    self.done[wc.wr_id] = wc.status


class Pair:
    """Two queue pairs, of which the first sends."""

    def __init__(self, nic, depth=4):
        self.nic = nic
        cap = QPCap(max_send_wr=depth, max_recv_wr=1)
        init = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=nic.cq, rcq=nic.cq, cap=cap, sq_sig_all=1)
        self.qps = [QP(nic.pd, init) for _ in range(2)]
        for qp, other in zip(self.qps, reversed(self.qps)):
            qp.to_rts(self._attributes(other.qp_num))

    def _attributes(self, peer):
        attr = QPAttr(port_num=1)
        attr.qp_access_flags, attr.path_mtu, attr.dest_qp_num = ACCESS, e.IBV_MTU_1024, peer
        attr.max_dest_rd_atomic = attr.max_rd_atomic = 1
        attr.min_rnr_timer, attr.timeout, attr.retry_cnt, attr.rnr_retry = 12, 14, 7, 7
        route = GlobalRoute(dgid=self.nic.gid, sgid_index=self.nic.gid_index)
        attr.ah_attr = AHAttr(gr=route, is_global=1, port_num=1)
        return attr

    def post(self, opcode, wr_id, near, far):
        """A WRITE or READ of memory that is there as (address, length, key) and there as (address, key)."""
        wr = SendWR(wr_id=wr_id, num_sge=1, sg=[SGE(*near)], opcode=opcode)
        wr.set_wr_rdma(far[1], far[0])
        self.qps[0].post_send(wr)
