"""A worker process: attach to the bus, then do what the driver's messages say, until the bus closes.

Runs in: worker. Started by `executor/spawn.py` through `_entry.py`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zmqexec.bus.extension import BUILD_ID, arm_death_watch
from zmqexec.bus.status import DUMP_SIGNAL, Phase
from zmqexec.bus.transport import WorkerEnd, open_worker_channel
from zmqexec.child import PACKAGE_DIR
from zmqexec.errors import BusClosed, InternalError, UserError
from zmqexec.protocol import (
    CacheReady,
    CaptureProgress,
    ErrorInfo,
    Failure,
    Hello,
    InitCache,
    LoadModel,
    LoadProgress,
    ModelLoaded,
    StepInput,
)
from zmqexec.version import __version__
from zmqexec.worker.outputs import OutputThread, PeerMissing, Pending

if TYPE_CHECKING:
    from zmqexec.worker.collectives import Collectives
    from zmqexec.worker.gpu.runner import GpuRunner
    from zmqexec.worker.runner import ModelRunner

WAIT_S = 60.0
"""Longest single wait for a message; the loop then simply waits again."""

REPLY_TIMEOUT_S = 3600.0
"""A program may leave an engine alone for long before it takes the next result; if it dies, so do we."""

LAST_WORDS_S = 10.0
"""How long the output thread may take to hand over its last words."""

PROGRESS_STEPS = 50


def main(arguments: dict[str, Any]) -> None:
    """Run one rank. Never returns: the process ends here, without waiting for threads of libraries."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    arm_death_watch(arguments["parent_pid"], arguments["lifeline_fd"])
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL, all_threads=True, chain=False)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    channel = open_worker_channel(arguments, arguments["rank"], arguments["join_timeout_s"])
    if "bus_fd" in arguments:
        os.close(arguments["bus_fd"])  # the mapping stays
    exit_code = Worker(channel, arguments).run()
    channel.close()  # over ZeroMQ the last words may still be on their way
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


class Worker:
    """One rank: the worker's end of the bus, and the model once it is loaded."""

    def __init__(self, channel: WorkerEnd, arguments: dict[str, Any]) -> None:
        self._channel = channel
        self._arguments = arguments
        self._rank: int = arguments["rank"]
        self._epoch: int = arguments["epoch"]
        self._phase = Phase.STARTING
        self._step_id = -1
        self._runner: ModelRunner | GpuRunner | None = None
        self._outputs: OutputThread | None = None
        self._is_failing = False
        """The output thread has reported an error and is about to end the process."""

    def run(self) -> int:
        """Serve until the bus closes; the exit code. An exception is sent to the driver first."""
        try:
            self._serve()
        except BusClosed:
            return self._left()
        except BaseException as error:
            if self._channel.closed:
                # Peers that saw it first have left in the middle of a collective, and nobody asks for more.
                return self._left()
            traceback.print_exc()
            if self._outputs is not None:
                self._outputs.stop()
            self._report(error)
            return 1
        return 0

    def _left(self) -> int:
        """The exit code when the bus was closed. Where the output thread closed it, it is what ends this process."""
        if self._is_failing and self._outputs is not None:
            self._outputs.join(LAST_WORDS_S)
        return 0

    def _report(self, error: BaseException) -> None:
        """Tell the driver, which sees this process end in any case."""
        with contextlib.suppress(Exception):
            self._channel.set_error(repr(error))
        with contextlib.suppress(Exception):
            self._channel.reply(self._failure(error), REPLY_TIMEOUT_S)

    def _serve(self) -> None:
        hello = Hello(self._epoch, self._rank, os.getpid(), str(PACKAGE_DIR), __version__, BUILD_ID)
        self._channel.reply(hello, REPLY_TIMEOUT_S)
        while True:
            if self._outputs is None or not self._outputs.is_busy:
                self._set_phase(Phase.IDLE)
            message = self._channel.receive(WAIT_S)
            match message:
                case None:
                    continue
                case StepInput():
                    self._step(message)
                case LoadModel():
                    self._load(message)
                case InitCache():
                    self._set_phase(Phase.LOADING)
                    self._open_runner().init_cache(message.num_blocks, self._reporter(CaptureProgress))
                    self._channel.reply(CacheReady(self._epoch), REPLY_TIMEOUT_S)

    def _step(self, step: StepInput) -> None:
        runner = self._open_runner()
        if self._outputs is not None:

            def launch() -> Pending:
                self._begin(step)
                return runner.submit(step)  # type: ignore[union-attr]

            self._outputs.put(launch)
            return
        self._begin(step)
        output = runner.run(step)
        if self._rank == 0:
            self._set_phase(Phase.REPLYING)
            self._channel.reply(output, REPLY_TIMEOUT_S)

    def _begin(self, step: StepInput) -> None:
        self._step_id = step.step_id
        self._set_phase(Phase.PREFILL if step.prefills else Phase.DECODE)

    def _load(self, load: LoadModel) -> None:
        self._set_phase(Phase.LOADING)
        self._runner = self._make_gpu_runner(load) if load.device == "cuda" else self._make_cpu_runner(load)
        kv_cache_bytes = self._runner.load(self._reporter(LoadProgress))
        self._channel.reply(ModelLoaded(self._epoch, kv_cache_bytes), REPLY_TIMEOUT_S)

    def _reporter(self, kind: type[LoadProgress | CaptureProgress]) -> Callable[[int, int], None]:
        """Tells the driver of progress (done, total), at most `PROGRESS_STEPS` times on the way."""
        reported = -1

        def on_progress(done: int, total: int) -> None:
            nonlocal reported
            part = done * PROGRESS_STEPS // max(total, 1)
            if part > reported:
                reported = part
                self._channel.reply(kind(self._epoch, done, total), REPLY_TIMEOUT_S)

        return on_progress

    # torch is imported only now: it takes seconds, and the death watch and the bus must stand before.

    def _make_cpu_runner(self, load: LoadModel) -> ModelRunner:
        from zmqexec.worker.collectives import LocalCollectives
        from zmqexec.worker.runner import ModelRunner
        from zmqexec.worker.shared_memory import SharedMemoryCollectives

        arguments = self._arguments
        collectives: Collectives = LocalCollectives()
        if arguments["tp_size"] > 1:
            collectives = SharedMemoryCollectives(
                self._rank,
                arguments["tp_size"],
                arguments["store_fd"],
                arguments["collective_timeout_s"],
                join_timeout_s=arguments["join_timeout_s"],
            )
        return ModelRunner(load, collectives, on_phase=self._set_phase)

    def _make_gpu_runner(self, load: LoadModel) -> GpuRunner:
        from zmqexec.worker.gpu.collectives import GpuCollectives, LocalGpuCollectives
        from zmqexec.worker.gpu.device import CudaDevice
        from zmqexec.worker.gpu.runner import GpuRunner

        arguments = self._arguments
        device = CudaDevice(self._rank)
        collectives: GpuCollectives = LocalGpuCollectives()
        if arguments["tp_size"] > 1:
            from zmqexec.worker.gpu.nccl import NcclCollectives

            collectives = NcclCollectives(
                self._rank,
                arguments["tp_size"],
                arguments["store_fd"],
                arguments["collective_timeout_s"],
                join_timeout_s=arguments["join_timeout_s"],
                in_rank_order=load.config.deterministic,
            )
        # A new thread's device is GPU 0: a call of CUDA there may make every other rank a second context.
        self._outputs = OutputThread(
            self._deliver, self._fail_from_thread, lambda: self._set_phase(Phase.IDLE), device.use
        )
        return GpuRunner(load, collectives, device, on_phase=self._set_phase)

    def _deliver(self, pending: Pending) -> None:
        output = pending.result()
        if self._rank == 0:
            self._channel.reply(output, REPLY_TIMEOUT_S)

    def _fail_from_thread(self, error: BaseException) -> None:
        """The main thread may be waiting for a step that will never come, or for the device: end here."""
        if not isinstance(error, BusClosed) and not self._channel.closed:
            traceback.print_exception(error)
            self._report(error)
            self._is_failing = True  # the main thread shall not end the process first
            self._channel.close()  # over ZeroMQ the last words may still be on their way
            sys.stderr.flush()
            os._exit(1)

    def _open_runner(self) -> ModelRunner | GpuRunner:
        if self._runner is None:
            raise InternalError("a message that needs the model came before LoadModel")
        return self._runner

    def _set_phase(self, phase: Phase) -> None:
        self._phase = phase
        self._channel.set_status(phase, self._step_id)

    def _failure(self, error: BaseException) -> Failure:
        text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error)).rstrip()
        text = text.encode(errors="backslashreplace").decode()  # the name of a file may be no UTF-8
        info = ErrorInfo(type(error).__name__, text, error.param if isinstance(error, UserError) else None)
        # Where a peer is missing, its own news, if there is any, says more.
        phase = Phase.COLLECTIVE if isinstance(error, PeerMissing) else self._phase
        return Failure(self._epoch, self._step_id, phase.name, info)
