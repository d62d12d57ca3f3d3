"""Starts processes of our own: by `exec`, with this process's files, and never able to outlive it.

Runs in: driver | server.

`exec` instead of `multiprocessing`: no `__main__` guard, no state inherited by fork, and it works in notebooks,
daemonic processes and inside training jobs.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zmqexec.errors import StartupError, describe_exit

PACKAGE_DIR = Path(__file__).resolve().parent
HAS_PIDFD = hasattr(os, "pidfd_open")
"""Elsewhere than on Linux a child's end shows at a pipe that only it holds the other end of."""

KILL_WAIT_S = 10.0
"""A killed process that is not gone after this hangs in the kernel (a dead disk, a driver): nobody can wait for it."""


class Child:
    """A process started by us. `end_fd` becomes readable when it has ended.

    The child holds the read end of our lifeline pipe and a pidfd of us; it exits when either says that we are gone
    (`_bus.arm_death_watch`). It has a process group of its own, so that Ctrl-C in a terminal reaches only us.
    """

    def __init__(
        self,
        role: str,
        arguments: Mapping[str, Any],
        *,
        fds: Mapping[str, int] | None = None,
        output_fd: int | None = None,
        default_env: Mapping[str, str] | None = None,
    ) -> None:
        """Start it. `StartupError`: the system refused.

        fds          file descriptors to inherit, by the argument that tells their numbers in the child; still ours
        output_fd    where its output goes; None: where ours goes
        default_env  environment variables for those that ours does not have
        """
        inherited: dict[str, int] = {}
        process = None
        try:
            lifeline_end, self._lifeline = os.pipe()
            own_end, exit_end = (-1, -1) if HAS_PIDFD else os.pipe()
            try:
                # From 3 on: where our program has closed its standard streams, descriptors of ours may have their
                # numbers, and would be replaced by those of the child.
                for name, fd in {**(fds or {}), "lifeline_fd": lifeline_end}.items():
                    inherited[name] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
                everything = {**arguments, **inherited, "parent_pid": os.getpid(), "sys_path": import_path()}
                process = subprocess.Popen(
                    [sys.executable, "-P", str(PACKAGE_DIR / "_entry.py"), role, json.dumps(everything)],
                    stdin=subprocess.DEVNULL,
                    stdout=_standard_stream(1) if output_fd is None else output_fd,
                    stderr=_standard_stream(2) if output_fd is None else output_fd,
                    pass_fds=[fd for fd in (*inherited.values(), exit_end) if fd >= 0],
                    process_group=0,
                    cwd=None if _real_path(os.curdir) else "/",  # MKL cannot load in a deleted folder
                    env={**(default_env or {}), **os.environ},
                )
                self.end_fd = os.pidfd_open(process.pid) if HAS_PIDFD else own_end
            except BaseException:
                for fd in (self._lifeline, own_end):
                    if fd >= 0:
                        os.close(fd)
                if process is not None:
                    process.kill()
                    process.wait(KILL_WAIT_S)
                raise
            finally:
                for fd in (lifeline_end, *inherited.values(), exit_end):
                    if fd >= 0:
                        os.close(fd)
        except OSError as error:
            raise StartupError(f"the {role} process cannot be started: {error}") from error
        self._process = process
        self.pid = process.pid

    def exit_code(self) -> int | None:
        """As in subprocess: None while it runs, negative for a signal. Reaps the process."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the process; False at the deadline."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def send_signal(self, number: int) -> None:
        """No error if it has ended: it is not reaped behind our back, so its pid is nobody else's."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; no error if it has ended."""
        self._process.kill()

    def describe_exit(self) -> str:
        """How it ended, in words."""
        return describe_exit(self.exit_code())

    def close(self) -> None:
        """Kill the process if it still runs, reap it, and close our ends. Idempotent."""
        self.kill()
        self.wait(KILL_WAIT_S)
        if self.end_fd >= 0:
            os.close(self.end_fd)
            os.close(self._lifeline)
            self.end_fd = -1


def _standard_stream(fd: int) -> int | None:
    """What a child gets for standard stream `fd`: ours (None), or nothing where our program has closed it.

    Another file may have got its number since, but none that Python opened is inheritable.
    """
    try:
        return None if os.get_inheritable(fd) else subprocess.DEVNULL
    except OSError:
        return subprocess.DEVNULL


def import_path() -> list[str]:
    """`sys.path` for a child: ours, without the folders that Python adds for the script or the current directory.

    A stray `torch.py` beside the user's script must not be imported by a worker. Entries that are no strings, which
    Python ignores too, are left out, and relative ones where the current directory has been deleted.
    """
    unsafe = {_real_path(os.curdir), None}
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script:
        unsafe.add(_real_path(str(Path(script).parent)))
    return [entry for entry in sys.path if isinstance(entry, str) and entry and _real_path(entry) not in unsafe]


def _real_path(path: str) -> str | None:
    """The canonical path; None for a relative one in a current directory that has been deleted."""
    try:
        return os.path.realpath(path)
    except FileNotFoundError:
        return None
