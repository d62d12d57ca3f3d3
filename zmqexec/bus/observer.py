"""Looking at a running engine's bus from outside: found through /proc, mapped read-only, without a word to the engine.

Runs in: server | a process of its own (`zmqexec-top`).

The segment has no name, but the driver holds its memfd open, and whoever may trace a process may open what it holds:
the same user, or root.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zmqexec import _bus
from zmqexec.bus.statistics import Snapshot
from zmqexec.errors import BusError

PROC = Path("/proc")
MEMFD_LINK = "/memfd:zmqexec-bus (deleted)"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """What the kernel says about a process. `state` is its letter in proc(5); Z and X are as good as gone."""

    pid: int
    state: str
    parent: int
    cpu_s: float

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """None where there is no such process."""
        try:
            # The name, in parentheses, may hold spaces and parentheses itself.
            fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
            return cls(pid, fields[0], int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS_PER_S)
        except (OSError, IndexError, ValueError):
            return None


class Observer:
    """A read-only view of one engine's bus. Whoever opens it closes it."""

    def __init__(self, pid: int, fd: int) -> None:
        """Open what process `pid` holds as `fd`. OSError: not to be had; BusError: no bus of this version."""
        self.pid = pid
        self.fd = fd
        self._pidfd = os.pidfd_open(pid)
        try:
            opened = os.open(PROC / str(pid) / "fd" / str(fd), os.O_RDONLY | os.O_CLOEXEC)
            try:
                self.inode = os.fstat(opened).st_ino
                self._segment = _bus.Segment.observe(opened)
            finally:
                os.close(opened)
        except BaseException:
            os.close(self._pidfd)
            raise
        self.name, self._driver_pid = self._segment.header()[:2]

    @property
    def is_drivers(self) -> bool:
        """Whether the process is the driver itself, and not a fork of it that holds the memfd too."""
        try:
            status = (PROC / str(self.pid) / "status").read_text(errors="replace")
        except OSError:
            return False
        # The driver wrote its pid as it sees it, which another one is outside its pid namespace.
        own = [int(line.split()[-1]) for line in status.splitlines() if line.startswith("NSpid:")]
        return (own or [self.pid]) == [self._driver_pid]

    @property
    def has_ended(self) -> bool:
        """Whether the engine was closed, or its driver has exited."""
        return self._segment.closed or self._pidfd in _readable([self._pidfd], 0.0)

    def wait(self, timeout_s: float, *fds: int) -> list[int]:
        """Wait until one of `fds` is readable, the driver has exited, or the deadline; those that are readable."""
        return [fd for fd in _readable([self._pidfd, *fds], timeout_s) if fd in fds]

    def snapshot(self) -> Snapshot:
        """How the engine stands now. Works also when it has ended: that is how it stood then."""
        return Snapshot.of(self._segment)

    def close(self) -> None:
        """Idempotent."""
        self._segment.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def engines_of(pid: int) -> list[Observer]:
    """The open engines whose driver is process `pid`, each to be closed by the caller.

    OSError: there is no such process, or it is none of ours. One engine that cannot be observed is left out, unless
    there is no other: then its BusError is raised.
    """
    found: list[Observer] = []
    problem: BusError | None = None
    with contextlib.ExitStack() as opened:
        for fd in _bus_fds(pid):
            try:
                observer = Observer(pid, fd)
            except FileNotFoundError:
                continue  # closed just now
            except BusError as error:
                problem = error
                continue
            is_new = observer.inode not in [other.inode for other in found]
            if is_new and observer.is_drivers and not observer.has_ended:
                opened.callback(observer.close)
                found.append(observer)
            else:
                observer.close()
        if problem is not None and not found:
            raise problem
        opened.pop_all()
    return found


def all_engines() -> list[Observer]:
    """The open engines of this user, in the order of their drivers' pids, each to be closed by the caller."""
    found: list[Observer] = []
    for pid in sorted(int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal()):
        with contextlib.suppress(OSError, BusError):  # it has ended just now, or speaks another layout
            if owner_of(pid) == os.geteuid():
                found += engines_of(pid)
    return found


def owner_of(pid: int) -> int:
    """The user that process `pid` runs as. FileNotFoundError: there is none."""
    return (PROC / str(pid)).stat().st_uid


def ancestors_of(pid: int) -> Iterator[int]:
    """The parent of a process, its parent, and so on."""
    process = Process.of(pid)
    while process is not None and process.parent > 0:
        yield process.parent
        process = Process.of(process.parent)


def _bus_fds(pid: int) -> list[int]:
    """File descriptors of `pid` that are a bus."""
    folder = PROC / str(pid) / "fd"
    fds = []
    for name in os.listdir(folder):  # noqa: PTH208  (servers have thousands, and a path object costs as much as the call)
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"{folder}/{name}") == MEMFD_LINK:  # noqa: PTH115
                fds.append(int(name))
    return sorted(fds)


def _readable(fds: list[int], timeout_s: float) -> list[int]:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll(math.ceil(timeout_s * 1000))]
