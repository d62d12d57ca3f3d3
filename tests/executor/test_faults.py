"""Faults as the executor sees them: strays among the replies, and workers that are lost while it waits to publish.

The workers are processes of `odd_worker/_entry.py`, which do as told.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

import zmqexec
from tests.fakes import generate
from tests.procs import is_stopped, roles, wait_for, wait_gone
from zmqexec import EngineConfig, SamplingParams, WorkerDied, WorkerFailed, WorkerStalled
from zmqexec.driver import step as driver_step
from zmqexec.driver.plan import make_plan
from zmqexec.driver.step import Driver
from zmqexec.executor.multiproc import MultiprocExecutor
from zmqexec.protocol import NewRequest, StepInput, pack

SLACK = 5
GONE_S = 2.0
ERROR_S = 1.0
EPOCH = 3
STRAYS_OF_RANK_0 = 6
ODD_GRAPHS = 3
CONFIG = EngineConfig(
    max_model_len=64, max_num_seqs=4, block_size=4, kv_cache_memory_bytes=1 << 20, num_threads=1, ring_bytes=1 << 16
)
LARGE = bytes(20_000)  # three such steps fill the ring


@pytest.fixture
def open_executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., MultiprocExecutor]]:
    """An executor whose workers do steps as `behaviour` in odd_worker says. All are closed, and must be gone."""
    monkeypatch.setattr("zmqexec.child.PACKAGE_DIR", Path(__file__).parent / "odd_worker")
    monkeypatch.setenv("ODD_WORKER_PACKAGE", zmqexec.__path__[0])
    opened: list[MultiprocExecutor] = []

    def start(behaviour: str, tp_size: int, epoch: int = EPOCH, **settings: object) -> MultiprocExecutor:
        monkeypatch.setenv("ODD_WORKER", behaviour)
        config = msgspec.structs.replace(CONFIG, tensor_parallel_size=tp_size, **settings)
        opened.append(MultiprocExecutor(config, epoch))
        return opened[-1]

    yield start
    workers = list(roles(psutil.Process()).values())
    for executor in opened:
        executor.close()
    wait_gone(workers, GONE_S * SLACK)


def load(executor: MultiprocExecutor) -> MultiprocExecutor:
    executor.load(make_plan(CONFIG).load_message(EPOCH), lambda *_: None)
    executor.init_cache(16, lambda *_: None)
    return executor


def submit_until_the_ring_is_full(executor: MultiprocExecutor) -> None:
    for step_id in range(10):
        executor.submit(StepInput(EPOCH, step_id, prefills=LARGE))


def wait_blocked(executor: MultiprocExecutor) -> None:
    """Wait until the next large step finds no room."""
    segment = executor._channel._segment
    wait_for(lambda: segment.holding_back(len(LARGE)), 10.0, "a full ring")


def dropped(executor: MultiprocExecutor) -> int:
    return executor.stale_replies + executor.wrong_epoch_replies


# ── what they say while they start ──────────────────────────────────────────────────────────────────────────────────


def test_the_progress_of_all_ranks_is_one(open_executor: Callable[..., MultiprocExecutor]) -> None:
    executor = open_executor("read_on", 2)
    heard: list[tuple[str, int, int]] = []
    executor.load(make_plan(CONFIG).load_message(EPOCH), lambda *_: None)
    executor.init_cache(16, lambda *progress: heard.append(progress))
    # In whichever order the ranks' words come.
    assert heard == [("capturing CUDA graphs", done, 2 * ODD_GRAPHS) for done in sorted(done for _, done, _ in heard)]
    assert (heard[0][1], heard[-1][1], len(heard)) == (0, 2 * ODD_GRAPHS, 2 * (ODD_GRAPHS + 1))
    assert dropped(executor) == 0


# ── replies that belong to nobody ───────────────────────────────────────────────────────────────────────────────────


def test_replies_of_other_epochs_steps_and_ranks_are_dropped_and_counted(
    open_executor: Callable[..., MultiprocExecutor],
) -> None:
    executor = load(open_executor("answer_among_strays", 2))
    assert dropped(executor) == 2, "each rank sent one of an old epoch before its first word"
    for step_id in range(0, 20, 2):
        for one in (step_id, step_id + 1):
            executor.submit(StepInput(EPOCH, one))
        for one in (step_id, step_id + 1):
            wait_for(lambda one=one: executor._channel.status(1).step_id >= one, 10.0, "rank 1's part")
            output = executor.collect()
            assert (output.epoch, output.step_id, output.token_ids) == (EPOCH, one, b"")
    assert dropped(executor) == 2 + 20 * (STRAYS_OF_RANK_0 + 1)


def test_the_tokens_of_a_request_are_its_own_among_strays(
    open_executor: Callable[..., MultiprocExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_step, "make_executor", lambda config: open_executor("answer_among_strays", 1, epoch=0))
    driver = Driver(make_plan(CONFIG))
    prompts = {"a": [1, 2, 3, 4, 5], "b": [6, 7], "c": [8] * 20}
    for request_id, prompt in prompts.items():
        driver.add(
            NewRequest(request_id, pack(prompt), SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
        )
    tokens: dict[str, list[int]] = {request_id: [] for request_id in prompts}
    while driver.has_unfinished:
        for update in driver.step():
            tokens[update.request_id] += update.token_ids
    assert tokens == {request_id: generate(prompt, 20) for request_id, prompt in prompts.items()}
    stats = driver.stats
    assert stats.wrong_epoch_replies > stats.steps and stats.stale_replies > 0
    assert stats.stale_replies + stats.wrong_epoch_replies == 1 + STRAYS_OF_RANK_0 * stats.steps > 0


def test_a_failure_of_another_epoch_is_not_taken_for_the_cause_of_this_one(
    open_executor: Callable[..., MultiprocExecutor],
) -> None:
    executor = load(open_executor("fail_after_a_failure_of_the_past", 2))
    executor.submit(StepInput(EPOCH, 0))
    with pytest.raises(WorkerFailed, match=r"^worker 1 failed in phase DECODE of step 0: the cause$"):
        executor.collect()


# ── lost while the ring is full ─────────────────────────────────────────────────────────────────────────────────────


def test_last_words_that_come_while_a_step_is_being_published_are_not_forgotten(
    open_executor: Callable[..., MultiprocExecutor],
) -> None:
    executor = load(open_executor("fail_and_leave_once_heard", 1))
    with pytest.raises(WorkerFailed, match=r"^worker 0 failed in phase DECODE of step 0: the cause$"):
        submit_until_the_ring_is_full(executor)


def test_a_worker_killed_while_the_driver_waits_to_publish_is_named_at_once(
    open_executor: Callable[..., MultiprocExecutor],
) -> None:
    executor = load(open_executor("ignore", 2))
    victim = executor._group.workers[1].child.pid
    killed_at: list[float] = []

    def kill() -> None:
        wait_for(lambda: executor._channel.status(1).step_id == 0, 10.0, "rank 1 in step 0")
        wait_blocked(executor)
        killed_at.append(time.monotonic())
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(WorkerDied, match=rf"^worker 1 \(pid {victim}\) died in phase DECODE of step 0.*SIGKILL"):
        submit_until_the_ring_is_full(executor)
    assert time.monotonic() - killed_at[0] < ERROR_S * SLACK
    killer.join(10)


def test_a_stopped_worker_that_lets_the_ring_fill_up_is_named_after_the_step_timeout(
    open_executor: Callable[..., MultiprocExecutor],
) -> None:
    executor = load(open_executor("read_on", 2, step_timeout_s=0.5))
    victim = executor._group.workers[1].child.pid
    os.kill(victim, signal.SIGSTOP)
    wait_for(lambda: is_stopped(victim), 10.0, "a stopped worker")
    begin = time.monotonic()
    with pytest.raises(
        WorkerStalled, match=rf"^worker 1 \(pid {victim}\) .* step_timeout_s=0.5: .* stopped \(SIGSTOP\)"
    ):
        submit_until_the_ring_is_full(executor)
    assert 0.5 <= time.monotonic() - begin < 0.5 + ERROR_S * SLACK
