"""The second thread of a worker on a GPU: it waits for the device and sends what it sampled.

Runs in: worker. The main thread launches steps and never waits for them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

from zmqexec.protocol import StepOutput

STOP_TIMEOUT_S = 2.0
"""A thread that waits for a device that hangs is left behind: the process ends anyway."""


class PeerMissing(RuntimeError):
    """A collective on the device gave up on a peer; what the step computed is worth nothing."""


class Pending(Protocol):
    """A step that has been launched."""

    def result(self) -> StepOutput:
        """Wait for it. PeerMissing: there will be no result."""


class OutputThread:
    """Calls `on_start`, then `deliver` for every step put in, in order, and `on_idle` when that was the last one.

    `on_idle` is never called while a step is launched. The first exception goes to `on_error` and ends the thread.
    """

    def __init__(
        self,
        deliver: Callable[[Pending], None],
        on_error: Callable[[BaseException], None],
        on_idle: Callable[[], None] = lambda: None,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._deliver = deliver
        self._on_error = on_error
        self._on_idle = on_idle
        self._on_start = on_start
        self._lock = threading.Lock()
        self._steps: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._num_put = self._num_delivered = 0
        self._thread = threading.Thread(target=self._run, name="zmqexec-outputs", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a step is being launched or has not been delivered yet."""
        return self._num_put > self._num_delivered

    def put(self, launch: Callable[[], Pending]) -> None:
        """Launch a step, here, and hand it over."""
        with self._lock:
            self._num_put += 1
        self._steps.put(launch())

    def stop(self) -> None:
        """Deliver what was put in, then end; waits for that at most `STOP_TIMEOUT_S`."""
        self._steps.put(None)
        self.join(STOP_TIMEOUT_S)

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended, at most `timeout_s`."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._on_start()
            while (pending := self._steps.get()) is not None:
                self._deliver(pending)
                with self._lock:
                    self._num_delivered += 1
                    if not self.is_busy:
                        self._on_idle()
        except BaseException as error:
            self._on_error(error)
