"""The GPU path of a worker on the CPU: kernels by the emulator, everything else by torch's CPU operators."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import cuda_emulator
from zmqexec.config import EngineConfig
from zmqexec.protocol import LoadModel
from zmqexec.worker.gpu.collectives import LocalGpuCollectives
from zmqexec.worker.gpu.device import Event, Graph
from zmqexec.worker.gpu.runner import GpuRunner

NUM_BLOCKS = 256
EMULATOR = threading.Lock()
"""The emulator runs one kernel at a time."""


class EmulatedEvent:
    """What has been launched has happened."""

    handle = 0

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class EmulatedDevice:
    """A GPU of four multiprocessors whose work is done when a launch returns."""

    is_cuda = False
    num_sms = 4
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.native = cuda_emulator.load()

    def use(self) -> None:
        pass

    def stream(self) -> int:
        return 0

    def event(self) -> Event:
        return EmulatedEvent()

    def graph_pool(self) -> Any:
        return None

    def capture(self, launch: Callable[[], torch.Tensor], pool: Any) -> tuple[Graph, torch.Tensor]:
        raise AssertionError("there are no graphs in an emulation")

    def time_ms(self, work: Callable[[], None]) -> float:
        raise AssertionError("an emulation says nothing about time")

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30

    def peak_bytes(self, work: Callable[[], None]) -> int:
        work()
        return 0


class TorchCollectives(LocalGpuCollectives):
    """Ranks that are threads of this process; `inner` is one of `ThreadCollectives`."""

    def __init__(self, inner: Any) -> None:
        self.rank, self.tp_size = inner.rank, inner.tp_size
        self._inner = inner

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._inner.all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._inner.all_gather(tensor)

    def all_reduce_residual_(self, hidden: torch.Tensor, partial: torch.Tensor) -> None:
        hidden += self._inner.all_reduce(partial)

    def all_reduce_residual_norm(
        self, hidden: torch.Tensor, partial: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        hidden += self._inner.all_reduce(partial)
        wide = hidden.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def make_gpu_runner(
    model_dir: Path,
    collectives: Any = None,
    *,
    max_model_len: int = 256,
    dtype: str = "float32",
    num_blocks: int = NUM_BLOCKS,
    device: Any = None,
    **config: Any,
) -> GpuRunner:
    """A loaded runner with its cache allocated; every cache row that was never written is NaN."""
    tp_size = collectives.tp_size if collectives else 1
    # Ranks that are threads of one process cannot be captured: each would record what the others do, too.
    defaults = {"block_size": 16, "max_num_seqs": 16, "max_num_batched_tokens": 256, "cuda_graphs": tp_size == 1}
    settings = {**defaults, **config}
    load = LoadModel(
        epoch=1,
        config=EngineConfig(**settings, tensor_parallel_size=tp_size),
        model_dir=str(model_dir),
        dtype=dtype,
        max_model_len=max_model_len,
        num_threads=1,
        device="cuda",
    )
    runner = GpuRunner(
        load, TorchCollectives(collectives) if collectives else LocalGpuCollectives(), device or EmulatedDevice()
    )
    runner.load()
    runner.init_cache(num_blocks)
    with torch.inference_mode():
        for layer in runner._cache:
            layer.fill_(torch.nan)
    return runner
