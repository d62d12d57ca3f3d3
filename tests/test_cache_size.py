"""How much memory the cache may take."""

from __future__ import annotations

import pytest

from tests.checkpoints import make_checkpoint
from zmqexec import ConfigError, cache_size
from zmqexec.cache_size import available_memory_bytes, cpu_cache_bytes
from zmqexec.config import EngineConfig
from zmqexec.driver.plan import make_plan
from zmqexec.model_config import load_model_config

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

    def size(available, max_model_len=100, **settings):
        monkeypatch.setattr(cache_size, "available_memory_bytes", lambda: available)
        return cpu_cache_bytes(EngineConfig(**settings), model, max_model_len, 4)

    assert size(64 * GIB, kv_cache_memory_bytes=12345) == 12345
    assert size(64 * GIB, max_num_seqs=3, block_size=16) == 3 * 112 * per_token
    assert size(4000, max_num_seqs=3) == 1000
    assert size(1 << 60, max_num_seqs=4096, max_num_batched_tokens=4096) == min(4 * GIB, 4096 * 112 * per_token)
    long = 5 * GIB // per_token // 16 * 16
    assert size(1 << 60, max_model_len=long) == long * per_token  # more than the limit, but less would not do


def test_a_sequence_for_which_the_free_memory_is_too_little_is_refused_before_anything_starts(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    monkeypatch.setattr(cache_size, "available_memory_bytes", lambda: 4 * 100_000)
    with pytest.raises(ConfigError) as caught:
        make_plan(EngineConfig(model=str(tmp_path)))
    message = str(caught.value)
    assert "the free memory, 100000 bytes," in message and "set kv_cache_memory_bytes" in message
    assert "lower max_model_len to at most" in message


def test_a_remedy_that_cannot_be_followed_is_not_proposed():
    with pytest.raises(ConfigError) as caught:
        make_plan(EngineConfig(kv_cache_memory_bytes=1000))
    assert "raise kv_cache_memory_bytes" in str(caught.value) and "lower max_model_len" not in str(caught.value)
