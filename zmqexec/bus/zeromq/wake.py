"""Waking and leaving: how any thread ends another's wait, and who closes what the others still use.

Runs in: driver | worker.

libzmq's sockets belong to one thread at a time, so nobody closes a socket that another thread waits on. Instead that
thread is woken, sees that the bus is closed, and leaves; the last one to leave closes the sockets.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable

from zmqexec.errors import BusClosed, BusError

LONGEST_POLL_S = 3600.0  # libzmq takes milliseconds in an int; whoever waits longer waits again


class WakePipe:
    """Ends a `zmq.Poller.poll` of another thread: `fd` is readable from `ring` until `clear`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finaliser may ring while this thread does
        self.fd, self._write_fd = os.pipe()
        for fd in (self.fd, self._write_fd):
            os.set_blocking(fd, False)

    def ring(self) -> None:
        """From any thread, also after `close`."""
        with self._lock, contextlib.suppress(BlockingIOError):  # full: it is ringing
            if self._write_fd >= 0:
                os.write(self._write_fd, b"\0")

    def clear(self) -> None:
        """For the waiting thread, before it checks its conditions."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)

    def close(self) -> None:
        """Idempotent. The waiting thread has left."""
        with self._lock:
            if self._write_fd >= 0:
                os.close(self.fd)
                os.close(self._write_fd)
                self._write_fd = -1


class Gate:
    """`with gate:` around every use of the sockets; BusClosed once it is closed, BusError in a fork.

    on_close   called first, once, to wake whoever is inside; from any thread
    on_empty   called then, once, when the last one has left; from that one's thread
    """

    def __init__(self, on_close: Callable[[], None], on_empty: Callable[[], None]) -> None:
        self._on_close = on_close
        self._on_empty = on_empty
        self._lock = threading.RLock()  # garbage collection may close while this thread enters
        self._inside = 0
        self._pid = os.getpid()
        self.closed = False

    def __enter__(self) -> None:
        if os.getpid() != self._pid:
            raise BusError("the bus belongs to the process that opened it, not to its forks")
        with self._lock:
            if self.closed:
                raise BusClosed("the bus was closed in this process")
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1
            is_last = self.closed and self._inside == 0
        if is_last:
            self._on_empty()

    def check(self) -> None:
        """BusClosed: somebody has closed the bus while we were inside."""
        if self.closed:
            raise BusClosed("the bus was closed in this process")

    def close(self) -> None:
        """Idempotent, from any thread; nothing happens in a fork, which must not end its parent's bus."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self.closed:
                return
            self.closed = True
            is_empty = self._inside == 0
        self._on_close()
        if is_empty:
            self._on_empty()


def leave_in(tear_down: Callable[[], None], is_service_thread: bool) -> None:
    """Run `tear_down`, which ends the service thread, and so not in that thread: a finaliser may be running there."""
    if is_service_thread:
        threading.Thread(target=tear_down, name="zmqexec-zmq-close", daemon=True).start()
    else:
        tear_down()


def take_turn(lock: threading.RLock, timeout_s: float) -> bool:
    """Wait for another thread that uses the same socket, which it should not."""
    return lock.acquire(timeout=min(max(0.0, timeout_s), LONGEST_POLL_S))


def deadline_after(timeout_s: float) -> float:
    """When a wait has to end. ValueError: that is never."""
    if not math.isfinite(timeout_s):
        raise ValueError(f"timeout_s={timeout_s}: a wait needs a deadline")
    return time.monotonic() + timeout_s


def poll_ms(deadline: float, longest_s: float = LONGEST_POLL_S) -> int:
    """Milliseconds to poll for: until `deadline`, rounded up, so that nobody wakes just before it."""
    return math.ceil(max(0.0, min(deadline - time.monotonic(), longest_s)) * 1e3)
