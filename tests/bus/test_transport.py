"""Where the system grants no shared memory, the engine says so once and goes on over ZeroMQ."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.procs import wait_gone

VICTIMS = Path(__file__).parents[1] / "victims"
PROGRAM = """
import resource, sys
from zmqexec import Engine, SamplingParams
tp_size, transport, file_limit = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if file_limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
settings = dict(tensor_parallel_size=tp_size, transport=transport, kv_cache_memory_bytes=16 << 20, num_threads=1)
greedy = SamplingParams(temperature=0.0, max_tokens=8)
with Engine(**settings) as engine:
    for question in ("12+30=", "5+6="):
        print(engine.generate(question, greedy, use_tqdm=False)[0].outputs[0].text)
"""
ASYNC_PROGRAM = """
import asyncio
from zmqexec import AsyncEngine, SamplingParams
async def main():
    async with await AsyncEngine.start(kv_cache_memory_bytes=16 << 20, num_threads=1) as engine:
        async for output in engine.generate("12+30=", SamplingParams(temperature=0.0), output="final"):
            print(output.outputs[0].text)
asyncio.run(main())
"""
DYING_PROGRAM = """
import os, psutil, signal
from zmqexec import Engine
engine = Engine(kv_cache_memory_bytes=16 << 20, num_threads=1)
print(*(child.pid for child in psutil.Process().children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
WARNING = "steps travel by ZeroMQ"


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where an engine that is killed may leave a socket, on a platform without abstract ones."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def run(*command: str, where: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    if where is not None:
        env["PYTHONPATH"] = str(VICTIMS / where)
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120)


def engine(tp_size: int = 1, transport: str = "auto", file_limit: int = 0, where: str | None = None):
    return run(sys.executable, "-c", PROGRAM, str(tp_size), transport, str(file_limit), where=where)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("where", [None, "no_memfd"], ids=["", "without memfd"])
def test_zmq_can_be_chosen(tp_size, where):
    done = engine(tp_size, "zmq", where=where)
    assert done.stdout == "42\n11\n", done.stderr
    assert WARNING not in done.stderr


@pytest.mark.parametrize("tp_size", [1, 2])
def test_where_memfd_create_is_refused_auto_warns_once_and_works(tp_size):
    done = engine(tp_size, where="no_memfd")
    assert done.stdout == "42\n11\n", done.stderr
    assert done.stderr.count(WARNING) == 1 and "memfd_create: Operation not permitted" in done.stderr


@pytest.mark.parametrize(("tp_size", "file_limit"), [(1, 64 << 10), (2, 4 << 20)])
def test_where_files_may_not_be_large_enough_auto_warns_once_and_works(tp_size, file_limit):
    done = engine(tp_size, file_limit=file_limit)
    assert done.stdout == "42\n11\n", done.stderr
    assert done.stderr.count(WARNING) == 1 and "File too large" in done.stderr


def test_where_the_ranks_cannot_share_memory_either_the_error_says_what_to_do():
    done = engine(2, file_limit=64 << 10)
    assert done.returncode == 1
    assert "cannot share 2097152 bytes" in done.stderr and "ulimit -f" in done.stderr


def test_ring_alone_is_an_error_where_there_is_no_shared_memory():
    done = engine(transport="ring", where="no_memfd")
    assert done.returncode == 1 and "BusError: memfd_create: Operation not permitted" in done.stderr


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="takes a mount namespace")
def test_a_full_dev_shm_does_not_matter():
    full = "mount -t tmpfs -o size=4k none /dev/shm && head -c 4096 /dev/zero >/dev/shm/full && exec"
    done = run("unshare", "-m", "sh", "-c", f'{full} "$0" -c "$1" 2 ring 0', sys.executable, PROGRAM)
    assert done.stdout == "42\n11\n", done.stderr


def test_a_platform_that_is_not_linux_works_over_zmq():
    done = engine(where="no_linux")
    assert done.stdout == "42\n11\n", done.stderr
    assert done.stderr.count(WARNING) == 1 and "is for Linux" in done.stderr
    done = run(sys.executable, "-c", ASYNC_PROGRAM, where="no_linux")
    assert done.stdout == "42\n", done.stderr


def test_on_a_platform_that_is_not_linux_the_workers_end_with_their_driver_too():
    done = run(sys.executable, "-c", DYING_PROGRAM, where="no_linux")
    assert done.returncode == -signal.SIGKILL
    try:
        worker = psutil.Process(int(done.stdout))
    except psutil.NoSuchProcess:
        return
    wait_gone([worker], 10.0)
