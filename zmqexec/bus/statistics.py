"""What the bus and its engine have done so far, as figures: decoded from the status pages, without asking anybody.

Runs in: driver | server | a process of its own (`zmqexec-top`).

A `Snapshot` is everything at one moment. Its counts only grow, so the difference of two snapshots says what happened in
between: rates, and quantiles of the latencies of just that time. Each word is read by itself, so that two counts of one
snapshot may be a record apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from zmqexec.bus.status import WorkerStatus
from zmqexec.config import WAIT_POLICIES
from zmqexec.protocol import EngineStats

if TYPE_CHECKING:
    from zmqexec import _bus

NS_PER_S = 1_000_000_000
BUCKET_FIRST_OCTAVE = 8
"""As in csrc/bus/layout.h. Not asked of the extension, which some platforms do not have."""

BUCKETS_PER_OCTAVE = 4


def bucket_begin_ns(bucket: int) -> int:
    """The shortest duration that a histogram counts in `bucket`; the first bucket takes all shorter ones too."""
    octave, quarter = divmod(bucket, BUCKETS_PER_OCTAVE)
    return (BUCKETS_PER_OCTAVE + quarter) << (BUCKET_FIRST_OCTAVE + octave) >> 2


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers that only grow. The difference of two is what happened between them."""

    def __sub__(self, earlier: Self) -> Self:
        fields = [field.name for field in dataclasses.fields(self)]
        return type(self)(*(getattr(self, name) - getattr(earlier, name) for name in fields))


@dataclass(frozen=True, slots=True)
class Histogram(Counts):
    """Durations by size.

    Bucket b counts those in [bucket_begin_ns(b), bucket_begin_ns(b + 1)); the first also all shorter ones, the last
    all longer ones.
    """

    sum_ns: int
    counts: tuple[int, ...]

    def __sub__(self, earlier: Self) -> Self:
        counts = tuple(now - before for now, before in zip(self.counts, earlier.counts, strict=True))
        return type(self)(self.sum_ns - earlier.sum_ns, counts)

    @property
    def count(self) -> int:
        """How many durations were recorded."""
        return sum(self.counts)

    def by_octave(self) -> list[tuple[int, int]]:
        """(bound_ns, how many were shorter) for every power of two that is the end of a bucket, but for the last."""
        below = list(itertools.accumulate(self.counts))
        return [
            (bucket_begin_ns(bucket), below[bucket - 1])
            for bucket in range(BUCKETS_PER_OCTAVE, len(self.counts), BUCKETS_PER_OCTAVE)
        ]

    def quantile(self, q: float) -> float | None:
        """The duration in seconds that a share `q` of them does not exceed; None if there are none.

        Within a bucket they are taken to be spread evenly, so that it is off by less than the bucket's width: a
        quarter. One in the last bucket is as long as the bucket's beginning, at least.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q={q}: a share is a number in [0, 1]")
        wanted = q * self.count
        seen = 0
        for bucket, count in enumerate(self.counts):
            if count and seen + count >= wanted:
                begin_ns = bucket_begin_ns(bucket) if bucket else 0
                end_ns = bucket_begin_ns(bucket + 1) if bucket + 1 < len(self.counts) else begin_ns
                return (begin_ns + (end_ns - begin_ns) * max(0.0, wanted - seen) / count) / NS_PER_S
            seen += count
        return None


@dataclass(frozen=True, slots=True)
class Waits(Counts):
    """How the waits of a process ended, awake or parked, and the time spent either way."""

    spun: int
    parked: int
    spun_ns: int
    parked_ns: int

    @property
    def spun_share(self) -> float | None:
        """The share of the waits that ended without having parked; None if there were none."""
        waits = self.spun + self.parked
        return self.spun / waits if waits else None


@dataclass(frozen=True, slots=True)
class DriverCounts(Counts):
    """What the driver has published, and how it waited for replies.

    blocked_ns         waiting for room in the broadcast ring
    checksum_failures  of replies
    """

    published: int
    published_bytes: int
    blocked_ns: int
    checksum_failures: int
    waits: Waits


@dataclass(frozen=True, slots=True)
class RankCounts(Counts):
    """What one rank has received and replied, and how it waited for records.

    blocked_ns         waiting for room in its reply ring
    checksum_failures  of records of the broadcast ring
    pickup             from publishing a record to reading it on this rank
    reply              from publishing a record to the driver's reading this rank's reply to it
    """

    received: int
    replied: int
    blocked_ns: int
    checksum_failures: int
    waits: Waits
    pickup: Histogram
    reply: Histogram


@dataclass(frozen=True, slots=True)
class RankSnapshot:
    """One rank at one moment.

    attached_ns         CLOCK_MONOTONIC when its process took the rank; 0 before
    unread_slots        of the broadcast ring, that this rank has not freed
    unread_reply_slots  of its reply ring, that the driver has not freed
    """

    status: WorkerStatus
    attached_ns: int
    unread_slots: int
    unread_reply_slots: int
    counts: RankCounts


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An engine's bus at one moment. Times are CLOCK_MONOTONIC.

    engine     the engine's own figures, as the driver last showed them (`DriverChannel.set_gauges`)
    engine_ns  when that was; 0: not yet
    """

    time_ns: int
    name: str
    driver_pid: int
    created_ns: int
    wait_policy: str
    num_slots: int
    reply_num_slots: int
    driver: DriverCounts
    engine: EngineStats
    engine_ns: int
    ranks: tuple[RankSnapshot, ...]

    @classmethod
    def of(cls, segment: _bus.Segment) -> Self:
        """What the status pages of `segment` say now. BusClosed: closed here. ProtocolError: they are damaged."""
        name, driver_pid, created_ns, wait_policy, num_slots, reply_num_slots = segment.header()
        published, published_bytes, blocked_ns, failures, waits, gauges, gauges_ns, ranks = segment.statistics()
        return cls(
            time_ns=time.monotonic_ns(),
            name=name,
            driver_pid=driver_pid,
            created_ns=created_ns,
            wait_policy=WAIT_POLICIES[wait_policy],
            num_slots=num_slots,
            reply_num_slots=reply_num_slots,
            driver=DriverCounts(published, published_bytes, blocked_ns, failures, Waits(*waits)),
            engine=EngineStats(*gauges[: len(EngineStats.__struct_fields__)]),
            engine_ns=gauges_ns,
            ranks=tuple(_rank_snapshot(segment, rank, figures) for rank, figures in enumerate(ranks)),
        )

    def seconds_since(self, earlier: Snapshot) -> float:
        """Time between two snapshots."""
        return (self.time_ns - earlier.time_ns) / NS_PER_S


def _rank_snapshot(segment: _bus.Segment, rank: int, figures: _bus.RankStatistics) -> RankSnapshot:
    attached_ns, received, replied, blocked_ns, failures, unread, unread_replies, waits, pickup, reply = figures
    return RankSnapshot(
        status=WorkerStatus.of(rank, *segment.status(rank)),
        attached_ns=attached_ns,
        unread_slots=unread,
        unread_reply_slots=unread_replies,
        counts=RankCounts(
            received, replied, blocked_ns, failures, Waits(*waits), _histogram(*pickup), _histogram(*reply)
        ),
    )


def _histogram(sum_ns: int, counts: list[int]) -> Histogram:
    return Histogram(sum_ns, tuple(counts))
