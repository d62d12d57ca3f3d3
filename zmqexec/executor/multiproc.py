"""A worker process per rank, driven over the shared-memory bus.

Runs in: driver.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from zmqexec.bus.extension import BUILD_ID
from zmqexec.bus.memory import shared_file
from zmqexec.bus.status import Phase, WorkerStatus
from zmqexec.bus.transport import open_driver_channel
from zmqexec.child import PACKAGE_DIR
from zmqexec.config import EngineConfig
from zmqexec.errors import (
    BusClosed,
    BusTimeout,
    EngineClosed,
    StartupError,
    UserError,
    WorkerDied,
    WorkerFailed,
    ZmqexecError,
    from_info,
)
from zmqexec.executor.base import CAPTURING, LOADING, Progress
from zmqexec.executor.spawn import Worker, WorkerGroup
from zmqexec.executor.stall import StallWatch
from zmqexec.protocol import (
    CacheReady,
    CaptureProgress,
    EngineStats,
    Failure,
    Hello,
    InitCache,
    LoadModel,
    LoadProgress,
    ModelLoaded,
    StepInput,
    StepOutput,
    ToDriver,
)
from zmqexec.version import __version__

ROOT_CAUSE_GRACE_S = 0.5
"""A rank that fails inside a collective usually fails because a peer did: how long to wait for the peer's own news."""

Reply = TypeVar("Reply", Hello, ModelLoaded, CacheReady)


class MultiprocExecutor:
    """`tensor_parallel_size` workers, one bus, one watcher thread.

    Rank 0 answers steps; the others speak up only at start-up and when they fail.
    """

    def __init__(self, config: EngineConfig, epoch: int = 0) -> None:
        self._config = config
        self._epoch = epoch
        self._outstanding: deque[int] = deque()
        self._early: deque[tuple[int, ToDriver]] = deque()
        """Replies that came while we waited to publish."""
        self._close_lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._is_closed = False
        self.stale_replies = self._wrong_epoch_replies = 0
        try:
            self._open()
        except OSError as error:
            raise StartupError(f"the workers cannot be started: {error}") from error

    def _open(self) -> None:
        """Open the bus and start the workers. What is opened last is closed first: the workers leave with the bus."""
        tp_size = self._config.tensor_parallel_size
        with contextlib.ExitStack() as opened:
            self._store_fd = shared_file("zmqexec-rendezvous")
            opened.callback(os.close, self._store_fd)
            self._group = WorkerGroup(on_death=lambda: self._channel.wake())
            opened.callback(self._group.close)
            self._channel = open_driver_channel(
                tp_size,
                epoch=self._epoch,
                transport=self._config.transport,
                ring_bytes=self._config.ring_bytes,
                wait_policy=self._config.wait_policy,
                has_checksums=self._config.bus_checksums,
                name=self._config.engine_name,
            )
            opened.callback(self._channel.close)
            for rank in range(tp_size):
                arguments = {
                    "rank": rank,
                    "tp_size": tp_size,
                    "epoch": self._epoch,
                    "join_timeout_s": self._config.start_timeout_s,
                    # Clearly longer than the driver's own patience: who holds a step up, the driver can tell, and a
                    # rank that waits for its peers cannot.
                    "collective_timeout_s": 2 * self._config.step_timeout_s + 1.0,
                }
                bus_arguments, bus_fds = self._channel.attachment(rank)
                self._group.spawn(rank, arguments | bus_arguments, {**bus_fds, "store_fd": self._store_fd})
            self._group.watch()
            self._stall = StallWatch(
                self._group.workers,
                self._status,
                self._config.stall_warning_s or 0.0,
                self._config.step_timeout_s,
            )
            self._opened = opened.pop_all()

    # ── start-up ────────────────────────────────────────────────────────────────────────────────────────────────────

    def load(self, load: LoadModel, on_progress: Progress) -> int:
        """Handshake with all workers and load their shards; bytes for the KV cache, the least of all ranks."""
        on_progress("starting workers", 0, 0)
        for hello in self._replies_of_all(Hello, on_progress):
            self._check_hello(hello)
        self._publish(load)
        return min(reply.kv_cache_bytes for reply in self._replies_of_all(ModelLoaded, on_progress))

    def init_cache(self, num_blocks: int, on_progress: Progress) -> None:
        """Allocate the KV cache on all ranks and capture their CUDA graphs."""
        self._publish(InitCache(self._epoch, num_blocks))
        self._replies_of_all(CacheReady, on_progress)

    def _replies_of_all(self, kind: type[Reply], on_progress: Progress) -> list[Reply]:
        """One reply of type `kind` from every rank, within the start-up deadline."""
        deadline = time.monotonic() + self._config.start_timeout_s
        replies: dict[int, Reply] = {}
        progress: dict[int, LoadProgress | CaptureProgress] = {}
        while len(replies) < len(self._group.workers):
            received = self._receive(deadline)
            if received is None:
                silent = [worker for worker in self._group.workers if worker.rank not in replies]
                raise StartupError(
                    f"no {kind.__name__} from worker {silent[0].rank} (pid {silent[0].child.pid}) within "
                    f"start_timeout_s={self._config.start_timeout_s}: {self._where(silent[0])}"
                )
            rank, message = received
            if isinstance(message, LoadProgress | CaptureProgress):
                progress[rank] = message
                reported = progress.values()
                total = max(p.total for p in reported) * len(self._group.workers)
                what = LOADING if isinstance(message, LoadProgress) else CAPTURING
                on_progress(what, sum(p.done for p in reported), total)
            elif isinstance(message, kind):
                replies[rank] = message
            else:
                self.stale_replies += 1
        return [replies[rank] for rank in sorted(replies)]

    def _check_hello(self, hello: Hello) -> None:
        """A worker must run the very files that the driver runs."""
        ours = (str(PACKAGE_DIR), __version__, BUILD_ID)
        theirs = (hello.package_dir, hello.version, hello.build_id)
        if ours != theirs:
            raise StartupError(f"worker {hello.rank} runs other files: {theirs}, the driver runs {ours}")

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, step: StepInput) -> None:
        """Publish a step to all ranks."""
        self._publish(step)
        self._outstanding.append(step.step_id)

    def collect(self) -> StepOutput:
        """Rank 0's answer to the oldest outstanding step."""
        begin = time.monotonic()
        deadline = begin + self._config.step_timeout_s
        self._stall.begin(begin)
        while True:
            received = self._receive(min(deadline, self._stall.due))
            if received is None:
                if time.monotonic() >= deadline:
                    raise self._stall.error(self._outstanding[0])
                self._stall.warn(self._outstanding[0])
                continue
            rank, message = received
            if isinstance(message, StepOutput) and rank == 0 and message.step_id == self._outstanding[0]:
                self._outstanding.popleft()
                return message
            self.stale_replies += 1

    def check(self) -> None:
        """Raise if a worker failed or died."""
        self._check_open()
        self._raise_if_dead()

    @property
    def wrong_epoch_replies(self) -> int:
        """Those that reached us, and those that the transport dropped."""
        return self._wrong_epoch_replies + self._channel.stale

    def show(self, stats: EngineStats) -> None:
        """Leave the engine's figures on the status page."""
        with contextlib.suppress(BusClosed):  # by another thread, just now
            self._channel.set_gauges(stats)

    @property
    def death_fd(self) -> int | None:
        """Readable once a worker has died."""
        return self._group.death_fd

    def _publish(self, message: LoadModel | InitCache | StepInput) -> None:
        self._check_open()
        self._stall.begin(time.monotonic())
        try:
            self._channel.publish(message, self._config.step_timeout_s, check=self._check_while_publishing)
        except BusTimeout as error:
            raise self._stall.error(getattr(message, "step_id", -1)) from error
        except BusClosed:
            self._check_open()  # closed by another thread
            raise

    def _check_while_publishing(self) -> None:
        """A worker that waits to deliver a large reply would never take our large message: take its reply first."""
        while (received := self._channel.try_receive()) is not None:
            self._early.append(received)
        self.check()
        if self._outstanding and time.monotonic() >= self._stall.due:
            self._stall.warn(self._outstanding[0])

    def _receive(self, deadline: float) -> tuple[int, ToDriver] | None:
        """The next reply of this epoch; None at the deadline. Failures and deaths are raised."""
        while True:
            self._check_open()
            received = self._early.popleft() if self._early else self._wait_for_reply(deadline)
            if received is None:
                if time.monotonic() >= deadline:
                    return None
                continue
            rank, message = received
            if message.epoch != self._epoch:
                self._wrong_epoch_replies += 1
            elif isinstance(message, Failure):
                raise self._root_cause(rank, message)
            else:
                return received

    def _wait_for_reply(self, deadline: float) -> tuple[int, ToDriver] | None:
        """A reply as it comes; None at the deadline or when the watcher wakes us. A death is raised."""
        try:
            received = self._channel.try_receive()
            if received is None:
                self._raise_if_dead()
                received = self._channel.receive(max(0.0, deadline - time.monotonic()))
        except BusClosed:
            self._check_open()  # closed by another thread
            raise
        return received

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineClosed("the engine has been closed")

    # ── what went wrong ─────────────────────────────────────────────────────────────────────────────────────────────

    def _raise_if_dead(self) -> None:
        """Raise for a dead worker; its own last message, if it left one, says more than its exit code."""
        if self._group.dead():
            raise self._explain(self._failures(until=lambda found: False, grace_s=0.0))

    def _root_cause(self, rank: int, failure: Failure) -> ZmqexecError:
        """The error to report for a failure: a peer's own, if the rank only failed because it waited for the peer."""
        if failure.phase != Phase.COLLECTIVE.name:
            return _failed(rank, failure)

        def is_explained(found: dict[int, Failure]) -> bool:
            peers_failed = any(other.phase != Phase.COLLECTIVE.name for other in found.values())
            return peers_failed or any(worker.rank not in {rank, *found} for worker in self._group.dead())

        return self._explain({rank: failure} | self._failures(until=is_explained, grace_s=ROOT_CAUSE_GRACE_S))

    def _explain(self, failures: dict[int, Failure]) -> ZmqexecError:
        """The error that all of this comes from: an exception outside a collective, else a death without a word."""
        for rank, failure in failures.items():
            if failure.phase != Phase.COLLECTIVE.name:
                return _failed(rank, failure)
        for worker in self._group.dead():
            if worker.rank not in failures:
                return self._died(worker)
        return _failed(*next(iter(failures.items())))

    def _failures(self, until: Callable[[dict[int, Failure]], bool], grace_s: float) -> dict[int, Failure]:
        """Failures that arrive within `grace_s`, or before `until` is satisfied, by rank."""
        found: dict[int, Failure] = {}
        deadline = time.monotonic() + grace_s
        while not until(found):
            received = self._early.popleft() if self._early else self._channel.try_receive()
            if received is None:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                received = self._channel.receive(remaining)
            if received is not None and isinstance(received[1], Failure) and received[1].epoch == self._epoch:
                found[received[0]] = received[1]
        return found

    def _died(self, worker: Worker) -> WorkerDied:
        worker.child.wait(1.0)  # it has ended, but the watcher may be reaping it just now
        return WorkerDied.of(
            worker.rank, worker.child.pid, worker.child.exit_code(), f"in {self._where(worker)}", worker.log_tail
        )

    def _where(self, worker: Worker) -> str:
        """What the status page says about a rank."""
        return self._status(worker.rank).where()

    def _status(self, rank: int) -> WorkerStatus:
        try:
            return self._channel.status(rank)
        except BusClosed:
            self._check_open()  # closed by another thread
            raise

    # ── end ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Tell the workers to leave, end those that do not, release everything."""
        with self._close_lock:
            if self._is_closed or os.getpid() != self._owner_pid:
                return  # a fork of the user's process must not end its parent's workers
            self._is_closed = True
        self._opened.close()


def _failed(rank: int, failure: Failure) -> ZmqexecError:
    """A rank's exception as an error here: the caller's own mistake keeps its class, the rest is a `WorkerFailed`."""
    error = from_info(failure.error.kind, failure.error.message, failure.error.param)
    if isinstance(error, UserError):
        return error
    step = f" of step {failure.step_id}" if failure.step_id >= 0 else ""
    return WorkerFailed(f"worker {rank} failed in phase {failure.phase}{step}: {failure.error.message}", rank)
