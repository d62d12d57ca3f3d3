"""The benchmark's side of the process groups that it measures: one per transport, stopped while others have their turn.

Runs in: the benchmark. Whatever happens, no process of a group outlives `HostGroup`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bus_peers.peer import process_tree

CLOSE_S = 5.0
TRACKER_S = 2.0
PR_SET_CHILD_SUBREAPER = 36


class HostFailed(Exception):
    """A group broke or took too long; the message says with what."""


class Host:
    """One transport's processes, from the benchmark's side."""

    def __init__(self, name: str, config: dict[str, Any], log: Path) -> None:
        self.name = name
        self._log = log
        self._pending = b""
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bus_peers.host", json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self.tree: list[int] = []  # as of the last `stop`

    def ask(self, command: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """Have it measured."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise HostFailed(self._last_words()) from error
        return self.answer(deadline_s)

    def answer(self, deadline_s: float) -> dict[str, Any]:
        """The next answer. HostFailed: it ended, or gave none within `deadline_s`."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        until = time.monotonic() + deadline_s
        while b"\n" not in self._pending:
            ready, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise HostFailed(f"no answer within {deadline_s:g} s; {self._last_words()}")
            data = os.read(fd, 1 << 20)
            if not data:
                raise HostFailed(self._last_words())
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it ended without a word"

    def stop(self) -> None:
        """Let none of its processes run until `go`."""
        self.tree = process_tree(self._process.pid)
        _signal(self.tree, signal.SIGSTOP)

    def go(self) -> None:
        """Let them run again, workers first."""
        _signal(self.tree[::-1], signal.SIGCONT)

    def close(self) -> None:
        """End it: by asking, then by force."""
        self.go()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        tree = process_tree(self._process.pid) if self._process.poll() is None else []
        _signal(tree, signal.SIGKILL, sparing_trackers=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


class HostGroup:
    """All hosts; at its end, nothing below this process is left running."""

    def __init__(self) -> None:
        # Orphans come to us, so that even those that a dying host leaves behind are found.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.hosts: dict[str, Host] = {}
        self._guardian = subprocess.Popen(
            [sys.executable, "-m", "bus_peers.guardian"], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def stop(self, name: str) -> None:
        """Stop a host; the guardian is to end it should we be killed."""
        self.hosts[name].stop()
        assert self._guardian.stdin is not None
        print(*(pid for host in self.hosts.values() for pid in host.tree), file=self._guardian.stdin, flush=True)

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()
        self.hosts.clear()
        for round_s in (TRACKER_S, 0.0):
            below = process_tree(os.getpid())[1:]
            _signal(below, signal.SIGCONT)
            # multiprocessing's trackers end by themselves, after removing the shared memory of those that did not.
            _signal(below, signal.SIGKILL, sparing_trackers=round_s > 0)
            until = time.monotonic() + round_s
            while _reap() and time.monotonic() < until:
                time.sleep(0.02)
        assert self._guardian.stdin is not None
        with contextlib.suppress(OSError):  # it was the last to be killed
            self._guardian.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _signal(pids: list[int], number: signal.Signals, sparing_trackers: bool = False) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            if sparing_trackers and b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                continue
            os.kill(pid, number)


def _reap() -> bool:
    """Collect who has ended; whether anybody is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True
