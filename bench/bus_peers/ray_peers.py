"""Ray: calls of actor methods, and a compiled graph of them.

Messages are encoded with msgspec and travel as bytes: structs, which Ray pickles, take it twice as long.

Runs in: driver | worker.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Any

import ray

from bus_peers.messages import answer, decode_reply, encode
from bus_peers.peer import TIMEOUT_S, Peer, Setup, Unsupported
from zmqexec.protocol import StepInput, StepOutput

BY_REFERENCE_BYTES = 100_000  # larger arguments are stored once and passed by reference, which Ray advises
STORE_BYTES = 512 << 20
MAX_OUTSTANDING = 16


@ray.remote(num_cpus=0)
class Actor:
    def __init__(self, rank: int) -> None:
        self._rank = rank

    def pid(self) -> int:
        return os.getpid()

    def step(self, data: bytes) -> bytes | None:
        return answer(data, self._rank)


class RayPeer(Peer):
    def __init__(self, setup: Setup) -> None:
        ray.init(
            address="local",
            num_cpus=setup.num_readers + 1,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            log_to_driver=False,
            _temp_dir=str(setup.scratch / "ray"),
        )
        self._actors: list[Any] = [Actor.remote(rank) for rank in range(setup.num_readers)]
        self.pids = ray.get([actor.pid.remote() for actor in self._actors], timeout=TIMEOUT_S * 2)

    def close(self) -> None:
        ray.shutdown()


class RayActors(RayPeer):
    """`ray.get` of one method call per actor."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._outstanding: deque[Any] = deque()

    def round_trip(self, step: StepInput, num_replies: int) -> StepOutput:
        argument: Any = encode(step)
        if len(self._actors) > 1 and len(argument) > BY_REFERENCE_BYTES:
            argument = ray.put(argument)
        calls = [actor.step.remote(argument) for actor in self._actors]
        replies = [decode_reply.decode(data) for data in ray.get(calls[:num_replies], timeout=TIMEOUT_S)]
        self._outstanding.extend(calls[num_replies:])
        while len(self._outstanding) > MAX_OUTSTANDING:
            ray.get(self._outstanding.popleft(), timeout=TIMEOUT_S)
        return replies[-1]


class RayGraph(RayPeer):
    """A compiled graph: input → every actor's method → outputs."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        from ray.dag import InputNode, MultiOutputNode

        with InputNode() as step:
            graph = MultiOutputNode([actor.step.bind(step) for actor in self._actors])
        self._graph = graph.experimental_compile(_buffer_size_bytes=setup.max_bytes + (1 << 20))

    def check(self, num_readers: int, num_replies: int) -> None:
        if num_replies < num_readers:
            raise Unsupported("a compiled graph returns the outputs of all its actors")

    def round_trip(self, step: StepInput, num_replies: int) -> StepOutput:
        outputs = ray.get(self._graph.execute(encode(step)), timeout=TIMEOUT_S)
        return [decode_reply.decode(data) for data in outputs][-1]

    def close(self) -> None:
        self._graph.teardown()
        super().close()
