"""zmqexec: LLM inference on the GPUs of one machine, over a shared-memory message bus.

    driver    engine.py, driver/        decides each step; knows token ids and blocks, no tensors
    executor  executor/                 starts the workers, publishes steps, notices who died
    bus       bus/, csrc/bus/           the shared-memory ring that carries the messages of protocol.py
    worker    worker/                   one process per rank: model shard, KV cache, sampler
    server    async_engine.py, server/  the same over ZeroMQ to a driver process, and HTTP on top
    top       top/                      watches a running engine from outside: it only reads shared memory

Glossary. A **request** is a prompt and how to sample from it; each of its n samples is a **sequence**. A **step** is
one forward pass over a batch; in it a sequence either **prefills** a chunk of known tokens or **decodes** one token.
The KV cache is divided into **blocks** of `block_size` tokens; a sequence's **block_table** lists its own. A running
sequence has a **slot**, a small integer that names it in messages. A **rank** is one worker of `tp_size`.
**Run-ahead** is how many steps are published before the result of an earlier one is known.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from zmqexec.config import EngineConfig, SamplingParams
from zmqexec.errors import (
    BusClosed,
    BusError,
    BusTimeout,
    CheckpointError,
    ConfigError,
    DriverDied,
    EngineClosed,
    ExecutorError,
    InternalError,
    ProtocolError,
    RequestError,
    StartupError,
    UserError,
    WorkerDied,
    WorkerFailed,
    WorkerStalled,
    ZmqexecError,
)
from zmqexec.version import __version__

if TYPE_CHECKING:
    from zmqexec.async_engine import AsyncEngine
    from zmqexec.engine import Engine
    from zmqexec.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = [
    "AsyncEngine",
    "BusClosed",
    "BusError",
    "BusTimeout",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "DriverDied",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "ExecutorError",
    "InternalError",
    "Logprob",
    "ProtocolError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StartupError",
    "UserError",
    "WorkerDied",
    "WorkerFailed",
    "WorkerStalled",
    "ZmqexecError",
    "__version__",
]

_LAZY = {
    "AsyncEngine": "zmqexec.async_engine",
    "CompletionOutput": "zmqexec.outputs",
    "Engine": "zmqexec.engine",
    "Logprob": "zmqexec.outputs",
    "RequestOutput": "zmqexec.outputs",
}
"""Imported when first asked for: a worker imports this package too, and needs none of them."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'zmqexec' has no attribute {name!r}")
    import importlib

    try:
        if sys.platform != "linux":
            return getattr(importlib.import_module(_LAZY[name]), name)  # the extension is for Linux
        # Not every module needs it when it is imported, but an engine that cannot start should say so here.
        importlib.import_module("zmqexec._bus")
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "zmqexec._bus":
            raise
        raise ImportError(
            f"{__path__[0]} is a source tree whose C extension has not been built: leave that folder, so that "
            "Python finds the installed zmqexec, or run `pip install -e .` there, which builds it in place"
        ) from None
