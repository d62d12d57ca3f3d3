"""The driver's end of the bus over ZeroMQ alone: where memory cannot be shared, and for workers on other hosts.

Runs in: driver. The other end: worker_channel.py.

What `channel.DriverChannel` does and promises, with other means: every message arrives once, whole and in order, or
somebody gets an error; the slowest rank holds the driver back and is named; every wait has a deadline. Needs no
extension module.

Threads: libzmq's two (over TCP three), and one that owns the control connections. A wait sleeps in the kernel.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Self

import msgspec
import zmq

from zmqexec.bus.status import WorkerStatus
from zmqexec.bus.zeromq.codec import check_size, decode
from zmqexec.bus.zeromq.driver_end import DriverEnd
from zmqexec.bus.zeromq.endpoints import DEFAULT_LINGER_S, DEFAULT_LOST_AFTER_S
from zmqexec.bus.zeromq.frames import DATA, HEADER_BYTES, seal
from zmqexec.bus.zeromq.keys import DriverKeys
from zmqexec.bus.zeromq.lane import LaneSender, Window, shareable
from zmqexec.bus.zeromq.wake import Gate, deadline_after, leave_in, poll_ms, take_turn
from zmqexec.errors import BusError, BusTimeout, ConfigError
from zmqexec.protocol import EngineStats, ToDriver, ToWorker

CHECK_S = 0.01
"""How long a publish that waits may go without looking at what else its caller has to see to."""

STATUS_S = 0.2


class ZmqDriverChannel:
    """The driver's end: publishes to all workers, receives the replies of each.

    One thread publishes and one (the same or another) receives; `wake`, `status` and `close` may come from any.

    endpoints      by rank: what its worker connects to
    refused_peers  connections that were not admitted: wrong key, no key, not ZeroMQ, silent, another user
    """

    def __init__(self, end: DriverEnd, num_workers: int, epoch: int, max_message_bytes: int, is_remote: bool) -> None:
        """Takes over `end`; `create` is the usual way."""
        self._end = end
        self._max_message_bytes = max_message_bytes
        self._is_remote = is_remote
        self._gate = Gate(end.wake, lambda: leave_in(end.tear_down, end.service.is_own_thread))
        weakref.finalize(self, self._gate.close)  # also at exit, while the service thread can still run
        self._publishing = threading.RLock()
        self._receiving = threading.RLock()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToDriver] = msgspec.msgpack.Decoder(ToDriver)
        self._buffer = bytearray(HEADER_BYTES)
        self._next_rank = 0
        self._reply_poller = zmq.Poller()
        for lane in end.inboxes:
            self._reply_poller.register(lane.socket, zmq.POLLIN)
        self._reply_poller.register(end.reply_wake.fd, zmq.POLLIN)
        self.endpoints = end.endpoints
        self.num_workers = num_workers
        self.epoch = epoch

    @classmethod
    def create(
        cls,
        num_workers: int,
        *,
        epoch: int,
        listen: str | None = None,
        keys: DriverKeys | None = None,
        window_messages: int = 64,
        window_bytes: int = 64 << 20,
        max_message_bytes: int = 1 << 30,
        lost_after_s: float = DEFAULT_LOST_AFTER_S,
        linger_s: float = DEFAULT_LINGER_S,
    ) -> ZmqDriverChannel:
        """A new bus; each worker is to be told its entry of `endpoints`, and over TCP its keys.

        listen             tcp://HOST:PORT, for workers on other hosts; PORT 0: any. None: this machine
        keys               with `listen`, and only then
        window_messages    how many messages may be sent that a rank has not taken
        window_bytes       and how many bytes; one message more is always allowed
        max_message_bytes  a larger message is refused here, and by libzmq where it arrives
        lost_after_s       over TCP, a rank that is not heard of for so long is lost
        linger_s           how long `close` may take to hand over what was published
        """
        if window_messages < 1 or window_bytes < 1 or max_message_bytes < 1:
            raise ConfigError(f"{window_messages=}, {window_bytes=}, {max_message_bytes=}: each must be at least 1")
        if not (lost_after_s > 0 and linger_s >= 0):
            raise ConfigError(f"{lost_after_s=} must be positive and {linger_s=} not negative")
        end = DriverEnd(
            num_workers,
            epoch,
            listen,
            keys,
            Window(window_messages, window_bytes),
            max_message_bytes,
            lost_after_s,
            linger_s,
        )
        return cls(end, num_workers, epoch, max_message_bytes, listen is not None)

    # ── sending ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def publish(self, message: ToWorker, timeout_s: float, check: Callable[[], None] | None = None) -> None:
        """Send `message` to all workers, waiting at most `timeout_s` for room.

        `check` is called every few milliseconds of waiting and may raise to give up. It has to take replies, since a
        worker that cannot deliver one takes no message. BusTimeout names the ranks that hold us back; nothing was
        sent. BusError: a rank on another host is lost. BusClosed: closed. ConfigError: larger than
        `max_message_bytes`. A rank that has left gets nothing.
        """
        deadline = deadline_after(timeout_s)
        with self._gate:
            if not take_turn(self._publishing, timeout_s):
                raise BusTimeout(f"another thread was publishing for {timeout_s:g} s: one at a time")
            try:
                self._encoder.encode_into(message, self._buffer, HEADER_BYTES)
                num_bytes = len(self._buffer) - HEADER_BYTES
                check_size(num_bytes, self._max_message_bytes)
                self._wait_for_room(num_bytes, timeout_s, deadline, check)
                self._send(num_bytes)
            finally:
                self._publishing.release()

    def _wait_for_room(
        self, num_bytes: int, timeout_s: float, deadline: float, check: Callable[[], None] | None
    ) -> None:
        end = self._end
        while True:
            self._gate.check()
            self._raise_if_lost()
            waiting = [rank for rank, lane in self._present() if end.service.ranks[rank].lost or not lane.has_room()]
            if not waiting:
                return
            if time.monotonic() >= deadline:
                ranks = ", ".join(str(rank) + self._excuse(rank) for rank in waiting)
                raise BusTimeout(
                    f"no room for a message of {num_bytes} bytes within {timeout_s:g} s: held back by "
                    f"{'rank' if len(waiting) == 1 else 'ranks'} {ranks}"
                )
            if check is not None:
                check()
            poller = zmq.Poller()
            poller.register(end.space_wake.fd, zmq.POLLIN)
            for rank in waiting:
                poller.register(end.outboxes[rank].socket, zmq.POLLIN)
            poller.poll(poll_ms(deadline) if check is None else poll_ms(deadline, CHECK_S))
            end.space_wake.clear()

    def _present(self) -> list[tuple[int, LaneSender]]:
        ranks = self._end.service.ranks
        return [(rank, lane) for rank, lane in enumerate(self._end.outboxes) if not ranks[rank].left]

    def _excuse(self, rank: int) -> str:
        if self._end.service.ranks[rank].lost:
            return f" ({self._end.service.ranks[rank].lost})"
        return "" if self._end.outboxes[rank].joined else " (it has not joined the bus)"

    def _send(self, num_bytes: int) -> None:
        end = self._end
        seal(self._buffer, DATA, self.epoch, end.sequence)
        end.sequence += 1
        frame = shareable(self._buffer)
        for _, lane in self._present():
            # False: its connection ended just now, which the service reports.
            lane.send(frame, num_bytes)

    # ── receiving ───────────────────────────────────────────────────────────────────────────────────────────────────

    def try_receive(self) -> tuple[int, ToDriver] | None:
        """(rank, message) of the next reply, ranks in turn; None while there is none. ProtocolError: no message."""
        with self._gate:
            if not self._receiving.acquire(blocking=False):
                return None  # another thread is receiving, and will get it
            try:
                for _ in range(self.num_workers):
                    rank = self._next_rank
                    self._next_rank = (rank + 1) % self.num_workers
                    payload = self._end.inboxes[rank].try_receive()
                    if payload is not None:
                        return rank, decode(self._decoder, payload, f"rank {rank}")
            finally:
                self._receiving.release()
        return None

    def receive(self, timeout_s: float) -> tuple[int, ToDriver] | None:
        """(rank, message) of the next reply; None at the deadline or after `wake`, also a `wake` that came before.

        Whoever gets None checks its own conditions and calls again. BusError: a rank on another host is lost, and
        nothing that it sent is left to receive. A lost rank on this machine only wakes us: whoever started the process
        knows better how it ended.
        """
        deadline = deadline_after(timeout_s)
        with self._gate:
            if not take_turn(self._receiving, timeout_s):
                return None
            try:
                while True:
                    self._gate.check()
                    reply = self.try_receive()
                    if reply is not None:
                        return reply
                    self._raise_if_lost()
                    if self._end.woken:
                        self._end.woken = False  # before the caller checks: the next call sees a later wake
                        return None
                    if time.monotonic() >= deadline:
                        return None
                    self._reply_poller.poll(poll_ms(deadline))
                    self._end.reply_wake.clear()
            finally:
                self._receiving.release()

    def _raise_if_lost(self) -> None:
        if self._is_remote:
            for rank, reason in self._end.service.lost().items():
                raise BusError(f"rank {rank} is lost: {reason}")

    # ── from any thread ─────────────────────────────────────────────────────────────────────────────────────────────

    def wake(self) -> None:
        """Make a waiting `receive` return and a waiting `publish` call its check. From any thread, also when closed."""
        with contextlib.suppress(BusError), self._gate:  # closed just now, or a fork's, which wakes nobody
            self._end.woken = True
            self._end.wake()

    def set_gauges(self, stats: EngineStats) -> None:
        """There is no shared page to show them on."""

    def attachment(self, rank: int) -> tuple[dict[str, Any], dict[str, int]]:
        """What a worker of this machine needs to connect: arguments, and file descriptors to inherit."""
        return {"bus_endpoint": self.endpoints[rank]}, {}

    def status(self, rank: int) -> WorkerStatus:
        """What `rank` is doing: it is asked, and has 0.2 s to answer; otherwise what it said last, with a note."""
        with self._gate:
            return self._end.service.status(rank, STATUS_S)

    @property
    def lost(self) -> dict[int, str]:
        """Ranks whose connection ended without a word, and how."""
        return self._end.service.lost()

    @property
    def refused_peers(self) -> int:
        """Connections that were not admitted."""
        return self._end.service.refused_peers

    @property
    def stale(self) -> int:
        """Frames of another epoch, dropped."""
        return sum(counters.stale for counters in self._end.counters)

    @property
    def checksum_failures(self) -> int:
        """Frames whose bytes had changed on their way."""
        return sum(counters.checksum_failures for counters in self._end.counters)

    @property
    def gaps(self) -> int:
        """Frames that were not the next one."""
        return sum(counters.gaps for counters in self._end.counters)

    def close(self) -> None:
        """End every wait, here (BusClosed) and in the workers, which first read what was published. Idempotent.

        Takes up to `linger_s` while a rank's host does not accept what was published. A thread that is inside a call
        closes the sockets when it leaves.
        """
        self._gate.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
