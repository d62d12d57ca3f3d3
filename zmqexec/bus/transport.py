"""How messages travel: the one place that chooses between shared memory and ZeroMQ.

Runs in: driver | worker.

    ring  shared memory, and ZeroMQ for what is larger than the whole ring: channel.py
    zmq   ZeroMQ alone, for platforms and sandboxes without: driver_channel.py, worker_channel.py
    auto  ring where the system grants it, else zmq, with one warning

The two ends have the same methods and make the same promises. What a worker needs to find its driver are arguments and
inherited file descriptors, which `attachment` tells and `open_worker_channel` takes.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from zmqexec.bus.extension import BUILD_ID
from zmqexec.bus.status import Phase, WorkerStatus
from zmqexec.config import WaitPolicy
from zmqexec.errors import BusError
from zmqexec.protocol import EngineStats, ToDriver, ToWorker

Transport = Literal["auto", "ring", "zmq"]


class DriverEnd(Protocol):
    """The driver's end of a bus; `channel.DriverChannel` documents the methods."""

    num_workers: int
    epoch: int

    @property
    def stale(self) -> int:
        """Replies of another epoch that the transport itself dropped."""
        ...

    def publish(self, message: ToWorker, timeout_s: float, check: Callable[[], None] | None = None) -> None: ...
    def try_receive(self) -> tuple[int, ToDriver] | None: ...
    def receive(self, timeout_s: float) -> tuple[int, ToDriver] | None: ...
    def wake(self) -> None: ...
    def status(self, rank: int) -> WorkerStatus: ...
    def attachment(self, rank: int) -> tuple[dict[str, Any], dict[str, int]]:
        """(arguments, file descriptors to inherit) with which rank `rank`'s process calls `open_worker_channel`."""
        ...

    def set_gauges(self, stats: EngineStats) -> None: ...
    def close(self) -> None: ...


class WorkerEnd(Protocol):
    """A worker's end of a bus; `channel.WorkerChannel` documents the methods."""

    rank: int
    num_workers: int
    epoch: int

    @property
    def closed(self) -> bool: ...
    def try_receive(self) -> ToWorker | None: ...
    def receive(self, timeout_s: float) -> ToWorker | None: ...
    def reply(self, message: ToDriver, timeout_s: float) -> None: ...
    def set_status(self, phase: Phase, step_id: int) -> None: ...
    def set_error(self, text: str) -> None: ...
    def close(self) -> None: ...


def open_driver_channel(
    num_workers: int,
    *,
    epoch: int,
    transport: Transport = "auto",
    ring_bytes: int = 64 << 20,
    wait_policy: WaitPolicy = "balanced",
    has_checksums: bool = False,
    name: str = "",
) -> DriverEnd:
    """A new bus. BusError: the system refuses what `transport` asks for.

    `wait_policy`, `has_checksums` and `name` are for shared memory; over ZeroMQ every wait sleeps and every message
    has a checksum. `ring_bytes` is how much may be published before the slowest worker has read it, on both.
    """
    if transport != "zmq":
        try:
            return _open_ring(num_workers, epoch, ring_bytes, wait_policy, has_checksums, name)
        except BusError as error:
            if transport == "ring" or os.strerror(errno.EMFILE) in str(error):  # ZeroMQ would need more of them
                raise
            warnings.warn(
                f"steps travel by ZeroMQ, which is slower, for there is no shared memory: {error}", stacklevel=2
            )
    from zmqexec.bus.zeromq.driver_channel import ZmqDriverChannel

    return ZmqDriverChannel.create(num_workers, epoch=epoch, window_bytes=ring_bytes)


def _open_ring(
    num_workers: int, epoch: int, ring_bytes: int, wait_policy: WaitPolicy, has_checksums: bool, name: str
) -> DriverEnd:
    if BUILD_ID == "none":
        raise BusError("this platform has no zmqexec._bus, which is for Linux")
    from zmqexec.bus.channel import DriverChannel

    return DriverChannel.create(
        num_workers,
        epoch=epoch,
        ring_bytes=ring_bytes,
        wait_policy=wait_policy,
        has_checksums=has_checksums,
        name=name,
    )


def open_worker_channel(arguments: Mapping[str, Any], rank: int, timeout_s: float) -> WorkerEnd:
    """Rank `rank`'s end of the bus that its driver's `attachment` describes. File descriptors stay the caller's."""
    if "bus_fd" in arguments:
        from zmqexec.bus.channel import WorkerChannel

        return WorkerChannel.attach(arguments["bus_fd"], rank)
    from zmqexec.bus.zeromq.worker_channel import ZmqWorkerChannel

    return ZmqWorkerChannel.connect(arguments["bus_endpoint"], rank, timeout_s=timeout_s)
