#!/usr/bin/env python3
"""Processes and threads that share what they have of a virtual NIC; every byte that moves is compared.

Usage: processes.py DEVICE GID-INDEX fork|exec|many|threads
"""

import os
import random
import subprocess
import sys
import threading

import pyverbs.enums as e
from pyverbs.addr import AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
import pyverbs.fork
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

PAGE = 4096
DEVICE, GID = sys.argv[1], int(sys.argv[2])
ACCESS = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE


class Nic:
    """A context with a CQ that everybody shares."""

    def __init__(self, cqes=64):
        self.ctx = Context(name=DEVICE)
        self.pd = PD(self.ctx)
        self.cq = CQ(self.ctx, cqes)
        self.gid = self.ctx.query_gid(1, GID)
        self.lock, self.done = threading.Lock(), {}

    def wait(self, wr_id):
        """Polls for everybody until this request is done."""
        while True:
            with self.lock:
                if wr_id in self.done:
                    return self.done.pop(wr_id)
                for wc in self.cq.poll(16)[1]:
                    self.done[wc.wr_id] = wc.status


class Loop:
    """Two connected queue pairs, and memory to write from and to."""

    def __init__(self, nic, number=1):
        self.nic, self.number = nic, number
        self.near, self.far = MR(nic.pd, PAGE, ACCESS), MR(nic.pd, PAGE, ACCESS)
        init = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=nic.cq, rcq=nic.cq, cap=QPCap(max_send_wr=4, max_recv_wr=4))
        self.qps = [QP(nic.pd, init) for _ in range(2)]
        for qp, other in zip(self.qps, reversed(self.qps)):
            qp.to_rts(self.attributes(other.qp_num))

    def attributes(self, peer):
        attr = QPAttr(port_num=1)
        attr.qp_access_flags, attr.path_mtu, attr.dest_qp_num = ACCESS, e.IBV_MTU_1024, peer
        attr.max_dest_rd_atomic = attr.max_rd_atomic = 1
        attr.min_rnr_timer, attr.timeout, attr.retry_cnt, attr.rnr_retry = 12, 14, 7, 7
        attr.ah_attr = AHAttr(gr=GlobalRoute(dgid=self.nic.gid, sgid_index=GID), is_global=1, port_num=1)
        return attr

    def run(self, turns=20):
        """Writes random bytes and compares what arrives."""
        for _ in range(turns):
            data = random.randbytes(PAGE)
            self.near.write(data, PAGE)
            wr = SendWR(wr_id=self.number, num_sge=1, sg=[SGE(self.near.buf, PAGE, self.near.lkey)],
                        opcode=e.IBV_WR_RDMA_WRITE)
            wr.set_wr_rdma(self.far.rkey, self.far.buf)
            self.qps[0].post_send(wr)
            status = self.nic.wait(self.number)
            assert status == e.IBV_WC_SUCCESS, f'status {status}'
            assert self.far.read(PAGE, 0) == data, 'data arrived wrong'


def child(work):
    """A forked process that does the work; its id."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def must_succeed(pids):
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert not any(statuses), f'wait statuses {statuses}'


def fork():
    """Children come and go, with traffic of their own, while the parent's registered memory stays the parent's."""
    pyverbs.fork.fork_init()
    loop = Loop(Nic())
    for turn in range(5):
        secret = bytes([turn + 1]) * PAGE
        loop.far.write(secret, PAGE)
        # With 0 the child leaves at once, which unmaps and closes everything that it shares with the parent.
        pids = [child(lambda: Loop(Nic()).run()) if turn % 2 else child(lambda: None) for _ in range(4)]
        assert loop.far.read(PAGE, 0) == secret
        loop.run()
        must_succeed(pids)
        loop.run()


def exec():
    """Programs that the process starts neither disturb it nor inherit its device."""
    loop = Loop(Nic())
    for _ in range(3):
        listing = subprocess.run(['ls', '-l', '/proc/self/fd'], close_fds=False, capture_output=True, text=True, check=True)
        assert 'infiniband' not in listing.stdout, listing.stdout
        with subprocess.Popen(['ibv_devinfo', '-d', DEVICE], stdout=subprocess.PIPE, text=True, close_fds=False) as program:
            loop.run()
            assert 'PORT_ACTIVE' in program.communicate()[0]
        loop.run()


def many():
    """Many processes, each with several contexts."""
    def work():
        for loop in [Loop(Nic()) for _ in range(3)]:
            loop.run(5)
    must_succeed([child(work) for _ in range(32)])


def threads():
    """Threads with a queue pair each, on one CQ: whoever polls finds others' completions."""
    nic, failures, count = Nic(512), [], 200

    def work(number):
        try:
            Loop(nic, number).run(3)
        except BaseException as failure:
            failures.append(f'{number}: {failure}')
    running = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures, failures
    assert not nic.done, f'completions that nobody waits for: {nic.done}'


{'fork': fork, 'exec': exec, 'many': many, 'threads': threads}[sys.argv[3]]()
print('all data arrived')
