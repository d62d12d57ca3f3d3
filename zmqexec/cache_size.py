"""How much memory the KV cache of one rank may take on the CPU.

Runs in: driver | worker. The driver asks before it starts processes, the workers again once their weights are loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

from zmqexec.config import EngineConfig
from zmqexec.model_config import ModelConfig

CPU_CACHE_LIMIT_BYTES = 4 << 30
CPU_CACHE_SHARE = 4
"""The ranks together take at most one part in this many of the memory that is available."""


def cpu_cache_bytes(config: EngineConfig, model: ModelConfig, max_model_len: int, dtype_bytes: int) -> int:
    """Bytes that one rank may spend on its KV cache.

    `kv_cache_memory_bytes` where it is set; else as much as `max_num_seqs` full sequences need, within
    `CPU_CACHE_LIMIT_BYTES` (or one sequence, where that needs more) and this rank's part of a quarter of the available
    memory.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    tp_size, block_size = config.tensor_parallel_size, config.block_size
    tokens_per_seq = -(-max_model_len // block_size) * block_size
    one_sequence = tokens_per_seq * model.kv_bytes_per_token(tp_size, dtype_bytes)
    wanted = min(config.max_num_seqs * one_sequence, max(CPU_CACHE_LIMIT_BYTES, one_sequence))
    return min(wanted, available_memory_bytes() // (CPU_CACHE_SHARE * tp_size))


def available_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can be had without swapping, within the limits of the cgroups (version 2) this process is in."""
    meminfo = proc / "meminfo"
    if not meminfo.exists():  # not Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    available = _meminfo_available(meminfo)
    for group in _own_cgroups(proc / "self" / "cgroup", cgroup):
        limit, used = _read_number(group / "memory.max"), _read_number(group / "memory.current")
        if limit is not None and used is not None:
            available = min(available, max(limit - used, 0))
    return available


def _meminfo_available(path: Path) -> int:
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{path} has no line MemAvailable")


def _own_cgroups(membership: Path, root: Path) -> list[Path]:
    """The cgroup of this process and its ancestors; a container may see only its own, as the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    groups = [root / path, *(root / path).parents]
    return [group for group in groups if group.is_relative_to(root)]


def _read_number(path: Path) -> int | None:
    """The number in `path`; None where there is none ("max" is no limit)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
