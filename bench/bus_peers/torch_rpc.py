"""`torch.distributed.rpc` over TensorPipe: one asynchronous call per worker.

Runs in: driver | worker.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from typing import Any

from torch.distributed import rpc

from bus_peers.messages import make_reply, wants_reply
from bus_peers.peer import IDLE_S, TIMEOUT_S, Peer, Setup, spawn
from zmqexec.protocol import StepInput, StepOutput

MAX_OUTSTANDING = 16


class TorchRpc(Peer):
    def __init__(self, setup: Setup) -> None:
        store = tempfile.mktemp(dir=setup.scratch)  # does not exist yet: it is a FileStore's to create
        self._names = [f"worker{rank}" for rank in range(setup.num_readers)]
        world_size = setup.num_readers + 1
        workers = [spawn(f"{__name__}:serve", store, rank, world_size) for rank in range(setup.num_readers)]
        self.pids = [worker.pid for worker in workers]
        self._outstanding: deque[Any] = deque()
        join("driver", 0, world_size, store)

    def round_trip(self, step: StepInput, num_replies: int) -> StepOutput:
        calls = [rpc.rpc_async(name, answer, args=(step, rank)) for rank, name in enumerate(self._names)]
        for call in calls[:num_replies]:
            reply = call.wait()
        self._outstanding.extend(calls[num_replies:])
        while len(self._outstanding) > MAX_OUTSTANDING:
            self._outstanding.popleft().wait()
        return reply


def join(name: str, rank: int, world_size: int, store: str) -> None:
    for variable in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        os.environ[variable] = "lo"
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{store}", rpc_timeout=2 * TIMEOUT_S)
    rpc.init_rpc(name, rank=rank, world_size=world_size, rpc_backend_options=options)


def serve(store: str, rank: int, world_size: int) -> None:
    join(f"worker{rank}", rank + 1, world_size, store)
    time.sleep(IDLE_S)


def answer(step: StepInput, rank: int) -> StepOutput | None:
    return make_reply(step) if wants_reply(step, rank) else None
