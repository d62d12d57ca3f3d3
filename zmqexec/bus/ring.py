"""Rings in shared memory: one writer, and every reader sees every record; the slowest reader holds the writer back.

Runs in: driver | worker.

Loss: none. A record is delivered once to each reader, whole and in order, or the reader gets an error.
Threads: a ring has one writing and per head one reading thread; `close` may come from any.
Waiting: see `wait_until`. No wait is without a deadline.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self, TypeVar

from zmqexec import _bus
from zmqexec.errors import BusTimeout

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

LINE_BYTES = 64
PAGE_BYTES = mmap.PAGESIZE
CHECK_S = 0.01
"""How long a writer that waits for space may go without looking at what else its caller has to see to."""

T = TypeVar("T")


def wait_until(
    segment: _bus.Segment,
    bell: int,
    attempt: Callable[[], T],
    timeout_s: float,
    spin_us: float,
    longest_s: Callable[[], float] = lambda: math.inf,
) -> T | None:
    """Call `attempt` until it returns something, waiting for `bell` in between; None at the deadline.

    The bell is read before the attempt and waited for after it, so that no ring between the two is missed. `longest_s`
    says how long the next wait may be, where something matters that rings no bell.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        seen = segment.bell_value(bell)
        result = attempt()
        if result is not None:
            return result
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            return None
        segment.wait(bell, seen, min(remaining_s, longest_s()), spin_us)


class RingWriter:
    """The writing end of a segment's outgoing ring: the driver's broadcast ring, or a worker's reply ring.

    Each header word has one writing process: `tail` is ours, `heads[i]` is reader i's. Whoever opened the segment
    closes it; closing the writer does that too.
    """

    def __init__(self, segment: _bus.Segment, spin_us: float = 0.0) -> None:
        self.segment = segment
        self.max_payload_bytes = segment.max_payload_bytes
        self._space_bell = _bus.SPACE_BELL if segment.rank < 0 else _bus.REPLY_SPACE_BELL
        self._spin_us = spin_us

    def try_write(self, payload: ReadableBuffer, kind: int = 0) -> bool:
        """Publish a copy of `payload`; False while the slowest reader is a full ring behind.

        ValueError: more than `max_payload_bytes`, which no amount of reading would make fit. BusClosed: closed here or
        by the driver.
        """
        return self.segment.try_write(payload, kind)

    def write(
        self, payload: ReadableBuffer, timeout_s: float, kind: int = 0, check: Callable[[], None] | None = None
    ) -> None:
        """Publish a copy of `payload`, waiting for space at most `timeout_s`.

        `check` is called every `CHECK_S` and may raise to give up. BusTimeout: names the readers that hold us back.
        """
        if self.segment.try_write(payload, kind):
            return

        def attempt() -> bool | None:
            if self.segment.try_write(payload, kind):
                return True
            if check is not None:
                check()
            return None

        longest_s = math.inf if check is None else CHECK_S
        if wait_until(self.segment, self._space_bell, attempt, timeout_s, self._spin_us, lambda: longest_s) is None:
            num_bytes = memoryview(payload).nbytes
            if self.segment.rank >= 0:
                slow = "the driver has not made room"
            else:
                ranks = self.segment.holding_back(num_bytes)
                slow = f"held back by {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
            raise BusTimeout(f"no room for a record of {num_bytes} bytes within {timeout_s:g} s: {slow}")

    def close(self) -> None:
        """Close the segment. Idempotent, from any thread."""
        self.segment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class RingReader:
    """The reading end of a segment's incoming ring: the broadcast ring, or in the driver the replies of rank `index`.

    Owns its head: the slots up to it belong to the writer again.
    """

    def __init__(self, segment: _bus.Segment, index: int = 0, spin_us: float = 0.0) -> None:
        self.segment = segment
        self._index = index
        self._data_bell = _bus.DRIVER_BELL if segment.rank < 0 else _bus.WORKER_BELL
        self._spin_us = spin_us

    def try_read_record(self) -> tuple[int, bytes] | None:
        """(kind, payload) of the next record, or None while there is none.

        BusClosed: the driver closed and all that it published has been read, or closed here. ProtocolError: damaged.
        """
        return self.segment.try_read(self._index)

    def try_read(self) -> bytes | None:
        """The next record's payload, or None while there is none."""
        record = self.segment.try_read(self._index)
        return None if record is None else record[1]

    def read(self, timeout_s: float) -> bytes | None:
        """The next record's payload, waiting at most `timeout_s`; None at the deadline."""
        return wait_until(self.segment, self._data_bell, self.try_read, timeout_s, self._spin_us)

    def close(self) -> None:
        """Close the segment. Idempotent, from any thread."""
        self.segment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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
