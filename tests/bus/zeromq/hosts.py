"""Two hosts to test with: two network namespaces with a cable between them, or this machine's loopback.

Namespaces need root and iproute2. `driver_side` and `worker_side` are the hosts' addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000
IP = shutil.which("ip")
LIBC = ctypes.CDLL(None, use_errno=True)


class Loopback:
    """Both on this machine."""

    driver_side = worker_side = "127.0.0.1"
    can_cut = False
    prefix: tuple[str, ...] = ()

    @contextlib.contextmanager
    def at_driver(self) -> Iterator[None]:
        """What the calling thread does inside happens on the driver's host."""
        yield

    at_worker = at_driver


class Namespaces:
    """Two network namespaces. `close` deletes them, and with them the cable."""

    driver_side = "10.213.7.1"
    worker_side = "10.213.7.2"
    can_cut = True

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self._names = (f"zx-{tag}-a", f"zx-{tag}-b")
        self._cables = (f"zx{tag}a", f"zx{tag}b")
        try:
            for name in self._names:
                run("netns", "add", name)
            run("link", "add", self._cables[0], "netns", self._names[0], "type", "veth", "peer", "name",
                self._cables[1], "netns", self._names[1])  # fmt: skip
            for name, cable, address in zip(
                self._names, self._cables, (self.driver_side, self.worker_side), strict=True
            ):
                run("-n", name, "address", "add", f"{address}/30", "dev", cable)
                run("-n", name, "link", "set", cable, "up")
                run("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise
        self.prefix = (str(IP), "netns", "exec", self._names[1])

    def cut(self) -> None:
        """Pull the cable: packets vanish, and neither side is told."""
        run("-n", self._names[1], "link", "set", self._cables[1], "down")

    @contextlib.contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        """Threads and sockets that the calling thread makes inside stay in the namespace."""
        with contextlib.ExitStack() as opened:
            ours = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, ours)
            theirs = os.open(f"/var/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, theirs)
            _enter(theirs)
            try:
                yield
            finally:
                _enter(ours)

    def at_driver(self) -> contextlib.AbstractContextManager[None]:
        """What the calling thread does inside happens on the driver's host."""
        return self._inside(self._names[0])

    def at_worker(self) -> contextlib.AbstractContextManager[None]:
        """What the calling thread does inside happens on the worker's host."""
        return self._inside(self._names[1])

    def close(self) -> None:
        """Idempotent."""
        for name in self._names:
            if Path("/var/run/netns", name).exists():
                run("netns", "delete", name)


def why_no_namespaces() -> str:
    """Why there can be only one host here, or ""."""
    if os.geteuid() != 0:
        return "needs root"
    if IP is None:
        return "needs iproute2"
    try:
        Namespaces().close()
    except (OSError, subprocess.SubprocessError) as error:
        return f"the kernel refuses: {getattr(error, 'stderr', error)}"
    return ""


def run(*arguments: str) -> None:
    subprocess.run([str(IP), *arguments], check=True, capture_output=True, text=True, timeout=20)


def _enter(fd: int) -> None:
    if LIBC.setns(fd, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
