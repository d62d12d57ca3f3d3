"""One direction of the bus for byte strings of any length: by the ring, or by ZeroMQ what is larger, in one order.

Runs in: driver | worker.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from zmqexec import _bus
from zmqexec.bus.ring import RingReader, RingWriter
from zmqexec.bus.zmq_path import ZmqReceiver, ZmqSender
from zmqexec.errors import BusClosed, BusError, ProtocolError

IN_RING = 0  # kinds of records
BY_ZMQ = 1
ZMQ_POLL_S = 2e-4  # such a payload takes longer than that to copy


class Outbox:
    """The sending end. One sending thread; `close` from any. The segment is closed by its owner, before this."""

    def __init__(self, segment: _bus.Segment, spin_us: float = 0.0) -> None:
        self._writer = RingWriter(segment, spin_us)
        self._zmq = ZmqSender(segment.num_workers if segment.rank < 0 else 1)
        self._segment = segment
        self._broken = False

    def send(self, payload: bytes | bytearray, timeout_s: float, check: Callable[[], None] | None = None) -> None:
        """Send a copy of `payload` to every reader.

        BusTimeout: names who holds us back; nothing was sent, except for a payload larger than the ring, after which
        the bus cannot go on and every later `send` fails. `check` is called every few milliseconds
        of waiting and may raise.
        """
        if self._broken:
            raise BusError("an earlier payload was lost half way, so that the bus cannot go on")
        if len(payload) <= self._writer.max_payload_bytes:
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


class Inbox:
    """The receiving end: the broadcast ring in a worker, rank `index`'s reply ring in the driver.

    One receiving thread; `close` from any. The segment is closed by its owner, before this.
    """

    def __init__(self, segment: _bus.Segment, index: int = 0) -> None:
        self._reader = RingReader(segment, index)
        self._zmq = ZmqReceiver(max(segment.rank, 0))
        self._segment = segment

    @property
    def longest_wait_s(self) -> float:
        """How long the bell may be waited for: a payload that comes by ZeroMQ rings none."""
        return math.inf if self._zmq.pending is None else ZMQ_POLL_S

    def try_receive(self) -> bytes | None:
        """The next payload, or None while there is none.

        BusClosed: there will be none. ProtocolError: the ring holds what no Outbox writes.
        """
        if self._zmq.pending is None:
            record = self._reader.try_read_record()
            if record is None:
                return None
            kind, payload = record
            if kind == IN_RING:
                return payload
            if kind != BY_ZMQ:
                raise ProtocolError(f"a record of unknown kind {kind}")
            self._zmq.expect(payload)
        closed = self._segment.closed
        received = self._zmq.try_receive()
        if received is None and closed:
            raise BusClosed("the bus was closed before a payload that it had announced was sent")
        return received

    def close(self) -> None:
        """Idempotent, from any thread."""
        self._zmq.close()
