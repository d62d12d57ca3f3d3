"""What a rank may take of its GPU's memory.

Runs in: worker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from zmqexec.config import EngineConfig
from zmqexec.errors import ConfigError
from zmqexec.worker.gpu.device import Device

GRAPH_BYTES = 512 << 20
"""Kept for CUDA graphs and for what libraries allocate on their own: an estimate, which nobody has measured yet."""


def free_bytes_for_cache(device: Device, config: EngineConfig, measure: Callable[[], None]) -> int:
    """Bytes for the KV cache: what is left of the given share after the weights and the peak of `measure`."""
    peak = device.peak_bytes(measure)
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    free, total = device.memory()
    left = int(total * config.gpu_memory_utilization) - (total - free) - peak - GRAPH_BYTES
    if left <= 0:
        raise ConfigError(
            f"gpu_memory_utilization={config.gpu_memory_utilization} of {_gib(total)} leaves no memory for the KV "
            f"cache: {_gib(total - free)} are in use, a step takes up to {_gib(peak)}, and {_gib(GRAPH_BYTES)} are "
            "kept for CUDA graphs; raise it, lower max_num_batched_tokens, or use more GPUs",
            "gpu_memory_utilization",
        )
    return left


@contextlib.contextmanager
def out_of_memory(device: Device, doing: str) -> Iterator[None]:
    """An allocation that fails inside becomes a `ConfigError` with the numbers."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = device.memory()
        raise ConfigError(
            f"the GPU's memory did not suffice for {doing}: {_gib(free)} of {_gib(total)} are free ({error}); use more "
            "GPUs, a smaller model, or lower gpu_memory_utilization, max_num_seqs or max_num_batched_tokens"
        ) from error


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
