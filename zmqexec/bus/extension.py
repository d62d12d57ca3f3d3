"""What every process needs of the C extension, and what stands in for it on platforms that have none.

Runs in: driver | worker.

Elsewhere than on Linux there is neither memfd nor futex: the bus runs over ZeroMQ, and a thread of Python's watches for
the driver's death, which takes effect as soon as it gets the GIL.
"""

from __future__ import annotations

import os
import select
import threading

try:
    from zmqexec import _bus
except ImportError:
    BUILD_ID = "none"
else:
    BUILD_ID = _bus.BUILD_ID

LOOK_S = 1.0
"""How often the stand-in looks who its parent is: a fork of the driver may keep the pipe open."""


def arm_death_watch(parent_pid: int, lifeline_fd: int) -> None:
    """End this process (`_exit(1)`) when its parent has exited or the pipe `lifeline_fd` has hung up; once per process.

    Ends it at once if `parent_pid` is not its parent (any more). BusError: it cannot be armed.
    """
    if BUILD_ID != "none":
        _bus.arm_death_watch(parent_pid, lifeline_fd)
        return
    thread = threading.Thread(
        target=_watch, args=[parent_pid, os.dup(lifeline_fd)], name="zmqexec-death-watch", daemon=True
    )
    thread.start()


def _watch(parent_pid: int, lifeline_fd: int) -> None:
    while os.getppid() == parent_pid and not select.select([lifeline_fd], [], [], LOOK_S)[0]:
        pass
    os._exit(1)
