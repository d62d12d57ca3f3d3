"""Looking at real processes from outside: who is there, what they burn, what they leave."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")


def wait_for(condition: Callable[[], T], timeout_s: float, what: str) -> T:
    """Poll until `condition` is true; its value."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


def own_descriptors() -> set[str]:
    """What this process has open: each descriptor with what is behind it."""
    return {f"{fd.name} {fd.readlink()}" for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}


def own_threads() -> set[str]:
    """The kernel's ids of this process's threads."""
    return {task.name for task in Path("/proc/self/task").iterdir()}


def wait_for_threads_to_end(before: set[str], timeout_s: float = 5) -> None:
    """No threads but those `before`; the kernel lists one for a moment after it was joined."""
    wait_for(lambda: own_threads() <= before, timeout_s, "the end of every thread started since")


def roles(root: psutil.Process) -> dict[str, psutil.Process]:
    """The processes of the engine below `root`: "driver", "worker 0", "worker 1", ..."""
    found = {}
    for process in root.children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if len(command) > 4 and command[2].endswith("_entry.py"):
            rank = command[4].split('"rank": ')[1].split(",")[0] if command[3] == "worker" else ""
            found[f"{command[3]} {rank}".strip()] = process
    return found


def is_gone(process: psutil.Process) -> bool:
    """Ended, or at least no longer running anything."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has reached every thread: the kernel counts a process as stopped only then."""
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):  # a thread that ended just now
        return False
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def wait_gone(processes: Iterable[psutil.Process], timeout_s: float) -> float:
    """Seconds until all of them were gone."""
    start = time.monotonic()
    everyone = list(processes)
    wait_for(lambda: all(is_gone(process) for process in everyone), timeout_s, f"the end of {everyone}")
    return time.monotonic() - start


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time it has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def leftovers(folders: Iterable[Path], session: int) -> list[str]:
    """What outlived a program that ran in `session`: processes, files in `folders`, shared memory.

    Abstract sockets end with the processes that hold them; those of other engines on this machine do not matter.
    """
    found = [str(path) for folder in folders for path in folder.rglob("*")]
    found += [str(path) for path in Path("/dev/shm").iterdir() if "zmqexec" in path.name or "torch" in path.name]
    return found + [str(process) for process in psutil.process_iter() if _is_alive_in(session, process)]


def _is_alive_in(session: int, process: psutil.Process) -> bool:
    try:
        return os.getsid(process.pid) == session and not is_gone(process)
    except ProcessLookupError:
        return False
