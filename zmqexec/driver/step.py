"""The driver: the loop that turns requests into steps and steps into tokens.

Runs in: driver. Knows token ids only; text belongs to the front ends (`engine.py`, `async_engine.py`).

The life of a request: `add` → the scheduler's queue → admitted to a slot → rows of steps (`Scheduler.schedule`) →
`Executor.submit` publishes each step, `Executor.collect` brings what it sampled → `Scheduler.update` → `RequestUpdate`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

import msgspec

from zmqexec.driver.plan import Plan
from zmqexec.driver.scheduler import ScheduledStep, Scheduler
from zmqexec.errors import EngineClosed, InternalError, ZmqexecError
from zmqexec.executor.base import Executor, Progress, make_executor
from zmqexec.protocol import EngineInfo, EngineStats, NewRequest, RequestUpdate

SHOW_EVERY_S = 0.005
"""How often the engine's figures are shown to observers, at most: it costs 1.5 µs (Zen 4)."""


class Driver:
    """Scheduler and executor of one engine. Not thread-safe, but `close` may come from any thread.

    After an `ExecutorError`, or any other error in a step, the driver is closed: `error` keeps it, and every later call
    raises it again. Ctrl-C while the workers compute does no harm; in the moments between, it closes the driver too.
    """

    def __init__(self, plan: Plan, on_progress: Progress = lambda what, done, total: None) -> None:
        config = plan.config
        self._run_ahead = config.run_ahead
        self._outstanding: deque[ScheduledStep] = deque()
        self._is_closed = False
        self.error: ZmqexecError | None = None
        self._executor: Executor = make_executor(config)
        try:
            kv_cache_bytes = self._executor.load(plan.load_message(epoch=0), on_progress)
            num_blocks = plan.num_blocks(kv_cache_bytes)
            self._executor.init_cache(num_blocks, on_progress)
        except BaseException:
            self._executor.close()
            raise
        self._scheduler = Scheduler(
            config,
            num_blocks,
            plan.max_model_len,
            list(plan.model.eos_token_ids),
            longest_shared_prompt=plan.longest_shared_prompt,
        )
        self.info = _info(plan, num_blocks)
        self._shown = 0.0
        self._show()

    @property
    def has_unfinished(self) -> bool:
        """True while there is something for `step` to do."""
        return self._scheduler.has_unfinished

    @property
    def num_outstanding(self) -> int:
        """Steps published and not collected."""
        return len(self._outstanding)

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters of this moment."""
        return msgspec.structs.replace(
            self._scheduler.stats,
            stale_replies=self._executor.stale_replies,
            wrong_epoch_replies=self._executor.wrong_epoch_replies,
        )

    @property
    def death_fd(self) -> int | None:
        """Becomes readable when a worker dies: for a caller that waits for requests meanwhile."""
        return self._executor.death_fd

    def add(self, request: NewRequest) -> None:
        """Queue a request that the front end has checked."""
        self._check_open()
        self._scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests early; unknown ids are ignored."""
        for request_id in request_ids:
            self._scheduler.abort(request_id)

    def step(self) -> list[RequestUpdate]:
        """One turn: publish the next step; collect the oldest once more than `run_ahead` are outstanding.

        Returns without waiting while the workers still have fewer steps than that, so an empty list does not mean
        that nothing will come: `has_unfinished` tells.
        """
        self._check_open()
        agree = False  # whether scheduler and workers would agree, were this step interrupted now
        try:
            scheduled = self._scheduler.schedule()
            if scheduled is not None:
                self._executor.submit(scheduled.message)
                self._outstanding.append(scheduled)
                if len(self._outstanding) <= self._run_ahead:
                    return self._scheduler.take_aborted()
            if not self._outstanding:
                self._show()
                return self._scheduler.take_aborted()
            agree = True  # a wait for a reply may be interrupted and begun again
            output = self._executor.collect()
            agree = False
            updates = self._scheduler.update(self._outstanding.popleft(), output)
            if not self._scheduler.has_requests or time.monotonic() - self._shown >= SHOW_EVERY_S:
                self._show()
            return updates
        except ZmqexecError as error:
            self._fail(error)
            raise
        except Exception as error:
            self._fail(InternalError(f"{type(error).__name__} in the driver: {error}"))
            raise
        except BaseException as error:
            if not agree:
                self._fail(EngineClosed(f"{type(error).__name__} in the middle of a step: the engine has been closed"))
            raise

    def check(self) -> None:
        """Raise if a worker has failed; never waits."""
        self._check_open()
        try:
            self._executor.check()
        except ZmqexecError as error:
            self._fail(error)
            raise

    def _show(self) -> None:
        """Let others see how the engine stands. The last step of a batch is always shown."""
        self._executor.show(self.stats)
        self._shown = time.monotonic()

    def _fail(self, error: ZmqexecError) -> None:
        self.error = error
        self.close()

    def _check_open(self) -> None:
        if self.error is not None:
            raise self.error
        if self._is_closed:
            raise EngineClosed("the engine has been closed")

    def close(self) -> None:
        """End the workers. Idempotent; open requests are forgotten."""
        self._is_closed = True
        self._executor.close()


def _info(plan: Plan, num_blocks: int) -> EngineInfo:
    return EngineInfo(
        model_dir=str(plan.model_dir),
        max_model_len=plan.max_model_len,
        vocab_size=plan.model.vocab_size,
        num_blocks=num_blocks,
        block_size=plan.config.block_size,
        device=plan.device,
        dtype=plan.dtype,
        eos_token_ids=list(plan.model.eos_token_ids),
    )
