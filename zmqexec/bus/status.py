"""The status page: what each rank is doing, so that an error can name the rank, the phase and for how long.

Runs in: driver | worker | server.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from enum import IntEnum

from zmqexec.errors import ProtocolError

DUMP_SIGNAL = signal.SIGUSR2
"""Makes a worker write the Python stacks of all its threads to its output: what the status page cannot tell."""


class Phase(IntEnum):
    """What a rank is doing."""

    STARTING = 0
    LOADING = 1
    IDLE = 2
    PREFILL = 3
    DECODE = 4
    COLLECTIVE = 5
    SAMPLING = 6
    REPLYING = 7
    CLOSING = 8
    FAILED = 9


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One rank's entry, as last written by that rank.

    pid           0 before it attached
    step_id       -1 outside a step
    heartbeat_ns  CLOCK_MONOTONIC when the phase was set
    error         the beginning of its last error, or ""
    """

    rank: int
    pid: int
    phase: Phase
    step_id: int
    heartbeat_ns: int
    error: str

    @classmethod
    def of(cls, rank: int, pid: int, phase: int, step_id: int, heartbeat_ns: int, error: str) -> WorkerStatus:
        """The entry that `Segment.status` read. ProtocolError: no worker writes such a one."""
        try:
            return cls(rank, pid, Phase(phase), step_id, heartbeat_ns, error)
        except ValueError:
            raise ProtocolError(f"the status page of rank {rank} is damaged: it names phase {phase}") from None

    def where(self) -> str:
        """In words: `phase DECODE of step 17 for 3.2 s`."""
        if self.pid == 0:
            return f"phase {self.phase.name}, not yet attached to the bus"
        step = f" of step {self.step_id}" if self.step_id >= 0 else ""
        since_s = max(0.0, (time.monotonic_ns() - self.heartbeat_ns) / 1e9)
        error = f"; its last error: {self.error}" if self.error else ""
        return f"phase {self.phase.name}{step} for {since_s:.1f} s{error}"
