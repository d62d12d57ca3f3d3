"""Typed messages between the driver and its workers: the two ends of the bus.

Runs in: driver | worker.

Every message is whole: the same class with the same fields on both sides, encoded as msgpack arrays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Self, TypeVar

import msgspec

from zmqexec import _bus
from zmqexec.bus.cores import default_spin_us
from zmqexec.bus.link import Inbox, Outbox
from zmqexec.bus.ring import slots_for, wait_until
from zmqexec.bus.status import Phase, WorkerStatus
from zmqexec.errors import BusClosed, ProtocolError
from zmqexec.protocol import ToDriver, ToWorker

T = TypeVar("T")


class DriverChannel:
    """The driver's end: publishes to all workers, receives the replies of each.

    One thread publishes and one (the same or another) receives; `wake`, `status` and `close` may come from any.
    """

    def __init__(self, segment: _bus.Segment, spin_us: float) -> None:
        """Takes over `segment`; `create` is the usual way."""
        self._segment = segment
        self._spin_us = spin_us
        self._outbox = Outbox(segment, spin_us)
        self._inboxes = [Inbox(segment, rank) for rank in range(segment.num_workers)]
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToDriver] = msgspec.msgpack.Decoder(ToDriver)
        self._buffer = bytearray()
        self._next_rank = 0
        self._woken = False
        self.fd = segment.fd
        self.num_workers = segment.num_workers
        self.epoch = segment.epoch

    @classmethod
    def create(
        cls,
        num_workers: int,
        *,
        epoch: int,
        ring_bytes: int = 64 << 20,
        slot_bytes: int = 256,
        reply_ring_bytes: int = 4 << 20,
        spin_us: float | None = None,
    ) -> DriverChannel:
        """A new bus; its memfd `fd` is to be inherited by the workers.

        ring_bytes        of the broadcast ring; a larger message travels by ZeroMQ
        reply_ring_bytes  of each worker's ring
        spin_us           how long a wait spins before it parks; None: as the cores allow
        """
        segment = _bus.Segment.create(
            num_workers=num_workers,
            epoch=epoch,
            num_slots=slots_for(ring_bytes, slot_bytes),
            slot_bytes=slot_bytes,
            reply_num_slots=slots_for(reply_ring_bytes, slot_bytes),
            reply_slot_bytes=slot_bytes,
        )
        return cls(segment, default_spin_us(num_workers + 1) if spin_us is None else spin_us)

    def publish(self, message: ToWorker, timeout_s: float, check: Callable[[], None] | None = None) -> None:
        """Send `message` to all workers, waiting at most `timeout_s` for room.

        `check` is called every few milliseconds of waiting and may raise to give up. It has to take replies, since a
        worker that cannot deliver one takes no message. BusTimeout names the ranks that hold us back. BusClosed:
        closed.
        """
        self._encoder.encode_into(message, self._buffer)
        self._outbox.send(self._buffer, timeout_s, check)

    def try_receive(self) -> tuple[int, ToDriver] | None:
        """(rank, message) of the next reply, ranks in turn; None while there is none. ProtocolError: no message."""
        for _ in range(self.num_workers):
            rank = self._next_rank
            self._next_rank = (rank + 1) % self.num_workers
            payload = self._inboxes[rank].try_receive()
            if payload is not None:
                return rank, _decode(self._decoder, payload, f"rank {rank}")
        return None

    def receive(self, timeout_s: float) -> tuple[int, ToDriver] | None:
        """(rank, message) of the next reply; None at the deadline or after `wake`, also a `wake` that came before.

        Whoever gets None checks its own conditions and calls again.
        """

        def attempt() -> tuple[int, ToDriver] | bool | None:
            reply = self.try_receive()
            if reply is None and self._woken:
                return False
            return reply

        reply = wait_until(self._segment, _bus.DRIVER_BELL, attempt, timeout_s, self._spin_us, self._longest_wait_s)
        if isinstance(reply, tuple):
            return reply
        self._woken = False  # before the caller checks its conditions: a later wake will be seen by the next call
        return None

    def _longest_wait_s(self) -> float:
        return min(inbox.longest_wait_s for inbox in self._inboxes)

    def wake(self) -> None:
        """Make a waiting `receive` return and a waiting `publish` call its check. From any thread, also when closed."""
        self._woken = True
        with contextlib.suppress(BusClosed):  # also by another thread, just now
            self._segment.ring_bell(_bus.DRIVER_BELL)
            self._segment.ring_bell(_bus.SPACE_BELL)

    def status(self, rank: int) -> WorkerStatus:
        """What `rank` is doing, without asking it."""
        pid, phase, step_id, heartbeat_ns, error = self._segment.status(rank)
        return WorkerStatus(rank, pid, Phase(phase), step_id, heartbeat_ns, error)

    def close(self) -> None:
        """End every wait, here (BusClosed) and in the workers, which first read what was published. Idempotent."""
        self._segment.close()
        self._outbox.close()
        for inbox in self._inboxes:
            inbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class WorkerChannel:
    """A worker's end: receives what the driver publishes, replies on a ring of its own.

    One thread receives and one (the same or another) replies; the rest may come from any.
    """

    def __init__(self, segment: _bus.Segment, spin_us: float) -> None:
        """Takes over `segment`; `attach` is the usual way."""
        self._segment = segment
        self._spin_us = spin_us
        self._inbox = Inbox(segment)
        self._outbox = Outbox(segment, spin_us)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
        self._buffer = bytearray()
        self.rank = segment.rank
        self.num_workers = segment.num_workers
        self.epoch = segment.epoch

    @classmethod
    def attach(cls, fd: int, rank: int, *, spin_us: float | None = None) -> WorkerChannel:
        """Rank `rank`'s end of the bus in memfd `fd`, which stays the caller's and may be closed afterwards."""
        segment = _bus.Segment.attach(fd, rank)
        return cls(segment, default_spin_us(segment.num_workers + 1) if spin_us is None else spin_us)

    @property
    def closed(self) -> bool:
        """Whether the bus was closed, by the driver or here. What was published before can still be received."""
        return self._segment.closed

    def try_receive(self) -> ToWorker | None:
        """The next message, or None while there is none. BusClosed: there will be none. ProtocolError: no message."""
        payload = self._inbox.try_receive()
        return None if payload is None else _decode(self._decoder, payload, "the driver")

    def receive(self, timeout_s: float) -> ToWorker | None:
        """The next message; None at the deadline."""
        return wait_until(
            self._segment,
            _bus.WORKER_BELL,
            self.try_receive,
            timeout_s,
            self._spin_us,
            lambda: self._inbox.longest_wait_s,
        )

    def reply(self, message: ToDriver, timeout_s: float) -> None:
        """Send `message` to the driver, waiting at most `timeout_s` for room. BusTimeout, BusClosed as `publish`."""
        self._encoder.encode_into(message, self._buffer)
        self._outbox.send(self._buffer, timeout_s)

    def set_status(self, phase: Phase, step_id: int) -> None:
        """Say on the status page what this rank is doing from now on. Costs a fraction of a microsecond."""
        self._segment.set_status(phase, step_id)

    def set_error(self, text: str) -> None:
        """Leave the beginning of `text` (232 bytes) on the status page."""
        self._segment.set_error(text)

    def close(self) -> None:
        """End every wait of this process (BusClosed) and let go of the bus. Idempotent, from any thread."""
        self._segment.close()
        self._outbox.close()
        self._inbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _decode(decoder: msgspec.msgpack.Decoder[T], payload: bytes, sender: str) -> T:
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{len(payload)} bytes from {sender} are no message of this version: {error}") from error
