"""A step that does not come back is explained: who holds it up, what the others wait for, and where in Python it hangs.

Real workers on the demo model. The warning is due after `WARN_S`; what is waited for has a deadline far behind it.
"""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.procs import cpu_seconds, is_stopped, roles, wait_for
from tests.server.real_server import RealServer
from zmqexec import AsyncEngine, Engine, SamplingParams, WorkerStalled, ZmqexecError
from zmqexec.bus.status import Phase, WorkerStatus
from zmqexec.executor import stall
from zmqexec.executor.multiproc import MultiprocExecutor

WARN_S = 0.4
DEADLINE_S = 30.0
FAULTS = Path(__file__).parents[1] / "victims" / "faults"
GREEDY = SamplingParams(temperature=0.0)


class Said:
    """All that has come out of the file descriptor 2, also of the driver process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd
        self.text = ""

    def wait_for(self, pattern: str) -> re.Match[str]:
        def found() -> re.Match[str] | None:
            self.text += self._capfd.readouterr().err
            return re.search(pattern, self.text)

        match = wait_for(found, DEADLINE_S, f"{pattern!r} in what was said")
        assert match is not None
        return match


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Said:
    return Said(capfd)


class Generating:
    """`12+30=` on an engine, in a thread."""

    def __init__(self, engine: Engine) -> None:
        self.text = ""
        self.error: ZmqexecError | None = None
        self._thread = threading.Thread(target=self._run, args=[engine], daemon=True)
        self._thread.start()

    def _run(self, engine: Engine) -> None:
        try:
            self.text = engine.generate("12+30=", GREEDY, use_tqdm=False)[0].outputs[0].text
        except ZmqexecError as error:
            self.error = error

    def result(self) -> str:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        return self.text


@pytest.fixture
def hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """Make the model of a rank hang in Python while the file that this returns exists."""
    trigger = tmp_path / "hang"

    def prepare(rank: int) -> Path:
        environment = {"PYTHONPATH": str(FAULTS), "FAULT_TRIGGER": str(trigger), "FAULT_KIND": "hang"}
        for name, value in (environment | {"FAULT_RANK": str(rank)}).items():
            monkeypatch.setenv(name, value)
        return trigger

    yield prepare
    trigger.unlink(missing_ok=True)


def workers() -> dict[str, psutil.Process]:
    return roles(psutil.Process())


def test_a_rank_that_hangs_in_python_is_named_with_its_stack_and_the_engine_goes_on(
    said: Said, hang: Callable[[int], Path]
) -> None:
    trigger = hang(1)
    with Engine(tensor_parallel_size=2, stall_warning_s=WARN_S) as engine:
        pids = {role: process.pid for role, process in workers().items()}
        trigger.touch()
        generating = Generating(engine)
        # On a busy machine there may be an earlier one, before worker 0 has reached the collective.
        warning = said.wait_for(
            r"\(driver pid (\d+)\) warning: no reply to step (\d+) for (\d+\.\d) s: (.*worker 0 waits.*)\n"
        )
        assert warning[1] == str(psutil.Process().pid) and warning[2] == "0" and float(warning[3]) >= WARN_S
        assert warning[4].startswith(f"worker 1 (pid {pids['worker 1']}) is in phase PREFILL of step 0 for ")
        assert "Meanwhile worker 0 waits for its peers in a collective (phase COLLECTIVE of step 0 for " in warning[4]
        assert warning[4].endswith("step_timeout_s=120. The Python stack of worker 1 follows.")
        said.wait_for(rf"\(rank 1 pid {pids['worker 1']}\) .*in hang_in_the_model\n")
        blamed = re.findall(r" s: worker (\d)", said.text)
        assert set(re.findall(r"\(rank (\d)", said.text)) <= set(blamed), "only who holds the others up is asked"
        trigger.unlink()
        assert generating.result() == "42"


def test_warnings_about_one_step_come_at_growing_intervals(said: Said, hang: Callable[[int], Path]) -> None:
    trigger = hang(0)
    with Engine(stall_warning_s=WARN_S) as engine:
        trigger.touch()
        generating = Generating(engine)
        said.wait_for(r"(?s)warning: .*warning: .*warning: ")
        waited = [float(seconds) for seconds in re.findall(r"no reply to step 0 for (\d+\.\d) s", said.text)]
        for seconds, due in zip(waited, (WARN_S, 2 * WARN_S, 4 * WARN_S), strict=False):
            assert seconds >= due - 0.05  # it is printed with one digit
        trigger.unlink()
        assert generating.result() == "42"


def test_a_stopped_process_is_called_that_and_not_asked_for_a_stack(said: Said) -> None:
    with Engine(tensor_parallel_size=2, stall_warning_s=WARN_S) as engine:
        worker = workers()["worker 1"]
        executor = engine._driver._executor
        assert isinstance(executor, MultiprocExecutor)
        wait_for(lambda: executor._channel.status(1).phase == Phase.IDLE, 10.0, "a worker that waits")
        worker.suspend()
        wait_for(lambda: is_stopped(worker.pid), 10.0, "a stopped worker")
        generating = Generating(engine)
        warning = said.wait_for(r"warning: (.*Meanwhile worker 0 waits.*)\n")
        assert f": worker 1 (pid {worker.pid}) is in phase IDLE" in warning[1]
        assert "Its process is stopped (SIGSTOP); SIGCONT continues it. Meanwhile" in warning[1]
        assert "follows" not in warning[1]
        worker.resume()
        assert generating.result() == "42"
        assert worker.is_running(), "no signal was left for it"


def test_the_error_at_the_end_shows_the_stack_too(said: Said, hang: Callable[[int], Path]) -> None:
    trigger = hang(0)
    with Engine(stall_warning_s=WARN_S, step_timeout_s=3.0) as engine:
        trigger.touch()
        generating = Generating(engine)
        generating.result()
    assert isinstance(generating.error, WorkerStalled)
    first_line = str(generating.error).splitlines()[0]
    assert "did not finish step 0 within step_timeout_s=3.0: worker 0" in first_line and "PREFILL" in first_line
    assert "in hang_in_the_model" in str(generating.error).partition("Its last output:")[2]


@pytest.mark.parametrize("off", [None, 0.0])
def test_without_the_setting_nothing_is_said(said: Said, hang: Callable[[int], Path], off: float | None) -> None:
    trigger = hang(0)
    with Engine(stall_warning_s=off, step_timeout_s=1.0) as engine:
        trigger.touch()
        generating = Generating(engine)
        generating.result()
        said.text += said._capfd.readouterr().err
    assert isinstance(generating.error, WorkerStalled) and "warning" not in said.text


def test_a_waiting_driver_uses_no_cpu(said: Said, hang: Callable[[int], Path]) -> None:
    trigger = hang(0)
    with Engine(stall_warning_s=WARN_S) as engine:
        trigger.touch()
        generating = Generating(engine)
        said.wait_for(r"warning: ")
        before = cpu_seconds(psutil.Process())
        time.sleep(1.0)  # the next warning is due in this time, or soon after
        used = cpu_seconds(psutil.Process()) - before
        trigger.unlink()
        assert generating.result() == "42"
    assert used <= 0.1


async def _stall_an_async_engine(said: Said, trigger: Path) -> str:
    async with await AsyncEngine.start(tensor_parallel_size=2, stall_warning_s=WARN_S) as engine:
        driver = workers()["driver"]
        trigger.touch()
        stream = engine.generate("12+30=", GREEDY, output="final")
        answer = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(said.wait_for, rf"\(driver pid {driver.pid}\) warning: .* worker 1 ")
        await asyncio.to_thread(said.wait_for, r"\(rank 1 pid \d+\) .*in hang_in_the_model\n")
        trigger.unlink()
        return (await answer).outputs[0].text


def test_the_driver_process_of_an_async_engine_warns(said: Said, hang: Callable[[int], Path]) -> None:
    assert asyncio.run(_stall_an_async_engine(said, hang(1))) == "42"


def test_zmqexec_serve_warns() -> None:
    server = RealServer("--stall-warning-s", str(WARN_S))
    try:
        server.wait_ready()
        worker = roles(server.process)["worker 1"]
        worker.send_signal(signal.SIGSTOP)
        wait_for(lambda: is_stopped(worker.pid), 10.0, "a stopped worker")
        answers: list[Any] = []
        body = {"prompt": "12+30=", "temperature": 0}
        asking = threading.Thread(target=lambda: answers.append(server.http.post("/v1/completions", json=body)))
        asking.start()
        wait_for(lambda: re.search(r"\(driver pid \d+\) warning: .*worker 1", server.said), DEADLINE_S, "a warning")
        worker.send_signal(signal.SIGCONT)
        asking.join(DEADLINE_S)
        assert answers[0].json()["choices"][0]["text"] == "42"
    finally:
        server.close()


# ── who is to blame ─────────────────────────────────────────────────────────────────────────────────────────────────


class FakeChild:
    pid = 2**22 + 1  # nobody's
    pidfd = -1


class FakeWorker:
    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.child = FakeChild()
        self.log_tail = ""


@pytest.mark.parametrize(
    ("phases", "culprit"),
    [
        ([("COLLECTIVE", 7), ("DECODE", 7), ("COLLECTIVE", 7)], 1),
        ([("SAMPLING", 7), ("IDLE", 7), ("IDLE", 7)], 0),
        ([("COLLECTIVE", 7), ("COLLECTIVE", 6), ("COLLECTIVE", 7)], 1),
        ([("COLLECTIVE", 7), ("IDLE", 6), ("COLLECTIVE", 7)], 1),
        ([("IDLE", 7), ("IDLE", 7), ("REPLYING", 7)], 2),
        ([("COLLECTIVE", 7), ("IDLE", 8), ("COLLECTIVE", 7)], 0),
    ],
)
def test_the_rank_to_blame_is_the_one_that_waits_for_nobody(phases: list[tuple[str, int]], culprit: int) -> None:
    def status(rank: int) -> WorkerStatus:
        name, step_id = phases[rank]
        return WorkerStatus(rank, 1, Phase[name], step_id, time.monotonic_ns(), "")

    workers: list[Any] = [FakeWorker(rank) for rank in range(len(phases))]
    watch = stall.StallWatch(workers, status, 1.0, 10.0)
    assert watch.error(7).rank == culprit


def test_a_watch_that_is_off_is_never_due() -> None:
    watch = stall.StallWatch([], lambda rank: pytest.fail("nobody asks"), 0.0, 10.0)
    watch.begin(5.0)
    assert watch.due == float("inf")
