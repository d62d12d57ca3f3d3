"""What an executor is: the driver's view of the workers, and the one place that chooses which kind it gets.

Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from zmqexec.config import EngineConfig
from zmqexec.protocol import EngineStats, LoadModel, StepInput, StepOutput

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total) while starting; total 0 means unknown."""

LOADING = "loading weights"
CAPTURING = "capturing CUDA graphs"


class Executor(Protocol):
    """The workers of one engine, as one object. After an `ExecutorError`, which any call may raise, only `close` works.

    Steps are answered in the order of submission; several may be outstanding.
    """

    def load(self, load: LoadModel, on_progress: Progress) -> int:
        """Load the model on all ranks; bytes that each of them can spend on its KV cache (the least of all)."""

    def init_cache(self, num_blocks: int, on_progress: Progress) -> None:
        """Allocate the KV cache on all ranks and capture their CUDA graphs."""

    def submit(self, step: StepInput) -> None:
        """Hand a step to all ranks. Waits only while the workers are a whole ring behind."""

    def collect(self) -> StepOutput:
        """The result of the oldest step that has not been collected; waits for it up to the step timeout."""

    def check(self) -> None:
        """Raise if a worker failed since the last call; never waits."""

    @property
    def death_fd(self) -> int | None:
        """A file descriptor that becomes readable when a worker dies, for whoever waits on something else."""

    @property
    def stale_replies(self) -> int:
        """Replies that matched no outstanding step and were dropped."""

    @property
    def wrong_epoch_replies(self) -> int:
        """Replies of another epoch, dropped too."""

    def show(self, stats: EngineStats) -> None:
        """Leave the engine's figures where `zmqexec-top` and others who watch from outside find them. Never waits."""

    def close(self) -> None:
        """End all workers and release everything. Idempotent, from any thread."""


def make_executor(config: EngineConfig) -> Executor:
    """The executor that `config.executor` names; auto is multiproc at every world size."""
    if config.executor == "inline":
        from zmqexec.executor.inline import InlineExecutor

        return InlineExecutor(config)
    from zmqexec.executor.multiproc import MultiprocExecutor

    return MultiprocExecutor(config)
