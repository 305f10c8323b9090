#!/usr/bin/env python3
"""Memory with on-demand paging whose mappings change under traffic; every byte is looked at.

What is mapped must be read and written, and nothing else: other memory takes what a process has given back, and must not be seen,
nor change.

Usage: paging.py DEVICE GID-INDEX replace|discard|move|unmap|protect|fork|swap|prefetch|give_back
"""

import ctypes
import fcntl
import itertools
import mmap
import os
import struct
import sys
import time
import traceback

import pyverbs.enums as e
from pyverbs.mr import MR

import rc_pair

PAGE, SIZE = 4096, 1 << 20
DEVICE, GID = sys.argv[1], int(sys.argv[2])
# Requests that are under way while a mapping changes: each takes all of the region.
DEPTH, TURNS = 8, 12
STRANGER = 0xcc

ANONYMOUS, MAP_FIXED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0x10
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_DONTNEED, MADV_PAGEOUT = 4, 21
FAILED = ctypes.c_void_p(-1).value


def libc(name, result, *arguments):
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.restype, function.argtypes = result, arguments
    failure = FAILED if result is ctypes.c_void_p else -1

    def call(*values):
        done = function(*values)
        if done == failure:
            raise OSError(ctypes.get_errno(), name)
        return done
    return call


POINTER, LENGTH, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
sys_mmap = libc('mmap', POINTER, POINTER, LENGTH, INT, INT, INT, ctypes.c_long)
sys_munmap = libc('munmap', INT, POINTER, LENGTH)
sys_mremap = libc('mremap', POINTER, POINTER, LENGTH, LENGTH, INT, POINTER)
sys_madvise = libc('madvise', INT, POINTER, LENGTH, INT)
sys_mprotect = libc('mprotect', INT, POINTER, LENGTH, INT)


class Memory:
    """Memory of this process, and of nobody else, where the kernel maps nothing unasked: gaps stay gaps."""

    _places = itertools.count(1 << 36, 2 * SIZE)

    def __init__(self):
        self.address = next(self._places)
        self.replace()
        # A page beside it keeps its page table. User-mode Linux (7.2) loses what it is to unmap from the process when a table is
        # freed and the device's fault makes a new one before the process runs again: the process would see pages of others.
        beside = sys_mmap(self.address + SIZE, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, ANONYMOUS | MAP_FIXED, -1, 0)
        ctypes.memset(beside, 1, PAGE)

    def replace(self):
        """Other memory in the place of this: what was there is given back, in the same step."""
        sys_mmap(self.address, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, ANONYMOUS | MAP_FIXED, -1, 0)

    def move(self):
        """The memory goes somewhere else, which is returned, and leaves fresh memory in its place."""
        other = Memory()
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
        sys_mremap(self.address, SIZE, SIZE, flags, other.address)
        return other

    def unmap(self):
        sys_munmap(self.address, SIZE)

    def advise(self, advice):
        sys_madvise(self.address, SIZE, advice)

    def protect(self, protection):
        sys_mprotect(self.address, SIZE, protection)

    def fill(self, byte):
        ctypes.memset(self.address, byte, SIZE)

    def read(self):
        return ctypes.string_at(self.address, SIZE)

    def resident(self):
        """Pages that are there."""
        with open('/proc/self/pagemap', 'rb') as pagemap:
            pagemap.seek(self.address // PAGE * 8)
            entries = struct.unpack(f'={SIZE // PAGE}Q', pagemap.read(SIZE // PAGE * 8))
        return sum(entry >> 63 for entry in entries)


def must_be(data, *allowed):
    """No other byte than these is in the data."""
    counts = {byte: data.count(byte) for byte in range(256)} if sum(map(data.count, allowed)) != len(data) else {}
    found = {byte: count for byte, count in counts.items() if count}
    assert not found, f'expected bytes of {allowed}, found {found}'


class Traffic:
    """A region that is paged on demand, and queue pairs that write it from memory that is not, and read it into that."""

    def __init__(self):
        self.nic = rc_pair.Nic(DEVICE, GID)
        self.near = MR(self.nic.pd, SIZE * DEPTH, rc_pair.ACCESS)
        self.connect()
        self.use(Memory())

    def use(self, memory):
        """Makes it the region from now on."""
        self.memory = memory
        on_demand = rc_pair.ACCESS | e.IBV_ACCESS_ON_DEMAND
        self.region = MR(self.nic.pd, SIZE, on_demand, address=memory.address)

    def connect(self):
        self.pair = rc_pair.Pair(self.nic, DEPTH)

    def _start(self, opcode):
        for slot in range(DEPTH):
            near = (self.near.buf + slot * SIZE, SIZE, self.near.lkey)
            self.pair.post(opcode, slot, near, (self.memory.address, self.region.rkey))

    def start_writes(self, byte):
        ctypes.memset(self.near.buf, byte, SIZE * DEPTH)
        self._start(e.IBV_WR_RDMA_WRITE)

    def start_reads(self):
        ctypes.memset(self.near.buf, STRANGER, SIZE * DEPTH)
        self._start(e.IBV_WR_RDMA_READ)

    def statuses(self):
        return [self.nic.wait(slot) for slot in range(DEPTH)]

    def finish(self):
        statuses = self.statuses()
        assert statuses == [e.IBV_WC_SUCCESS] * DEPTH, f'statuses {statuses}'

    def what_was_read(self):
        return ctypes.string_at(self.near.buf, SIZE * DEPTH)

    def write(self, byte):
        """Nothing changes meanwhile: the process sees what was written."""
        self.start_writes(byte)
        self.finish()
        must_be(self.memory.read(), byte)

    def read(self, byte):
        """Nothing changes meanwhile: what is read is what the process sees."""
        self.start_reads()
        self.finish()
        must_be(self.what_was_read(), byte)


def loses_content(take_away, refill=0):
    """The region stays, without its content; its memory is others' at once. With `refill` the process writes something new there."""
    traffic = Traffic()
    memory = traffic.memory
    for _ in range(TURNS):
        traffic.write(1)
        stranger, another = Memory(), Memory()
        traffic.start_writes(2)
        take_away(memory)
        stranger.fill(STRANGER)
        traffic.finish()
        must_be(memory.read(), 0, 2)
        must_be(stranger.read(), STRANGER)
        traffic.write(3)

        traffic.start_reads()
        take_away(memory)
        another.fill(STRANGER)
        if refill:
            memory.fill(refill)
        traffic.finish()
        must_be(traffic.what_was_read(), *{3, 0, refill})
        traffic.read(refill)
        for other in stranger, another:
            must_be(other.read(), STRANGER)
            other.unmap()


def replace():
    """munmap and mmap, in one step."""
    loses_content(Memory.replace, refill=4)


def discard():
    """MADV_DONTNEED: the same mapping, without its content."""
    loses_content(lambda memory: memory.advise(MADV_DONTNEED))


def move():
    """mremap: the memory lives on where the region is not."""
    traffic = Traffic()
    memory = traffic.memory
    for _ in range(TURNS):
        traffic.write(1)
        traffic.start_writes(2)
        moved = memory.move()
        before = moved.read()
        traffic.finish()
        must_be(before, 1, 2)
        traffic.write(3)
        assert moved.read() == before, 'memory that has left the region was written'
        moved.fill(STRANGER)
        traffic.read(3)
        must_be(moved.read(), STRANGER)
        moved.unmap()


def unmap():
    """munmap: requests fail, and what is mapped there later is in the region again."""
    traffic = Traffic()
    memory = traffic.memory
    for turn in range(TURNS):
        traffic.write(1)
        start = traffic.start_reads if turn % 2 else lambda: traffic.start_writes(2)
        stranger = Memory()
        start()
        memory.unmap()
        stranger.fill(STRANGER)
        statuses = traffic.statuses()
        must_be(stranger.read(), STRANGER)
        fine = statuses.count(e.IBV_WC_SUCCESS)
        expected = [e.IBV_WC_SUCCESS] * fine + [e.IBV_WC_REM_ACCESS_ERR] + [e.IBV_WC_WR_FLUSH_ERR] * DEPTH
        assert fine == DEPTH or statuses == expected[:DEPTH], f'statuses {statuses}'
        traffic.connect()
        start()
        assert traffic.statuses()[0] == e.IBV_WC_REM_ACCESS_ERR
        must_be(stranger.read(), STRANGER)
        stranger.unmap()
        memory.replace()
        traffic.connect()
        traffic.read(0)


def protect():
    """mprotect: when it returns nothing is written any more; reading goes on."""
    traffic = Traffic()
    memory = traffic.memory
    for _ in range(TURNS):
        traffic.write(1)
        traffic.start_writes(2)
        memory.protect(mmap.PROT_READ)
        before = memory.read()
        must_be(before, 1, 2)
        statuses = traffic.statuses()
        assert memory.read() == before, 'memory that is not to be written was written'
        traffic.connect()
        if before[0] == before[-1]:
            traffic.read(before[0])
        traffic.start_writes(3)
        assert traffic.statuses()[0] == e.IBV_WC_REM_ACCESS_ERR
        assert memory.read() == before, f'statuses {statuses}'
        memory.protect(mmap.PROT_READ | mmap.PROT_WRITE)
        traffic.connect()
        traffic.write(4)


def forked(child):
    """A process that does its part when it is told to; what to call then, which waits for its end."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(theirs)
            child(lambda: os.read(ours, 1))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(ours)

    def go_on():
        os.write(theirs, b'.')
        os.close(theirs)
        assert os.waitpid(pid, 0)[1] == 0, 'the child has seen what it must not'
    return go_on


def fork():
    """The region stays the parent's; the child has what was there at the fork."""
    traffic = Traffic()
    memory = traffic.memory

    def child(wait):
        before = memory.read()
        must_be(before, 1, 2)
        wait()
        assert memory.read() == before
        memory.fill(STRANGER)

    for _ in range(TURNS):
        traffic.write(1)
        traffic.start_writes(2)
        go_on = forked(child)
        traffic.finish()
        must_be(memory.read(), 2)
        traffic.write(3)
        go_on()
        traffic.read(3)

        # The child writes its copy while the parent's is read.
        traffic.write(1)
        go_on = forked(lambda wait: (memory.fill(STRANGER), wait()))
        for _ in range(4):
            traffic.read(1)
        go_on()
        memory.fill(5)
        traffic.read(5)


def swapped_out():
    with open('/proc/vmstat', encoding='ascii') as stat:
        return next(int(line.split()[1]) for line in stat if line.startswith('pswpout '))


def swap():
    """MADV_PAGEOUT: pages go to swap space and come back."""
    traffic = Traffic()
    memory = traffic.memory
    before = swapped_out()
    for turn in range(TURNS):
        traffic.write(turn + 1)
        memory.advise(MADV_PAGEOUT)
        traffic.read(turn + 1)
        traffic.start_writes(turn + 2)
        memory.advise(MADV_PAGEOUT)
        traffic.finish()
        must_be(memory.read(), turn + 2)
        traffic.start_reads()
        memory.advise(MADV_PAGEOUT)
        traffic.finish()
        must_be(traffic.what_was_read(), turn + 2)
    assert swapped_out() - before >= SIZE // PAGE, 'nothing was swapped out'


class Advice:
    """ibv_advise_mr, which the provider does not have: the kernel's ioctl."""

    READ, WRITE, PRESENT = range(3)
    FLUSH = 1
    IOCTL, OBJECT_MR, METHOD_ADVISE, DRIVER_RXE, MANDATORY = 0xc0181b01, 7, 2, 14, 1

    def __init__(self, pd):
        self.pd = pd
        links = ((int(fd), os.readlink(f'/proc/self/fd/{fd}')) for fd in os.listdir('/proc/self/fd')
                 if os.path.lexists(f'/proc/self/fd/{fd}'))
        self.file = next(fd for fd, path in links if path.startswith('/dev/infiniband/uverbs'))

    def give(self, advice, flags, region, address, length):
        """The error's number, or 0."""
        sge = struct.pack('=QII', address, length, region.lkey)
        buffer = ctypes.create_string_buffer(sge, len(sge))
        values = [(0, 0, self.pd.handle), (1, 8, advice), (2, 4, flags), (3, len(sge), ctypes.addressof(buffer))]
        attributes = b''.join(struct.pack('=HHHHQ', number, size, self.MANDATORY, 0, value) for number, size, value in values)
        header = struct.pack('=HHHHQII', 24 + len(attributes), self.OBJECT_MR, self.METHOD_ADVISE, len(values), 0,
                             self.DRIVER_RXE, 0)
        try:
            fcntl.ioctl(self.file, self.IOCTL, bytearray(header + attributes))
        except OSError as error:
            return error.errno
        return 0


def prefetch():
    """Pages are had before anybody needs them."""
    traffic = Traffic()
    memory, region = traffic.memory, traffic.region
    advice = Advice(traffic.nic.pd)

    def give(what, flags=Advice.FLUSH, address=memory.address, length=SIZE):
        return advice.give(what, flags, region, address, length)

    memory.replace()
    for what, pages in (Advice.PRESENT, 0), (Advice.WRITE, SIZE // PAGE), (Advice.PRESENT, SIZE // PAGE):
        error = give(what)
        assert error == 0 and memory.resident() == pages, f'advice {what}: error {error}, {memory.resident()} pages'
    traffic.read(0)
    memory.fill(1)
    memory.advise(MADV_DONTNEED)
    assert give(Advice.READ) == 0
    traffic.read(0)
    traffic.write(2)
    # Without being waited for, beside traffic and changes.
    for turn in range(TURNS):
        memory.replace()
        traffic.start_writes(3)
        assert give(Advice.WRITE if turn % 2 else Advice.READ, 0) == 0
        memory.advise(MADV_DONTNEED)
        traffic.finish()
        traffic.write(4)
        traffic.read(4)
    memory.protect(mmap.PROT_READ)
    assert give(Advice.READ) == 0
    assert give(Advice.WRITE) != 0
    memory.protect(mmap.PROT_READ | mmap.PROT_WRITE)
    assert give(Advice.READ, address=memory.address + SIZE) != 0
    assert give(Advice.READ, length=SIZE + 1) != 0
    traffic.write(5)


def give_back():
    """For life.rs: 64 MiB that the device has are unmapped when it does not answer any more."""
    traffic = Traffic()
    given = []
    for _ in range(64):
        traffic.use(Memory())
        traffic.write(1)
        given.append((traffic.memory, traffic.region))
    print('ready')
    while not os.path.exists('/tmp/go'):
        time.sleep(0.05)
    for memory, _ in given:
        memory.unmap()
    print('given back')


functions = replace, discard, move, unmap, protect, fork, swap, prefetch, give_back
{function.__name__: function for function in functions}[sys.argv[3]]()
print('all data as it must be')
