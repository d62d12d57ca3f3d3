"""Who holds a step up: found on the status pages, said in words, and asked for its Python stack.

Runs in: driver.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from zmqexec.bus.status import DUMP_SIGNAL, Phase, WorkerStatus
from zmqexec.errors import WorkerStalled
from zmqexec.executor.spawn import Worker

REPEAT_FACTOR = 2.0
"""Each warning about a step comes after this times as long as the one before."""


class StallWatch:
    """Watches one wait for a reply after another, for whoever waits: it has no thread.

    due  when to call `warn` instead of waiting on; never, with a `warning_s` of 0

    `status` reads a rank's entry on the status page.
    """

    def __init__(
        self, workers: Sequence[Worker], status: Callable[[int], WorkerStatus], warning_s: float, step_timeout_s: float
    ) -> None:
        self._workers = workers
        self._status = status
        self._warning_s = warning_s
        self._step_timeout_s = step_timeout_s
        self._begin = 0.0
        self._next_s = 0.0
        self.due = float("inf")

    def begin(self, now: float) -> None:
        """A wait begins."""
        self._begin = now
        self._next_s = self._warning_s
        self.due = now + self._warning_s if self._warning_s else float("inf")

    def warn(self, step_id: int) -> None:
        """Say on stderr what step `step_id` waits for, and make the rank that holds it up write its stack there too."""
        waited_s = time.monotonic() - self._begin
        self._next_s *= REPEAT_FACTOR
        self.due = self._begin + self._next_s
        culprit = self._culprit(step_id)
        can_answer = not is_stopped(culprit.child.pid)
        line = (
            f"(driver pid {os.getpid()}) warning: no reply to step {step_id} for {waited_s:.1f} s: "
            f"{self._explain(culprit, step_id)} The step fails after step_timeout_s={self._step_timeout_s:g}."
            + (f" The Python stack of worker {culprit.rank} follows." if can_answer else "")
        )
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # nobody may be reading it
                print(line, file=sys.stderr, flush=True)
        if can_answer:
            with contextlib.suppress(OSError):  # it has died since
                culprit.child.send_signal(DUMP_SIGNAL)

    def error(self, step_id: int) -> WorkerStalled:
        """The end of the driver's patience."""
        culprit = self._culprit(step_id)
        return WorkerStalled(
            f"worker {culprit.rank} (pid {culprit.child.pid}) did not finish step {step_id} within "
            f"step_timeout_s={self._step_timeout_s}: {self._explain(culprit, step_id)}"
            + (f"\nIts last output:\n{culprit.log_tail}" if culprit.log_tail else ""),
            culprit.rank,
        )

    def _culprit(self, step_id: int) -> Worker:
        """A stopped process, else a rank that waits for nobody, else the one that is the furthest behind."""

        def suspicion(worker: Worker) -> tuple[bool, bool, int]:
            status = self._status(worker.rank)
            waits = status.phase == Phase.COLLECTIVE or _has_finished(status, step_id)
            return not is_stopped(worker.child.pid), waits, status.step_id

        return min(self._workers, key=suspicion)

    def _explain(self, culprit: Worker, step_id: int) -> str:
        """What every rank is doing, in sentences."""
        text = f"worker {culprit.rank} (pid {culprit.child.pid}) is in {self._status(culprit.rank).where()}."
        if is_stopped(culprit.child.pid):
            text += " Its process is stopped (SIGSTOP); SIGCONT continues it."
        others = "; ".join(self._meanwhile(worker, step_id) for worker in self._workers if worker is not culprit)
        return text + (f" Meanwhile {others}." if others else "")

    def _meanwhile(self, worker: Worker, step_id: int) -> str:
        status = self._status(worker.rank)
        if is_stopped(worker.child.pid):
            doing = "is stopped too"
        elif status.phase == Phase.COLLECTIVE:
            doing = "waits for its peers in a collective"
        elif _has_finished(status, step_id):
            doing = "has finished the step and waits for the next"
        else:
            doing = "has not finished either"
        return f"worker {worker.rank} {doing} ({status.where()})"


def _has_finished(status: WorkerStatus, step_id: int) -> bool:
    return status.phase == Phase.IDLE and status.step_id >= step_id


def is_stopped(pid: int) -> bool:
    """True for a process in state T (SIGSTOP). Format: proc(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False
