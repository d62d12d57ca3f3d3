"""Whatever is killed, and whenever: the others learn of it in time, and nothing is left behind.

Real processes and real signals. Deadlines are the documented ones times `SLACK`; what was measured is recorded as a
property of each test.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.procs import cpu_seconds, is_gone, is_stopped, leftovers, roles, wait_for, wait_gone

SLACK = 5
GONE_S = 2.0
ERROR_S = 1.0
VICTIMS = Path(__file__).parent / "victims"

SLOW_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
"""A prefill of 8,000 tokens takes a CPU many seconds: time enough to hit it."""


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slow-model")
    (folder / "config.json").write_text(json.dumps(SLOW_MODEL))
    return folder


class Victim:
    """A user's program with an engine in it, seen from outside."""

    def __init__(self, kind: str, model: Path, scratch: Path, env: dict[str, str], **settings: Any) -> None:
        self.scratch = scratch
        config = {
            "model": str(model),
            "load_format": "dummy",
            "tensor_parallel_size": 2,
            "kv_cache_memory_bytes": 1 << 29,
            "max_num_batched_tokens": 8192,
            **settings,
        }
        self.popen = subprocess.Popen(
            [sys.executable, str(VICTIMS / "engine_process.py"), kind, json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=scratch,
            env=os.environ | {"TMPDIR": str(scratch)} | env,
            start_new_session=True,
        )
        self.user = psutil.Process(self.popen.pid)
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stderr: list[str] = []
        self._threads = [
            threading.Thread(target=self._read_stdout, daemon=True),
            threading.Thread(target=self._read_stderr, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _read_stdout(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.said.put(json.loads(line))

    def _read_stderr(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.stderr.append(line)

    def tell(self, command: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(command + "\n")
        self.popen.stdin.flush()

    def hear(self, timeout_s: float) -> dict[str, Any]:
        try:
            return self.said.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"silence for {timeout_s} s; stderr:\n{''.join(self.stderr)}") from None

    def wait_ready(self) -> None:
        assert self.hear(120.0) == {"ready": True}

    def processes(self) -> dict[str, psutil.Process]:
        return {"user": self.user} | roles(self.user)

    def close(self) -> None:
        for process in [*self.user.children(recursive=True), self.user] if self.user.is_running() else []:
            process.kill()
        self.popen.wait(10)
        for thread in self._threads:
            thread.join(10)
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@pytest.fixture
def start(slow_model: Path, tmp_path: Path) -> Iterator[Callable[..., Victim]]:
    started: list[Victim] = []

    def start_victim(kind: str, env: dict[str, str] | None = None, **settings: Any) -> Victim:
        started.append(Victim(kind, slow_model, tmp_path, env or {}, **settings))
        return started[-1]

    yield start_victim
    for victim in started:
        victim.close()


def reach(moment: str, victim: Victim) -> dict[str, psutil.Process]:
    """Bring the engine to `moment`; its processes by role."""
    if moment == "start-up":
        return wait_for(lambda: found if "worker 1" in (found := victim.processes()) else {}, 60.0, "two workers")
    victim.wait_ready()
    processes = victim.processes()
    if moment == "idle":
        return processes
    rank_0, rank_1 = processes["worker 0"], processes["worker 1"]
    before = cpu_seconds(rank_0)
    if moment == "mid-prefill":
        victim.tell("generate 8000")
        wait_for(lambda: cpu_seconds(rank_0) > before + 0.3, 60.0, "a busy prefill")
    elif moment == "inside a collective":
        victim.tell("generate 8")
        wait_for(lambda: cpu_seconds(rank_0) > before + 0.3, 60.0, "decoding")
        rank_1.suspend()  # rank 0 now waits for its peer inside a collective
        wait_for(lambda: not _runs(rank_0), 60.0, "rank 0 waiting in a collective")
    else:
        assert moment == "one worker stopped"
        rank_1.suspend()
        wait_for(lambda: is_stopped(rank_1.pid), 10.0, "a stopped worker")
    return processes


def _runs(process: psutil.Process) -> bool:
    """Whether it used the CPU in the last tenth of a second."""
    before = cpu_seconds(process)
    threading.Event().wait(0.1)
    return cpu_seconds(process) > before


MOMENTS = ["start-up", "idle", "mid-prefill", "inside a collective", "one worker stopped"]
KILLS = [("sync", "user"), ("sync", "worker 0"), ("sync", "all"), ("async", "user"), ("async", "driver")]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("kind", "whom"), KILLS, ids=[f"{kind}-{whom}" for kind, whom in KILLS])
def test_killing_any_process_at_any_moment_leaves_nothing(
    start: Callable[..., Victim], record_property: Callable[[str, Any], None], kind: str, whom: str, moment: str
) -> None:
    victim = start(kind)
    processes = reach(moment, victim)
    killed = list(processes.values()) if whom == "all" else [processes[whom]]
    for process in killed:
        process.kill()
    expected = [process for role, process in processes.items() if role != "user" or whom in ("user", "all")]
    record_property("gone_s", wait_gone(expected, GONE_S * SLACK))
    if moment in ("idle", "one worker stopped") and (kind, whom) == ("sync", "worker 0"):
        victim.tell("generate 8")  # nobody is told of a death while nobody asks
    if not is_gone(victim.user):
        said = victim.hear(ERROR_S * SLACK)
        while "error" not in said:
            said = victim.hear(ERROR_S * SLACK)
        assert said["error"] == ("DriverDied" if whom == "driver" else "WorkerDied")
        assert "SIGKILL" in said["text"]
        record_property("user_gone_s", wait_gone([victim.user], GONE_S * SLACK))
    wait_for(lambda: not leftovers([victim.scratch], victim.popen.pid), GONE_S * SLACK, "nothing left")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_exception_on_a_rank_reaches_the_caller_with_rank_phase_cause_and_output(
    start: Callable[..., Victim], record_property: Callable[[str, Any], None], tmp_path: Path, rank: int, kind: str
) -> None:
    trigger = tmp_path.parent / f"{tmp_path.name}-trigger"
    env = {"PYTHONPATH": str(VICTIMS / "faults"), "FAULT_TRIGGER": str(trigger), "FAULT_RANK": str(rank)}
    victim = start(kind, env)
    victim.wait_ready()
    victim.tell("generate 8")
    worker = victim.processes()["worker 0"]
    before = cpu_seconds(worker)
    wait_for(lambda: cpu_seconds(worker) > before + 0.2, 60.0, "decoding")
    trigger.touch()
    said = victim.hear(ERROR_S * SLACK)
    assert said["error"] == "WorkerFailed"
    assert f"worker {rank} failed in phase DECODE of step" in said["text"]
    assert "ArithmeticError: sabotage in the model" in said["text"]
    assert "sabotaged" in said["text"], "the traceback of the rank"
    wait_gone([victim.user], GONE_S * SLACK)
    assert any(line.startswith(f"(rank {rank} pid ") and "sabotage" in line for line in victim.stderr)


def test_a_killed_worker_is_named_with_phase_and_signal_within_a_second(start: Callable[..., Victim]) -> None:
    victim = start("sync")
    processes = reach("mid-prefill", victim)
    processes["worker 1"].kill()
    said = victim.hear(ERROR_S * SLACK)
    assert said["error"] == "WorkerDied"
    assert f"worker 1 (pid {processes['worker 1'].pid}) died in phase" in said["text"]
    assert "SIGKILL" in said["text"] and "out-of-memory" in said["text"]


def test_a_stopped_worker_is_named_after_the_step_timeout(start: Callable[..., Victim]) -> None:
    victim = start("sync", step_timeout_s=1.0)
    processes = reach("inside a collective", victim)
    said = victim.hear(1.0 + ERROR_S * SLACK)
    assert said["error"] == "WorkerStalled"
    assert f"worker 1 (pid {processes['worker 1'].pid})" in said["text"]
    assert "stopped (SIGSTOP)" in said["text"] and "step_timeout_s=1.0" in said["text"]
    assert "worker 0" in said["text"] and "COLLECTIVE" in said["text"]
    wait_gone(processes.values(), GONE_S * SLACK)


def test_an_idle_engine_uses_under_one_percent_of_a_core(
    start: Callable[..., Victim], record_property: Callable[[str, Any], None]
) -> None:
    victim = start("async")
    victim.wait_ready()
    engine = [process for role, process in victim.processes().items() if role != "user"]

    def used_in_a_second() -> float:
        before = sum(map(cpu_seconds, engine))
        threading.Event().wait(1.0)
        return sum(map(cpu_seconds, engine)) - before

    # /proc counts in ticks of 10 ms: one tick may fall into any second.
    shares = [used_in_a_second() for _ in range(3)]
    record_property("cpu_share", shares)
    assert sum(shares) <= 0.01 * len(shares) + 0.011


def test_no_process_of_an_engine_listens_on_the_network(start: Callable[..., Victim]) -> None:
    victim = start("async")
    victim.wait_ready()
    listening = [
        (role, connection.laddr)
        for role, process in victim.processes().items()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN or connection.type == 2  # SOCK_DGRAM
    ]
    assert listening == []


def test_ctrl_c_ends_the_engine_without_a_word_from_workers(start: Callable[..., Victim]) -> None:
    victim = start("sync")
    processes = reach("mid-prefill", victim)
    os.killpg(victim.popen.pid, signal.SIGINT)  # what a terminal does
    for role in ("worker 0", "worker 1"):
        processes[role].send_signal(signal.SIGINT)
    wait_gone(processes.values(), GONE_S * SLACK)
    assert "KeyboardInterrupt" in "".join(victim.stderr)
    assert not [line for line in victim.stderr if line.startswith("(rank")]
