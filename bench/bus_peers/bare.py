"""The bare round trip through shared memory: all in C, and in C called from Python. See pingpong.c.

Runs in: driver | worker.
"""

from __future__ import annotations

import array
import os
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bus_peers.messages import REPLY_BYTES, decode_reply, decode_step, encode, make_reply, wants_reply
from bus_peers.peer import Peer, Setup, Unsupported, spawn
from zmqexec.protocol import StepInput, StepOutput

BUILD_TIMEOUT_S = 120.0


def build(folder: Path) -> None:
    """Compile pingpong.c into `folder`, which is to be on the import path of all that use it."""
    source = Path(__file__).with_name("pingpong.c")
    include = sysconfig.get_path("include")
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", f"-I{include}"]
    command = ["gcc", *flags, str(source), "-o", str(folder / "pingpong.so")]
    subprocess.run(command, check=True, timeout=BUILD_TIMEOUT_S, capture_output=True, text=True)


class Bare(Peer):
    """One channel of pingpong.c. A worker waits in one way, the driver for replies in the same or another."""

    def __init__(self, setup: Setup, serve: str, worker_wait: str, driver_wait: str) -> None:
        import pingpong

        self._pingpong = pingpong
        fd = os.memfd_create("bus-bare")
        os.ftruncate(fd, pingpong.HEADER_BYTES + setup.max_bytes)
        pingpong.open(fd, setup.max_bytes, setup.num_readers, -1, getattr(pingpong, driver_wait))
        arguments = (fd, setup.max_bytes, setup.num_readers)
        self._workers = [
            spawn(f"{__name__}:serve", *arguments, rank, worker_wait, serve, fds=[fd])
            for rank in range(setup.num_readers)
        ]
        os.close(fd)
        self.pids = [worker.pid for worker in self._workers]
        self.num_readers = setup.num_readers

    def close(self) -> None:
        self._pingpong.stop()


class BareC(Bare):
    """All in C. options["wait"]: spin, yield, futex, or wake: the worker parks, the driver spins for the reply."""

    def __init__(self, setup: Setup) -> None:
        wait = setup.options["wait"]
        if wait == "spin" and not setup.has_cores:
            raise Unsupported("spinning needs a core for each process")
        busy = "SPIN" if setup.has_cores else "YIELD"
        kinds = {
            "spin": ("SPIN", "SPIN"),
            "yield": ("YIELD", "YIELD"),
            "futex": ("PARK", "PARK"),
            "wake": ("PARK", busy),
        }
        super().__init__(setup, "c", *kinds[wait])

    def ping(self, num_bytes: int, num_replies: int, count: int, period_s: float, budget_s: float) -> Sequence[int]:
        """Nanoseconds of each round trip: `count` of them, or as many as begin within `budget_s`."""
        replied_by_all = num_replies == self.num_readers
        samples = array.array("q")
        samples.frombytes(
            self._pingpong.ping(num_bytes, replied_by_all, count, int(period_s * 1e9), int(budget_s * 1e9))
        )
        return samples

    def round_trip(self, step: StepInput, num_replies: int) -> None:
        self.ping(REPLY_BYTES, num_replies, 1, 0.0, 0.0)


class BareFromPython(Bare):
    """The steps in C, called from Python, with bytes both ways: the least that any bus called from Python costs.

    options["wait"]: busy, or wake: the worker parks, the driver spins for the reply.
    """

    what = "bytes"

    def __init__(self, setup: Setup) -> None:
        busy = "SPIN" if setup.has_cores else "YIELD"
        super().__init__(setup, self.what, "PARK" if setup.options["wait"] == "wake" else busy, busy)

    def prepare(self, steps: list[StepInput]) -> list[Any]:
        return [encode(step) for step in steps]

    def verify(self, sent: Any, reply: Any) -> None:
        if len(reply) != REPLY_BYTES:
            raise AssertionError(f"a reply of {len(reply)} bytes")

    def round_trip(self, step: Any, num_replies: int) -> Any:
        replied_by_all = num_replies == self.num_readers
        self._pingpong.publish(step, replied_by_all)
        return self._pingpong.collect(replied_by_all)


class BareWithStructs(BareFromPython):
    """The same with msgspec structs encoded and decoded at both ends."""

    what = "structs"

    def prepare(self, steps: list[StepInput]) -> list[Any]:
        return steps

    def verify(self, sent: StepInput, reply: StepOutput) -> None:
        if reply.step_id != sent.step_id:
            raise AssertionError(f"the reply to step {reply.step_id} came after step {sent.step_id}")

    def round_trip(self, step: StepInput, num_replies: int) -> StepOutput:
        self._pingpong.publish(encode(step), True)  # who is to reply stands in the step
        return decode_reply.decode(self._pingpong.collect(num_replies == self.num_readers))


def serve(fd: int, max_bytes: int, num_readers: int, rank: int, wait: str, what: str) -> None:
    import pingpong

    pingpong.open(fd, max_bytes, num_readers, rank, getattr(pingpong, wait))
    if what == "c":
        pingpong.serve()
    elif what == "bytes":
        answer = bytes(REPLY_BYTES)
        while (payload := pingpong.receive()) is not None:
            if payload:
                pingpong.reply(answer)
    else:
        while (payload := pingpong.receive()) is not None:
            step = decode_step.decode(payload)
            if wants_reply(step, rank):
                pingpong.reply(encode(make_reply(step)))
