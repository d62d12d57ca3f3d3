"""One direction of the bus for messages of any length: by the ring, or by ZeroMQ what is larger, in one order.

Runs in: driver | worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from zmqexec import _bus
from zmqexec.bus.ring import RingWriter
from zmqexec.bus.zmq_path import ZmqReceiver, ZmqSender
from zmqexec.errors import BusClosed, BusError, ProtocolError

IN_RING = 0  # kinds of records
BY_ZMQ = 1
NO_MESSAGE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not of the type asked for."""


class Outbox:
    """The sending end. One sending thread; `close` from any. The segment is closed by its owner, before this."""

    def __init__(self, segment: _bus.Segment) -> None:
        self._writer = RingWriter(segment)
        self._zmq = ZmqSender(segment.num_workers if segment.rank < 0 else 1)
        self._segment = segment
        self._max_ring_bytes = segment.max_payload_bytes
        self._encode_into = msgspec.msgpack.Encoder().encode_into
        self._buffer = bytearray()
        self._broken = False

    def send_message(self, message: Any, timeout_s: float, check: Callable[[], None] | None = None) -> None:
        """Send `message` to every reader, encoded where it will lie if there is room. As `send`."""
        if self._broken or not self._segment.encode(self._encode_into, message, IN_RING):
            self._encode_into(message, self._buffer)
            self.send(self._buffer, timeout_s, check)

    def send(self, payload: bytes | bytearray, timeout_s: float, check: Callable[[], None] | None = None) -> None:
        """Send a copy of `payload` to every reader.

        BusTimeout: names who holds us back; nothing was sent, except for a payload larger than the ring, after which
        the bus cannot go on and every later `send` fails. `check` is called every few milliseconds of waiting and may
        raise.
        """
        if self._broken:
            raise BusError("an earlier payload was lost half way, so that the bus cannot go on")
        if len(payload) <= self._max_ring_bytes:
            self._writer.write(payload, timeout_s, IN_RING, check)
            return
        deadline = time.monotonic() + timeout_s

        def check_all() -> None:
            if self._segment.closed:
                raise BusClosed("the bus was closed")
            if check is not None:
                check()

        self._writer.write(self._zmq.announce(len(payload)), timeout_s, BY_ZMQ, check)
        self._broken = True
        self._zmq.send(payload, deadline - time.monotonic(), check_all)
        self._broken = False

    def close(self) -> None:
        """Idempotent, from any thread."""
        self._zmq.close()


class Announced:
    """Decodes records that announce a payload by ZeroMQ: keeps the last one."""

    record: bytes | None = None

    def __call__(self, payload: bytes | memoryview) -> None:
        self.record = bytes(payload)


class Inbox:
    """The receiving end: the broadcast ring in a worker, every rank's replies in the driver.

    One receiving thread; `close` and `interrupt` from any. The segment is closed by its owner, before this.
    """

    def __init__(
        self,
        segment: _bus.Segment,
        decode: Callable[[bytes | memoryview], Any],
        rehearse: Callable[[], object] | None = None,
    ) -> None:
        """`decode` turns a payload into a message; what it raises for bytes that are none is in `NO_MESSAGE`."""
        self._segment = segment
        self._is_driver = segment.rank < 0
        self._decode = decode
        self._rehearse = rehearse
        self._announced = Announced()
        self._decoders: _bus.Decoders = (decode, self._announced)
        self._receivers: dict[int, ZmqReceiver] = {}
        self._pending: int | None = None
        self._interrupted = False

    def receive(self, timeout_s: float) -> Any:
        """The next message, in the driver (rank, message); None at the deadline or for an `interrupt` since the last.

        A payload that comes by ZeroMQ may take `timeout_s` once more after it has been announced.

        BusClosed: there will be none. ProtocolError: the ring holds what no Outbox writes, or bytes that are no
        message, which are gone.
        """
        if self._pending is not None:
            return self._fetch(self._pending, timeout_s)
        try:
            received = self._segment.read(self._decoders, timeout_s, self._rehearse)
        except NO_MESSAGE as error:
            raise self._no_message(self._segment.last_reader, error) from error
        record = self._announced.record
        if record is None:
            if received is None:
                self._interrupted = False  # before the caller checks its conditions: a later one will be seen next time
            return received
        self._announced.record = None
        rank = self._segment.last_reader
        receiver = self._receivers.get(rank)
        if receiver is None:
            receiver = self._receivers[rank] = ZmqReceiver(max(self._segment.rank, 0))
        receiver.expect(record)
        self._pending = rank
        return self._fetch(rank, timeout_s)

    def interrupt(self) -> None:
        """Make `receive` return None when it next finds no message. BusClosed: closed."""
        self._interrupted = True
        self._segment.wake()

    def _fetch(self, rank: int, timeout_s: float) -> Any:
        """The announced payload of `rank`, decoded; None at the deadline or for an interrupt: it is still to come."""
        deadline = time.monotonic() + timeout_s
        while True:
            closed = self._segment.closed
            payload = self._receivers[rank].receive(deadline)
            if payload is not None:
                break
            if closed:
                raise BusClosed("the bus was closed before a payload that it had announced was sent")
            if self._interrupted or time.monotonic() >= deadline:
                self._interrupted = False
                return None
        self._pending = None
        try:
            message = self._decode(payload)
        except NO_MESSAGE as error:
            raise self._no_message(rank, error) from error
        return (rank, message) if self._is_driver else message

    def _no_message(self, rank: int, error: Exception) -> ProtocolError:
        sender = f"rank {rank}" if self._is_driver else "the driver"
        return ProtocolError(f"bytes from {sender} are no message of this version: {error}")

    def close(self) -> None:
        """Idempotent, from any thread."""
        for receiver in list(self._receivers.values()):
            receiver.close()
