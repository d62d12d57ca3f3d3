"""Rings in shared memory: one writer, and every reader sees every record; the slowest reader holds the writer back.

Runs in: driver | worker.

Loss: none. A record is delivered once to each reader, whole and in order, or the reader gets an error.
Threads: a ring has one writing and per head one reading thread; `close` may come from any.
Waiting: one C call each, without the GIL, never without a deadline; csrc/bus/wait.c says when it spins.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from zmqexec import _bus
from zmqexec.errors import BusTimeout

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

LINE_BYTES = 64
PAGE_BYTES = mmap.PAGESIZE
CHECK_S = 0.01
"""How long a writer that waits for space may go without looking at what else its caller has to see to."""


class RingWriter:
    """The writing end of a segment's outgoing ring: the driver's broadcast ring, or a worker's reply ring.

    Each header word has one writing process: `tail` is ours, `heads[i]` is reader i's. Whoever opened the segment
    closes it; closing the writer does that too.
    """

    def __init__(self, segment: _bus.Segment) -> None:
        self.segment = segment
        self.max_payload_bytes = segment.max_payload_bytes

    def try_write(self, payload: ReadableBuffer, kind: int = 0) -> bool:
        """Publish a copy of `payload`; False while the slowest reader is a full ring behind.

        ValueError: more than `max_payload_bytes`, which no amount of reading would make fit. BusClosed: closed here or
        by the driver.
        """
        return self.segment.write(payload, kind, 0.0)

    def write(
        self, payload: ReadableBuffer, timeout_s: float, kind: int = 0, check: Callable[[], None] | None = None
    ) -> None:
        """Publish a copy of `payload`, waiting for space at most `timeout_s`.

        `check` is called every `CHECK_S` and may raise to give up. BusTimeout: names the readers that hold us back.
        """
        if check is None:
            if self.segment.write(payload, kind, timeout_s):
                return
        elif self.segment.write(payload, kind, 0.0) or self._write_checking(payload, timeout_s, kind, check):
            return
        num_bytes = memoryview(payload).nbytes
        if self.segment.rank >= 0:
            slow = "the driver has not made room"
        else:
            ranks = self.segment.holding_back(num_bytes)
            slow = f"held back by {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
        raise BusTimeout(f"no room for a record of {num_bytes} bytes within {timeout_s:g} s: {slow}")

    def _write_checking(self, payload: ReadableBuffer, timeout_s: float, kind: int, check: Callable[[], None]) -> bool:
        deadline = time.monotonic() + timeout_s
        while (remaining_s := deadline - time.monotonic()) > 0:
            if self.segment.write(payload, kind, min(remaining_s, CHECK_S)):
                return True
            check()
        return False

    def close(self) -> None:
        """Close the segment. Idempotent, from any thread."""
        self.segment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class RingReader:
    """A worker's reading end of the broadcast ring, for plain bytes. Owns its head: the slots up to it are free."""

    def __init__(self, segment: _bus.Segment) -> None:
        self.segment = segment

    def try_read_record(self) -> tuple[int, bytes] | None:
        """(kind, payload) of the next record, or None while there is none.

        BusClosed: the driver closed and all that it published has been read, or closed here. ProtocolError: damaged.
        """
        record: tuple[int, bytes] | None = self.segment.read(AS_RECORD, 0.0)
        return record

    def try_read(self) -> bytes | None:
        """The next record's payload, or None while there is none."""
        return self.read(0.0)

    def read(self, timeout_s: float) -> bytes | None:
        """The next record's payload, waiting at most `timeout_s`; None at the deadline."""
        payload: bytes | None = self.segment.read(AS_BYTES, timeout_s)
        return payload

    def close(self) -> None:
        """Close the segment. Idempotent, from any thread."""
        self.segment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _as_record(kind: int) -> Callable[[memoryview], Any]:
    return lambda payload: (kind, bytes(payload))


AS_BYTES = (bytes, bytes)
AS_RECORD = (_as_record(0), _as_record(1))


def slot_bytes_for(num_slots: int) -> int:
    """The smallest slot with which `num_slots` of them fill whole pages."""
    return math.lcm(PAGE_BYTES, num_slots * LINE_BYTES) // num_slots


def slots_for(ring_bytes: int, slot_bytes: int) -> int:
    """How many slots of `slot_bytes` make a ring of at least `ring_bytes` in whole pages."""
    granule = math.lcm(PAGE_BYTES, slot_bytes)
    return max(2, -(-ring_bytes // granule) * granule // slot_bytes)


def make_ring(
    num_slots: int, num_readers: int, slot_bytes: int | None = None, epoch: int = 0
) -> tuple[RingWriter, list[RingReader]]:
    """A broadcast ring with all its ends in this process, each of them to be closed by the caller."""
    segment = _bus.Segment.create(
        num_workers=num_readers,
        epoch=epoch,
        num_slots=num_slots,
        slot_bytes=slot_bytes or slot_bytes_for(num_slots),
        reply_num_slots=2,
        reply_slot_bytes=PAGE_BYTES // 2,
    )
    return RingWriter(segment), [RingReader(_bus.Segment.attach(segment.fd, rank)) for rank in range(num_readers)]
