"""Collectives between real processes: sums and gathers, deadlines, and peers that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from zmqexec.worker.shared_memory import SharedMemoryCollectives

DEADLINE_S = 60

PROLOGUE = """
import os, signal, sys, time
import torch
from zmqexec.worker.shared_memory import ROUND_BYTES, SharedMemoryCollectives
rank, tp_size, fd = map(int, sys.argv[1:])
torch.set_num_threads(1)
def join(timeout_s=30.0):
    return SharedMemoryCollectives(rank, tp_size, fd, timeout_s, join_timeout_s=timeout_s)
"""


class Ranks:
    """Processes that run `script` with rank, tp_size and the memfd of their store."""

    def __init__(self, tp_size: int, script: str) -> None:
        self.store_fd = os.memfd_create("store")
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROLOGUE + textwrap.dedent(script), str(rank), str(tp_size), str(self.store_fd)],
                pass_fds=[self.store_fd],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(tp_size)
        ]

    def results(self):
        """(exit code, stdout, stderr) of every rank."""
        return [(process.returncode, *output) for process, output in self._communicate()]

    def _communicate(self):
        return [(process, process.communicate(timeout=DEADLINE_S)) for process in self.processes]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()
        os.close(self.store_fd)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_every_rank_gets_the_same_sums_and_all_parts_without_a_socket(tp_size):
    script = """
    group = join()
    generator = torch.Generator()
    for number in range(40):
        # Sizes around whole rounds, several rounds, and nothing at all.
        size = [0, 1, 7, 1000, ROUND_BYTES // 4 - 1, ROUND_BYTES // 4, ROUND_BYTES // 4 + 1, 700_000][number % 8]
        dtype = [torch.float32, torch.bfloat16, torch.float64][number % 3]
        parts = [torch.randn(size, generator=generator.manual_seed(100 * number + r)).to(dtype) for r in range(tp_size)]
        expected = parts[0].float() if dtype == torch.bfloat16 else parts[0].clone()
        for part in parts[1:]:
            expected = expected + part
        assert torch.equal(group.all_gather(parts[rank]), torch.stack(parts))
        assert torch.equal(group.all_reduce(parts[rank].clone()), expected.to(dtype))
    matrix = torch.full((3, 4), float(rank)).t()
    assert torch.equal(group.all_gather(matrix), torch.stack([torch.full((4, 3), float(r)) for r in range(tp_size)]))
    assert torch.equal(group.all_reduce(matrix), torch.full((4, 3), float(sum(range(tp_size)))))
    links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
             if os.path.exists(f"/proc/self/fd/{name}")]
    assert not any("socket" in link for link in links), links
    group.close()
    group.close()
    print("done")
    """
    with Ranks(tp_size, script) as ranks:
        for code, stdout, stderr in ranks.results():
            assert (code, stdout) == (0, "done\n"), stderr


def test_a_peer_that_does_not_join_is_named_at_the_deadline():
    script = """
    group = join(timeout_s=1.0)
    if rank == 0:
        started = time.monotonic()
        try:
            group.all_reduce(torch.ones(3))
        except RuntimeError as error:
            print(error, 0.9 < time.monotonic() - started < 10)
    else:
        time.sleep(100)
    """
    with Ranks(2, script) as ranks:
        assert ranks.processes[0].stdout.readline() == "rank 1 did not join a collective within 1 s True\n"


def test_a_killed_peer_is_named_at_once():
    script = """
    group = join()
    print("joined", flush=True)
    try:
        while True:
            group.all_reduce(torch.ones(3)) if rank != 1 else time.sleep(100)
    except RuntimeError as error:
        print(error, flush=True)
    """
    with Ranks(3, script) as ranks:
        for process in ranks.processes:
            assert process.stdout.readline() == "joined\n"
        started = time.monotonic()
        ranks.processes[1].send_signal(signal.SIGKILL)
        named = [ranks.processes[rank].stdout.readline() for rank in (0, 2)]
        assert time.monotonic() - started < 5
        # The second to notice may see the first one leave.
        assert any(line.startswith("rank 1 ") and " left the group" in line for line in named), named
        assert all(" left the group" in line for line in named), named


def test_joining_alone_ends_at_the_deadline():
    with (
        os.fdopen(os.memfd_create("store"), "rb") as store,
        pytest.raises(RuntimeError, match=r"(?i)time"),
    ):
        SharedMemoryCollectives(0, 2, store.fileno(), timeout_s=60.0, join_timeout_s=0.5)
