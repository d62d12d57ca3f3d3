"""One rank inside the driver's own process: for debugging, with a debugger or a profiler at hand.

Runs in: driver. The one executor that brings torch into the driver, and therefore never the default.
"""

from __future__ import annotations

import gc
from collections import deque
from typing import TYPE_CHECKING

from zmqexec.config import EngineConfig
from zmqexec.errors import InternalError
from zmqexec.executor.base import CAPTURING, LOADING, Progress
from zmqexec.protocol import EngineStats, LoadModel, StepInput, StepOutput

if TYPE_CHECKING:
    from zmqexec.worker.gpu.runner import GpuRunner
    from zmqexec.worker.runner import ModelRunner


class InlineExecutor:
    """Runs each step at once, in `submit`. An exception of the model reaches the caller as it is."""

    death_fd: int | None = None
    stale_replies = 0
    wrong_epoch_replies = 0

    def __init__(self, config: EngineConfig) -> None:
        from zmqexec.worker.collectives import LocalCollectives
        from zmqexec.worker.runner import ModelRunner

        def make_runner(load: LoadModel) -> ModelRunner | GpuRunner:
            if load.device == "cpu":
                return ModelRunner(load, LocalCollectives())
            from zmqexec.worker.gpu.collectives import LocalGpuCollectives
            from zmqexec.worker.gpu.device import CudaDevice
            from zmqexec.worker.gpu.runner import GpuRunner

            return GpuRunner(load, LocalGpuCollectives(), CudaDevice(0))

        self._make_runner = make_runner
        self._runner: ModelRunner | GpuRunner | None = None
        self._outputs: deque[StepOutput] = deque()

    def load(self, load: LoadModel, on_progress: Progress) -> int:
        """Load the whole model here; bytes for the KV cache."""
        self._runner = self._make_runner(load)
        return self._runner.load(lambda done, total: on_progress(LOADING, done, total))

    def init_cache(self, num_blocks: int, on_progress: Progress) -> None:
        """Allocate the KV cache and capture CUDA graphs."""
        self._open_runner().init_cache(num_blocks, lambda done, total: on_progress(CAPTURING, done, total))

    def submit(self, step: StepInput) -> None:
        """Run the step now."""
        self._outputs.append(self._open_runner().run(step))

    def collect(self) -> StepOutput:
        """The oldest result that has not been collected."""
        return self._outputs.popleft()

    def check(self) -> None:
        """There is no worker that could have died."""

    def show(self, stats: EngineStats) -> None:
        """There is no bus that anybody could look at."""

    def close(self) -> None:
        """Drop the model, whose memory torch then has for the next."""
        self._runner = None
        self._outputs.clear()
        gc.collect()  # a GPU's runner and its graphs refer to each other

    def _open_runner(self) -> ModelRunner | GpuRunner:
        if self._runner is None:
            raise InternalError("no model is loaded")
        return self._runner
