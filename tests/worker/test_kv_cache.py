"""How much memory the cache may take."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import make_checkpoint
from zmqexec.config import EngineConfig
from zmqexec.model_config import load_model_config
from zmqexec.worker import kv_cache
from zmqexec.worker.kv_cache import available_memory_bytes, cpu_cache_bytes

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """A machine with 64 GiB available, seen from a process in the cgroup /outer/inner."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {64 * GIB // 1024} kB\n")
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    (cgroup / "outer" / "inner").mkdir(parents=True)
    return proc, cgroup


def limit(group, maximum, used):
    (group / "memory.max").write_text(f"{maximum}\n")
    (group / "memory.current").write_text(f"{used}\n")


def test_without_a_cgroup_limit_the_machine_decides(machine):
    proc, cgroup = machine
    limit(cgroup / "outer", "max", GIB)
    assert available_memory_bytes(proc, cgroup) == 64 * GIB


def test_the_tightest_cgroup_on_the_way_up_decides(machine):
    proc, cgroup = machine
    limit(cgroup / "outer" / "inner", 20 * GIB, GIB)
    limit(cgroup / "outer", 8 * GIB, 3 * GIB)
    assert available_memory_bytes(proc, cgroup) == 5 * GIB


def test_a_full_cgroup_leaves_nothing(machine):
    proc, cgroup = machine
    limit(cgroup / "outer", GIB, 2 * GIB)
    assert available_memory_bytes(proc, cgroup) == 0


def test_the_cache_is_what_was_asked_for_or_what_is_needed_or_what_is_there(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    model = load_model_config(tmp_path)
    per_token = model.kv_bytes_per_token(1, 4)

    def size(available, **settings):
        monkeypatch.setattr(kv_cache, "available_memory_bytes", lambda: available)
        return cpu_cache_bytes(EngineConfig(**settings), model, 100, torch.float32)

    assert size(64 * GIB, kv_cache_memory_bytes=12345) == 12345
    assert size(64 * GIB, max_num_seqs=3, block_size=16) == 3 * 112 * per_token
    assert size(4000, max_num_seqs=3) == 1000
    assert size(1 << 60, max_num_seqs=4096, max_num_batched_tokens=4096) == min(4 * GIB, 4096 * 112 * per_token)
