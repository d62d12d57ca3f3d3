"""Ours.

Runs in: driver | worker.
"""

from __future__ import annotations

import contextlib
import os

from bus_peers.messages import EPOCH, make_reply, wants_reply
from bus_peers.peer import IDLE_S, TIMEOUT_S, Peer, Setup, spawn
from zmqexec.bus.channel import DriverChannel, WorkerChannel
from zmqexec.errors import BusClosed
from zmqexec.protocol import StepInput, StepOutput


class Zmqexec(Peer):
    """`DriverChannel` and `WorkerChannel` as the engine uses them."""

    def __init__(self, setup: Setup) -> None:
        wait_policy = setup.options.get("wait_policy")
        settings = {} if wait_policy is None else {"wait_policy": wait_policy}
        self._channel = DriverChannel.create(setup.num_readers, epoch=EPOCH, **settings)
        fd = self._channel.fd
        self._workers = [spawn(f"{__name__}:serve", fd, rank, fds=[fd]) for rank in range(setup.num_readers)]
        self.pids = [worker.pid for worker in self._workers]

    def round_trip(self, step: StepInput, num_replies: int) -> StepOutput:
        self._channel.publish(step, TIMEOUT_S)
        for _ in range(num_replies):
            received = self._channel.receive(TIMEOUT_S)
            if received is None:
                raise TimeoutError(f"no reply within {TIMEOUT_S:g} s")
        return received[1]

    def close(self) -> None:
        self._channel.close()


def serve(fd: int, rank: int) -> None:
    with contextlib.suppress(BusClosed), WorkerChannel.attach(fd, rank) as channel:
        os.close(fd)
        while True:
            step = channel.receive(IDLE_S)
            if step is not None and wants_reply(step, rank):
                channel.reply(make_reply(step), TIMEOUT_S)
