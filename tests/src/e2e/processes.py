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
import pyverbs.fork
from pyverbs.mr import MR

import rc_pair

PAGE = 4096
DEVICE, GID = sys.argv[1], int(sys.argv[2])


def new_nic(cqes=64):
    return rc_pair.Nic(DEVICE, GID, cqes)


class Loop(rc_pair.Pair):
    """Two connected queue pairs, and memory to write from and to."""

    def __init__(self, nic, number=1):
        super().__init__(nic)
        self.number = number
        self.near, self.far = MR(nic.pd, PAGE, rc_pair.ACCESS), MR(nic.pd, PAGE, rc_pair.ACCESS)

    def run(self, turns=20):
        """Writes random bytes and compares what arrives."""
        for _ in range(turns):
            data = random.randbytes(PAGE)
            self.near.write(data, PAGE)
            self.post(e.IBV_WR_RDMA_WRITE, self.number, (self.near.buf, PAGE, self.near.lkey), (self.far.buf, self.far.rkey))
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
    loop = Loop(new_nic())
    for turn in range(5):
        secret = bytes([turn + 1]) * PAGE
        loop.far.write(secret, PAGE)
        # With 0 the child leaves at once, which unmaps and closes everything that it shares with the parent.
        pids = [child(lambda: Loop(new_nic()).run()) if turn % 2 else child(lambda: None) for _ in range(4)]
        assert loop.far.read(PAGE, 0) == secret
        loop.run()
        must_succeed(pids)
        loop.run()


def exec():
    """Programs that the process starts neither disturb it nor inherit its device."""
    loop = Loop(new_nic())
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
        for loop in [Loop(new_nic()) for _ in range(3)]:
            loop.run(5)
    must_succeed([child(work) for _ in range(32)])


def threads():
    """Threads with a queue pair each, on one CQ: whoever polls finds others' completions."""
    nic, failures, count = new_nic(512), [], 200

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
