"""The interface of a transport, and what all of them need around it: processes, CPU clocks, places to run.

Runs in: driver | worker.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zmqexec.protocol import StepInput, StepOutput

TIMEOUT_S = 30.0
"""For every wait of a driver. A worker waits as long as its driver lives (`die_with_parent`)."""

IDLE_S = 3600.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """What a transport is opened with.

    num_readers   workers
    max_bytes     the largest message that will be sent
    scratch       a folder for its files
    options       what its entry in the registry says, and `wait_policy` if one was asked for
    has_cores     whether there is a core for each process
    """

    num_readers: int
    max_bytes: int
    scratch: Path
    options: dict[str, Any]
    has_cores: bool


class Unsupported(Exception):
    """This transport cannot do that; the message says why."""


class Peer:
    """The driver's end of a transport with its workers started: a message to all, and their replies."""

    pids: list[int]
    """Of the workers, by rank."""

    def round_trip(self, step: StepInput, num_replies: int) -> StepOutput:
        """Send `step` to all workers, await the replies of the first `num_replies` ranks and return one of them."""
        raise NotImplementedError

    def check(self, num_readers: int, num_replies: int) -> None:
        """Unsupported: if replies of some ranks only are not possible."""

    def close(self) -> None:
        """Ask the workers to leave. The benchmark kills who does not."""


def spawn(target: str, *arguments: object, fds: Iterable[int] = ()) -> subprocess.Popen[bytes]:
    """Start a Python process by exec that calls `target`, "module:function", with `arguments` and inherits `fds`."""
    command = [sys.executable, "-m", "bus_peers.worker", target, json.dumps(arguments)]
    return subprocess.Popen(command, pass_fds=tuple(fds), stdin=subprocess.DEVNULL, stdout=sys.stderr)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def cpu_ns(pid: int) -> int:
    """CPU time of a process so far, all its threads; 0 when it is gone."""
    try:
        if has_cpu_clocks():
            return time.clock_gettime_ns(_cpu_clock(pid))
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


@functools.cache
def has_cpu_clocks() -> bool:
    """Whether the CPU time of another process can be read exactly; otherwise `cpu_ns` counts ticks of 10 ms."""
    try:
        return time.clock_gettime_ns(_cpu_clock(os.getppid() or os.getpid())) > 0
    except OSError:
        return False


def _cpu_clock(pid: int) -> int:
    """Linux's clock id of another process, of the scheduler's kind."""
    return (~pid << 3) | 2


def process_tree(root: int) -> list[int]:
    """`root` and the processes below it, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # it has ended meanwhile
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def pin(pid: int, core: int) -> None:
    """Put every thread of a process on one core; threads that they start will run there too."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def cores_apart() -> list[int]:
    """The cores of the affinity mask, one of each physical core before their siblings, sockets one after another."""

    def place(core: int) -> tuple[int, int, int]:
        topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
        try:
            siblings = _cpu_list((topology / "thread_siblings_list").read_text())
            package = int((topology / "physical_package_id").read_text())
        except (OSError, ValueError):
            return 0, 0, core
        return siblings.index(core), package, core

    return sorted(os.sched_getaffinity(0), key=place)


def _cpu_list(text: str) -> list[int]:
    cores: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores.extend(range(int(first), int(last or first) + 1))
    return cores
