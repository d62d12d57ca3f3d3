"""The driver's loop, with an executor that needs no processes: what an interruption or an error in a step leaves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import pytest

from tests.fakes import FakeWorker, generate
from zmqexec import EngineClosed, EngineConfig, InternalError, SamplingParams, ZmqexecError
from zmqexec.driver import step
from zmqexec.driver.plan import make_plan
from zmqexec.driver.step import Driver
from zmqexec.protocol import EngineStats, LoadModel, NewRequest, StepInput, StepOutput, pack

CONFIG = EngineConfig(max_model_len=64, max_num_seqs=4, block_size=4, kv_cache_memory_bytes=1 << 20)
PROMPT = [1, 2, 3, 4, 5]
EXPECTED = generate(PROMPT, 10)


class FakeExecutor:
    """Answers with the tokens of `FakeWorker`. `before_submit` and `before_collect` may raise."""

    death_fd = None
    stale_replies = 3
    wrong_epoch_replies = 4

    def __init__(self) -> None:
        self.before_submit: Callable[[], None] = lambda: None
        self.before_collect: Callable[[], None] = lambda: None
        self.is_closed = False
        self.shown: list[EngineStats] = []
        self._worker = FakeWorker(0, CONFIG.block_size)
        self._outputs: deque[StepOutput] = deque()

    def load(self, message: LoadModel, on_progress: object) -> int:
        return CONFIG.kv_cache_memory_bytes or 0

    def init_cache(self, num_blocks: int, on_progress: object) -> None:
        self._worker = FakeWorker(num_blocks, CONFIG.block_size)

    def submit(self, message: StepInput) -> None:
        self.before_submit()
        self._outputs.append(self._worker.run(message))

    def collect(self) -> StepOutput:
        self.before_collect()
        return self._outputs.popleft()

    def check(self) -> None:
        pass

    def show(self, stats: EngineStats) -> None:
        self.shown.append(stats)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> FakeExecutor:
    executor = FakeExecutor()
    monkeypatch.setattr(step, "make_executor", lambda config: executor)
    return executor


@pytest.fixture
def driver(executor: FakeExecutor) -> Driver:
    return Driver(make_plan(CONFIG))


def add(driver: Driver) -> None:
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    driver.add(NewRequest("r", pack(PROMPT), params))


def finish(driver: Driver) -> list[int]:
    tokens: list[int] = []
    for _ in range(100):
        if not driver.has_unfinished:
            return tokens
        for update in driver.step():
            tokens += update.token_ids
    raise AssertionError("100 steps did not finish 10 tokens")


def raise_once(error: BaseException) -> Callable[[], None]:
    errors = [error]

    def trigger() -> None:
        if errors:
            raise errors.pop()

    return trigger


def test_ctrl_c_while_waiting_for_a_reply_loses_nothing(driver: Driver, executor: FakeExecutor) -> None:
    add(driver)
    driver.step()
    executor.before_collect = raise_once(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        driver.step()
    assert finish(driver) == EXPECTED
    assert driver.error is None and not executor.is_closed


def test_ctrl_c_in_the_middle_of_a_step_closes_the_driver_and_says_so(driver: Driver, executor: FakeExecutor) -> None:
    add(driver)
    driver.step()
    executor.before_submit = raise_once(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        driver.step()
    assert executor.is_closed
    with pytest.raises(EngineClosed, match="KeyboardInterrupt in the middle of a step"):
        driver.step()


@pytest.mark.parametrize("moment", ["before_submit", "before_collect"])
def test_an_unexpected_error_in_a_step_closes_the_driver(driver: Driver, executor: FakeExecutor, moment: str) -> None:
    add(driver)
    setattr(executor, moment, raise_once(TypeError("cannot encode")))
    with pytest.raises(TypeError):
        finish(driver)
    assert executor.is_closed
    with pytest.raises(InternalError, match="TypeError in the driver: cannot encode"):
        driver.step()


def test_an_error_of_the_executor_is_raised_by_every_later_call(driver: Driver, executor: FakeExecutor) -> None:
    add(driver)
    error = ZmqexecError("a worker died")
    executor.before_collect = raise_once(error)
    with pytest.raises(ZmqexecError, match="a worker died"):
        finish(driver)
    for call in (driver.step, driver.check, lambda: add(driver)):
        with pytest.raises(ZmqexecError) as raised:
            call()
        assert raised.value is error


def test_the_engines_figures_are_shown_when_work_ends_and_at_most_every_few_milliseconds_before(
    driver: Driver, executor: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic() + 1.0
    monkeypatch.setattr(step.time, "monotonic", lambda: now)
    executor.shown.clear()
    add(driver)
    driver.step()
    for _ in range(3):
        driver.step()
    assert len(executor.shown) == 1, "the clock stood still"
    assert executor.shown[0].num_running == 1
    now += 2 * step.SHOW_EVERY_S
    driver.step()
    assert len(executor.shown) == 2
    finish(driver)
    assert len(executor.shown) == 3
    last = executor.shown[-1]
    assert (last.num_running, last.generation_tokens, last.prompt_tokens) == (0, 10, len(PROMPT))
    assert (last.stale_replies, last.wrong_epoch_replies) == (3, 4)
    assert last == driver.stats


def test_an_abort_shows_too(driver: Driver, executor: FakeExecutor) -> None:
    add(driver)
    driver.abort(["r"])
    driver.step()
    assert executor.shown[-1].num_waiting == 0


def test_figures_are_there_before_the_first_step(driver: Driver, executor: FakeExecutor) -> None:
    assert executor.shown[-1].num_blocks > 0
