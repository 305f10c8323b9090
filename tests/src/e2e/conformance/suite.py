#!/usr/bin/env python3
"""The guest's end of `freeflow-e2e conformance`: runs rdma-core's own tests, as Debian ships them, on one RDMA device.

Usage: suite.py DEVICE CLAIMS [PATTERN]

Each test runs in a process of its own, forked from this one after everything is imported (imports are what takes
long), and killed with all its children when it takes too long. Several of these programs, also in several guests, share the work: who
makes the folder CLAIMS/<test> runs the test. Prints a line of JSON for each test, and nothing else.
"""

import fnmatch
import gzip
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unittest

# Written for one vendor's provider each.
FOREIGN = ('test_mlx5', 'test_efa', 'test_cuda', 'test_hns')
PATIENCE = 60

# What rdma-core has mended in its tests since, for those of distributions that are older: file, what comes before, what was put in.
MENDED = (
    # 197d1a40a (2026): sends are not done when they are posted, and a CQ may be made smaller while there is nothing in it yet.
    ('test_cq.py', '        # Decrease the CQ size to less than the CQ unpolled entries.\n', '        import time; time.sleep(1)\n'),
)


def unpack():
    """A folder with the tests as Python can import them: Debian compresses large files of documentation."""
    source = next(path for path in ('/usr/share/doc/python3-pyverbs/tests', '/usr/share/doc/rdma-core/tests')
                  if os.path.isdir(path))
    target = os.path.join(tempfile.mkdtemp(), 'tests')
    os.mkdir(target)
    for name in os.listdir(source):
        if name.startswith(FOREIGN):
            continue
        path = os.path.join(source, name)
        if name.endswith('.gz'):
            with gzip.open(path) as packed, open(os.path.join(target, name[:-3]), 'wb') as plain:
                shutil.copyfileobj(packed, plain)
        elif name.endswith('.py'):
            shutil.copy(path, target)
    for name, place, addition in MENDED:
        mend(os.path.join(target, name), place, addition)
    # The package imports every module in it; we import those that we want.
    open(os.path.join(target, '__init__.py'), 'w').close()
    return target


def mend(path, place, addition):
    """Puts something in, unless the test has it already."""
    with open(path) as file:
        text = file.read()
    before, found, after = text.partition(place)
    if found and not before.rstrip().endswith('time.sleep(1)'):
        with open(path, 'w') as file:
            file.write(before + addition + found + after)


def load(folder, device):
    """All tests, for this device."""
    sys.path[:0] = [folder, os.path.dirname(folder)]
    from args_parser import parser
    sys.argv = ['suite', '--dev', device]
    parser.parse_args()
    loader = unittest.TestLoader()
    names = sorted(name[:-3] for name in os.listdir(folder) if name.startswith('test_'))
    suites = [loader.loadTestsFromModule(importlib.import_module('tests.' + name)) for name in names]
    return [test for suite in suites for group in suite for test in group]


def judge(test):
    """Runs a test; how it ended and what it says of that."""
    result = unittest.TestResult()
    unittest.TestSuite([test]).run(result)
    for kind, found in (('failed', result.failures), ('error', result.errors)):
        if found:
            return kind, '\n'.join(text for _, text in found)
    if result.unexpectedSuccesses:
        return 'failed', 'unexpected success'
    if result.skipped:
        return 'skipped', result.skipped[0][1]
    return ('passed', '') if result.testsRun else ('error', 'did not run')


def child(test, answer, output):
    """The process of one test. Does not return."""
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        verdict = judge(test)
    except BaseException:
        verdict = ('error', traceback.format_exc())
    os.pwrite(answer, json.dumps(verdict).encode(), 0)
    os._exit(0)


def wait(pid):
    """How the process ended; None when it took too long. Whatever it started is gone, too."""
    def expired(_signal, _frame):
        raise TimeoutError
    signal.signal(signal.SIGALRM, expired)
    signal.alarm(PATIENCE)
    try:
        status = os.waitpid(pid, 0)[1]
    except TimeoutError:
        status = None
    signal.alarm(0)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if status is None:
        os.waitpid(pid, 0)
    return status


def run(test):
    """Runs a test in a process of its own."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as output:
        pid = os.fork()
        if not pid:
            child(test, answer.fileno(), output.fileno())
        status = wait(pid)
        verdict = answer.read()
        output.seek(0)
        printed = output.read().decode(errors='replace')
    if status is None:
        kind, detail = 'hung', f'no end after {PATIENCE} s'
    elif verdict:
        kind, detail = json.loads(verdict)
    else:
        kind, detail = 'died', f'wait status {status}'
    if kind not in ('passed', 'skipped'):
        detail += '\n' + printed[-4000:]
    return {'test': name_of(test), 'kind': kind, 'detail': detail.strip(), 'seconds': time.monotonic() - start}


def name_of(test):
    return test.id().removeprefix('tests.')


def is_ours(claims, name):
    """Whether this program is the first that wants to run the test."""
    try:
        os.mkdir(os.path.join(claims, name))
        return True
    except FileExistsError:
        return False


def main():
    device, claims = sys.argv[1:3]
    pattern = sys.argv[3] if len(sys.argv) > 3 else '*'
    folder = unpack()
    for test in load(folder, device):
        name = name_of(test)
        if fnmatch.fnmatchcase(name, pattern) and is_ours(claims, name):
            print(json.dumps(run(test)), flush=True)
    shutil.rmtree(os.path.dirname(folder))


main()
