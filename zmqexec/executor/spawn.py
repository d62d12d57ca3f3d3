"""The worker processes of one executor: started, watched, listened to, ended.

Runs in: driver.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from zmqexec.child import Child

LOG_TAIL_LINES = 40
OPENMP_WAIT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""OpenMP's threads wait for each other asleep, after a spin of a few microseconds, unless the user says otherwise.

By default they spin through whole time slices beside other busy processes: one worker with 2 threads on 2 shared
Zen 4 cores then took 60 s for a batch, not 3. The short spin takes a fifth off a decode step on idle cores (64
sequences, 20 M parameters) and costs nothing beside a busy one; ten times as long, the stalls begin.
"""

EXIT_GRACE_S = 0.5
"""How long workers may take to leave by themselves after the bus was closed."""


class Worker:
    """One rank's process, its output, and how it ended.

    is_casualty  we killed it, because another worker had died
    """

    def __init__(self, rank: int, child: Child, output_fd: int) -> None:
        self.rank = rank
        self.child = child
        self.output_fd = output_fd
        self.is_dead = False
        self.is_casualty = False
        self._log: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._partial = b""

    @property
    def log_tail(self) -> str:
        """The last lines that the worker printed."""
        return "\n".join(self._log)

    def forward_output(self) -> bool:
        """Print what the worker wrote, each line with its rank and pid in front; False at the end of the stream."""
        data = os.read(self.output_fd, 65536)
        *lines, self._partial = (self._partial + data).split(b"\n")
        if not data and self._partial:
            lines.append(self._partial)
        for line in lines:
            text = line.decode(errors="replace")
            self._log.append(text)
            if sys.stderr is not None:
                # Nobody may be reading it any more, but this thread has more to do than to print.
                with contextlib.suppress(OSError, ValueError):
                    print(f"(rank {self.rank} pid {self.child.pid}) {text}", file=sys.stderr, flush=True)
        return bool(data)


class WorkerGroup:
    """All workers of an executor. A thread forwards their output and sees them die.

    A group cannot go on without one of its ranks: when the first dies, the thread kills the others. `on_death` is
    called from that thread for each worker that ends while the group is open.
    """

    def __init__(self, on_death: Callable[[], None]) -> None:
        self.workers: list[Worker] = []
        self._on_death = on_death
        with contextlib.ExitStack() as opened:
            self.death_fd, self._death_end = _pipe(opened)
            stop_fd, self._stop_end = _pipe(opened)
            self._selector = opened.enter_context(selectors.DefaultSelector())
            self._selector.register(stop_fd, selectors.EVENT_READ)
            self._opened = opened.pop_all()
        self._thread = threading.Thread(target=self._watch, name="zmqexec-watcher", daemon=True)
        self._is_closed = False

    def spawn(self, rank: int, arguments: dict[str, Any], fds: dict[str, int]) -> None:
        """Start the worker of `rank`. All of them are spawned before `watch`."""
        output_fd, child_end = os.pipe()
        try:
            child = Child("worker", arguments, fds=fds, output_fd=child_end, default_env=OPENMP_WAIT)
        except BaseException:
            os.close(output_fd)
            raise
        finally:
            os.close(child_end)
        worker = Worker(rank, child, output_fd)
        self.workers.append(worker)
        self._selector.register(output_fd, selectors.EVENT_READ, worker)
        self._selector.register(child.end_fd, selectors.EVENT_READ, worker)

    def watch(self) -> None:
        """Begin forwarding and watching."""
        self._thread.start()

    def dead(self) -> list[Worker]:
        """Workers that ended by themselves."""
        return [worker for worker in self.workers if worker.is_dead and not worker.is_casualty]

    def _watch(self) -> None:
        while True:
            for key, _ in self._selector.select():
                worker = key.data
                if worker is None:
                    return
                if key.fd == worker.output_fd:
                    if not worker.forward_output():
                        self._selector.unregister(key.fd)
                else:
                    self._selector.unregister(key.fd)
                    self._bury(worker)

    def _bury(self, worker: Worker) -> None:
        """The process has ended: take its last words from the pipe, then tell the driver."""
        os.set_blocking(worker.output_fd, False)
        try:
            while worker.forward_output():
                pass
        except BlockingIOError:
            pass  # a grandchild still holds the pipe
        worker.is_dead = True
        for other in self.workers:
            if not worker.is_casualty and other.child.exit_code() is None:
                other.is_casualty = True
                other.child.kill()
        os.write(self._death_end, b"\0")
        self._on_death()

    def close(self, grace_s: float = EXIT_GRACE_S) -> None:
        """End every worker, after `grace_s` by force, and the thread. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if threading.current_thread() is self._thread:
            # The garbage collector found a dropped engine while it happened to run in this thread, which cannot join
            # itself.
            threading.Thread(target=self._end, args=[grace_s], name="zmqexec-closer").start()
        else:
            self._end(grace_s)

    def _end(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        for worker in self.workers:
            if not worker.child.wait(max(0.0, deadline - time.monotonic())):
                worker.child.kill()
        os.write(self._stop_end, b"\0")
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        for worker in self.workers:
            worker.child.close()
            os.close(worker.output_fd)
        self._opened.close()


def _pipe(opened: contextlib.ExitStack) -> tuple[int, int]:
    """(reading end, writing end) of a pipe that `opened` closes. It is written a few bytes at most."""
    ends = os.pipe()
    for end in ends:
        opened.callback(os.close, end)
    return ends
