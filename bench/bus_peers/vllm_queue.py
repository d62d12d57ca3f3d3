"""vLLM's MessageQueue as its multiprocessing executor uses it: one down to all workers, one up from each.

Runs in: driver | worker.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from vllm import envs
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

from bus_peers.messages import make_reply, wants_reply
from bus_peers.peer import TIMEOUT_S, Peer, Setup, die_with_parent
from zmqexec.protocol import StepInput, StepOutput

START_S = 120.0


class VllmQueue(Peer):
    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        max_chunk_bytes = getattr(envs, "VLLM_MQ_MAX_CHUNK_BYTES_MB", 16) << 20
        self._down = MessageQueue(setup.num_readers, setup.num_readers, max_chunk_bytes=max_chunk_bytes)
        self._up: list[MessageQueue] = []
        self.pids = []
        pipes: list[Connection] = []
        for rank in range(setup.num_readers):
            ours, theirs = context.Pipe()
            arguments = (self._down.export_handle(), rank, theirs)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pids.append(process.pid)
            pipes.append(ours)
        for pipe in pipes:
            if not pipe.poll(START_S):
                raise TimeoutError(f"a worker has not started within {START_S:g} s")
            self._up.append(MessageQueue.create_from_handle(pipe.recv(), 0))
        self._down.wait_until_ready()
        for queue in self._up:
            queue.wait_until_ready()

    def round_trip(self, step: StepInput, num_replies: int) -> StepOutput:
        self._down.enqueue(step)
        for queue in self._up[:num_replies]:
            reply = queue.dequeue(timeout=TIMEOUT_S)
        return reply


def serve(handle: Any, rank: int, pipe: Connection) -> None:
    die_with_parent()
    down = MessageQueue.create_from_handle(handle, rank)
    up = MessageQueue(1, 1)
    pipe.send(up.export_handle())
    down.wait_until_ready()
    up.wait_until_ready()
    while True:
        step = down.dequeue(indefinite=True)
        if wants_reply(step, rank):
            up.enqueue(make_reply(step))
