"""What befalls engines as a whole: stopped, forked, short of file descriptors, and ten of them at once."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.procs import is_gone, is_stopped, leftovers, roles, wait_for, wait_gone
from zmqexec import BusError, Engine, EngineClosed, SamplingParams, WorkerFailed

SLACK = 5
GONE_S = 2.0
SMALL: dict[str, Any] = {"kv_cache_memory_bytes": 16 << 20, "max_model_len": 64, "num_threads": 1}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
VICTIM = Path(__file__).parent / "victims" / "busy_process.py"

Record = Callable[[str, Any], None]


def answer(engine: Engine) -> str:
    return engine.generate("12+30=", GREEDY, use_tqdm=False)[0].outputs[0].text


# ── a program of its own ────────────────────────────────────────────────────────────────────────────────────────────


class Victim:
    """A program that generates without a pause, seen from outside."""

    def __init__(self, scratch: Path, **settings: Any) -> None:
        self.scratch = scratch
        self.popen = subprocess.Popen(
            [sys.executable, str(VICTIM), json.dumps({**SMALL, **settings})],
            stdout=subprocess.PIPE,
            text=True,
            cwd=scratch,
            env=os.environ | {"TMPDIR": str(scratch)},
            start_new_session=True,
        )
        self._said: queue.Queue[dict[str, Any]] = queue.Queue()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._said.put(json.loads(line))

    def hear(self, what: str) -> Any:
        return self._said.get(timeout=100)[what]

    def heard(self) -> list[dict[str, Any]]:
        """What it has said since."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._said.get_nowait())
        return found

    def processes(self) -> dict[str, psutil.Process]:
        user = psutil.Process(self.popen.pid)
        return {"user": user} | roles(user)

    def close(self) -> None:
        """Kill its session."""
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                if os.getsid(process.pid) == self.popen.pid:
                    process.kill()
        self.popen.wait(10)
        self._thread.join(10)
        assert self.popen.stdout is not None
        self.popen.stdout.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Victim]]:
    with contextlib.ExitStack() as stack:

        def start_victim(**settings: Any) -> Victim:
            victim = Victim(tmp_path, **settings)
            stack.callback(victim.close)
            return victim

        yield start_victim


def test_whoever_is_stopped_for_a_while_goes_on_with_the_same_tokens(start: Callable[..., Victim]) -> None:
    """A worker for less than the step timeout; the driver also for longer, for nobody waits for it."""
    step_timeout_s = 5.0
    victim = start(tensor_parallel_size=2, step_timeout_s=step_timeout_s)
    victim.hear("forks")
    expected = victim.hear("tokens")
    processes = victim.processes()
    assert sorted(processes) == ["user", "worker 0", "worker 1"]
    for role, stopped_s in [("worker 0", 0.5), ("worker 1", 0.5), ("user", 0.5), ("user", step_timeout_s + 1.0)]:
        process = processes[role]
        process.suspend()
        wait_for(lambda process=process: is_stopped(process.pid), 10.0, f"{role} stopped")  # type: ignore[misc]
        assert all(said["tokens"] == expected for said in victim.heard())
        time.sleep(stopped_s)  # the fault itself
        process.resume()
        for _ in range(2):  # one may have been said before, but was not read
            assert victim.hear("tokens") == expected


def test_a_program_killed_while_its_forks_live_takes_its_workers_along(
    start: Callable[..., Victim], record_property: Record
) -> None:
    victim = start(tensor_parallel_size=2, fork=True)
    forks = [psutil.Process(pid) for pid in victim.hear("forks")]
    expected = victim.hear("tokens")
    assert victim.hear("tokens") == expected, "forks take nothing from the engine"
    processes = victim.processes()
    assert len(processes) == 3
    processes["user"].kill()
    record_property("gone_s", wait_gone(processes.values(), GONE_S * SLACK))
    assert not any(map(is_gone, forks))
    links = [{str(fd.readlink()) for fd in Path(f"/proc/{fork.pid}/fd").iterdir()} for fork in forks]
    assert [any("memfd:zmqexec" in link for link in own) for own in links] == [True, True, False], "held by forks alone"
    for fork in forks:
        fork.kill()
    victim.popen.wait(10)
    wait_for(lambda: not leftovers([victim.scratch], victim.popen.pid), GONE_S * SLACK, "nothing left")


# ── in this process ─────────────────────────────────────────────────────────────────────────────────────────────────


def open_things() -> set[str]:
    """The threads and file descriptors of this process, each with what tells it from a later one of the same number."""
    gc.collect()
    found = {f"thread {thread.name} {thread.ident}" for thread in threading.enumerate()}
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            found.add(f"fd {fd.name} {fd.readlink()}")
    return found


def workers() -> list[psutil.Process]:
    """Of all engines of this process."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(word.endswith("_entry.py") for word in process.cmdline()):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def warm() -> None:
    """What the first engine of a process imports and keeps is no leak."""
    with Engine(**SMALL) as engine:
        assert answer(engine) == "42"


LARGE_BATCH = [SamplingParams(max_tokens=2, logit_bias=dict.fromkeys(range(40), 0.5))] * 300
"""Their admissions do not fit into a ring of 64 KiB."""


@pytest.fixture
def small_ring(warm: None) -> Iterator[tuple[Engine, set[str]]]:
    """An engine whose messages can be larger than its ring, and what was open before it."""
    before = open_things()
    with Engine(**SMALL, ring_bytes=1 << 16, max_num_seqs=512, max_num_batched_tokens=8192) as engine:
        group = workers()
        yield engine, before
    wait_gone(group, GONE_S * SLACK)


def generate_large(engine: Engine) -> None:
    engine.generate(["12+30="] * len(LARGE_BATCH), LARGE_BATCH, use_tqdm=False)


def test_a_large_message_without_descriptors_in_the_driver_is_an_error_that_closes_the_engine(
    small_ring: tuple[Engine, set[str]],
) -> None:
    engine, before = small_ring
    assert answer(engine) == "42"
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(fd.name) for fd in Path("/proc/self/fd").iterdir()}
    resource.setrlimit(resource.RLIMIT_NOFILE, ([fd for fd in range(2000) if fd not in used][3], limit[1]))
    try:
        with pytest.raises(BusError, match=r"larger than its ring .* Too many open files.*ulimit -n"):
            generate_large(engine)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert workers() == []
    assert open_things() - before == set()
    with Engine(**SMALL) as another:
        assert answer(another) == "42"


def test_a_large_message_without_descriptors_in_a_worker_is_the_error_of_that_worker(
    small_ring: tuple[Engine, set[str]],
) -> None:
    engine, before = small_ring
    assert answer(engine) == "42"
    (worker,) = workers()
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (worker.num_fds(), 1 << 10))
    with pytest.raises(WorkerFailed, match=r"(?s)^worker 0 failed .* larger than its ring .* Too many open files"):
        generate_large(engine)
    assert workers() == []
    assert open_things() - before == set()


def test_a_large_message_with_descriptors_arrives(small_ring: tuple[Engine, set[str]]) -> None:
    engine, _ = small_ring
    num_open = len(open_things())
    generate_large(engine)
    assert len(open_things()) > num_open, "it did travel by ZeroMQ"
    assert answer(engine) == "42"


def test_ten_engines_at_once_answer_and_end_and_leave_nothing(warm: None, record_property: Record) -> None:
    before = open_things()
    begin = time.monotonic()
    with ThreadPoolExecutor(10) as threads:
        engines = list(threads.map(lambda _: Engine(**SMALL), range(10)))
        group = workers()
        record_property("started_s", time.monotonic() - begin)
        assert len(group) == 10 and len({engine.info.num_blocks for engine in engines}) == 1
        for _ in range(3):
            assert list(threads.map(answer, engines)) == ["42"] * 10
        engines[3].close()
        with pytest.raises(EngineClosed):
            answer(engines[3])
        assert list(threads.map(answer, engines[4:])) == ["42"] * 6, "the others are not its business"
        list(threads.map(lambda engine: engine.close(), engines))
    wait_gone(group, GONE_S * SLACK)
    del engines
    assert open_things() - before == set()
    assert workers() == []
