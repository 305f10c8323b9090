"""A rank of two: messages of many sizes, and a put; whatever arrives is compared byte for byte."""
import random
import sys

from mpi4py import MPI

WORLD = MPI.COMM_WORLD
ME, PEER = WORLD.rank, 1 - WORLD.rank
SIZES = [0, 1, 7, 8, 63, 64, 1000, 4096, 8191, 65_536, 100_003, 1 << 20, (8 << 20) + 1]
PUT = 1 << 20


def content(sender, size, turn):
    return random.Random(f"{sender} {size} {turn}").randbytes(size)


def compare(got, size, turn):
    if bytes(got) != content(PEER, size, turn):
        print(f"rank {ME}: {size} bytes of {turn} arrived otherwise", file=sys.stderr, flush=True)
        WORLD.Abort(1)


def exchange(size, turn):
    got = bytearray(size)
    WORLD.Sendrecv(content(ME, size, turn), PEER, turn, got, PEER, turn)
    compare(got, size, turn)


def put():
    window = MPI.Win.Allocate(PUT, comm=WORLD)
    window.Fence()
    window.Put(content(ME, PUT, "put"), PEER)
    window.Fence()
    compare(window.tomemory(), PUT, "put")
    window.Free()


if WORLD.size != 2:
    sys.exit(f"{WORLD.size} ranks, not two")
for turn in range(3):
    for size in SIZES:
        exchange(size, turn)
put()
print(f"rank {ME}: all equal", flush=True)
