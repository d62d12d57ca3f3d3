"""The bus's part of /metrics: every rank's counters and latencies, as read from shared memory when the page is made.

Runs in: server.

The bounds of the histograms are ends of the bus's own buckets, so that the counts are exact. A duration of exactly a
bound counts as longer, which makes a difference of a nanosecond.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from zmqexec.bus.statistics import NS_PER_S, Histogram, Snapshot, Waits
from zmqexec.bus.status import Phase

LEAST_BOUND_NS = 1 << 10
"""No record is read sooner than a microsecond after it was published; octaves below would be constant lines."""

Sample = tuple[str, float]  # labels, value


def bus_lines(bus: Snapshot) -> Iterator[str]:
    """All families, each with its help and type before its samples."""
    driver, ranks = bus.driver, bus.ranks
    names = [f'rank="{rank.status.rank}"' for rank in ranks]
    each = list(zip(names, ranks, strict=True))

    yield from _family(
        "bus_published_records_total", "counter", "Messages of the driver to the workers.", [("", driver.published)]
    )
    yield from _family(
        "bus_published_bytes_total",
        "counter",
        "Their bytes in shared memory.",
        [("", driver.published_bytes)],
    )
    yield from _family(
        "bus_received_records_total", "counter", "Messages that a rank has read.",
        [(name, rank.counts.received) for name, rank in each],
    )  # fmt: skip
    yield from _family(
        "bus_reply_records_total", "counter", "Replies of a rank.", [(name, rank.counts.replied) for name, rank in each]
    )
    yield from _family(
        "bus_ring_slots", "gauge", "Slots of the broadcast ring, and of each reply ring.",
        [('ring="broadcast"', bus.num_slots), ('ring="reply"', bus.reply_num_slots)],
    )  # fmt: skip
    yield from _family(
        "bus_ring_unread_slots", "gauge", "Slots that a rank, or of its replies the driver, has not freed.",
        [(f'ring="broadcast",{name}', rank.unread_slots) for name, rank in each]
        + [(f'ring="reply",{name}', rank.unread_reply_slots) for name, rank in each],
    )  # fmt: skip

    def of_everyone(of_driver: float, of_ranks: Iterable[float]) -> list[Sample]:
        everyone = ["driver", *(f"worker {rank.status.rank}" for rank in ranks)]
        return [(f'process="{who}"', value) for who, value in zip(everyone, [of_driver, *of_ranks], strict=True)]

    yield from _family(
        "bus_blocked_seconds_total", "counter", "Time that a process waited for room in the ring it writes.",
        of_everyone(driver.blocked_ns / NS_PER_S, (rank.counts.blocked_ns / NS_PER_S for rank in ranks)),
    )  # fmt: skip
    yield from _family(
        "bus_checksum_failures_total", "counter", "Records that a process found damaged.",
        of_everyone(driver.checksum_failures, (rank.counts.checksum_failures for rank in ranks)),
    )  # fmt: skip
    waits = {"driver": driver.waits} | {f"worker {rank.status.rank}": rank.counts.waits for rank in ranks}
    yield from _waits(waits)
    yield from _family(
        "worker_phase", "gauge", "1 for what a rank is doing, 0 for everything else.",
        [(f'{name},phase="{phase.name}"', int(rank.status.phase == phase)) for name, rank in each for phase in Phase],
    )  # fmt: skip
    yield from _family(
        "worker_phase_seconds", "gauge", "For how long a rank has been doing it.",
        [(name, max(0, bus.time_ns - rank.status.heartbeat_ns) / NS_PER_S) for name, rank in each
         if rank.status.heartbeat_ns],
    )  # fmt: skip
    yield from _histograms(
        "bus_pickup_seconds", "From publishing a message to a rank's reading it.",
        [(name, rank.counts.pickup) for name, rank in each],
    )  # fmt: skip
    yield from _histograms(
        "bus_reply_seconds", "From publishing a message to reading a rank's reply to it.",
        [(name, rank.counts.reply) for name, rank in each],
    )  # fmt: skip


def _waits(waits: dict[str, Waits]) -> Iterator[str]:
    """By process, how its waits ended and what they took."""
    yield from _family(
        "bus_waits_total", "counter", "Waits for a message that ended awake, or after having parked.",
        [(f'process="{who}",how="{how}"', count) for who, one in waits.items()
         for how, count in (("spun", one.spun), ("parked", one.parked))],
    )  # fmt: skip
    yield from _family(
        "bus_wait_seconds_total", "counter", "Time that a process waited for a message, awake or parked.",
        [(f'process="{who}",how="{how}"', ns / NS_PER_S) for who, one in waits.items()
         for how, ns in (("spun", one.spun_ns), ("parked", one.parked_ns))],
    )  # fmt: skip


def _family(name: str, kind: str, help: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield from _head(name, kind, help)
    for labels, value in samples:
        yield f"zmqexec_{name}{{{labels}}} {value}" if labels else f"zmqexec_{name} {value}"


def _histograms(name: str, help: str, samples: Iterable[tuple[str, Histogram]]) -> Iterator[str]:
    yield from _head(name, "histogram", help)
    for labels, histogram in samples:
        for bound_ns, count in histogram.by_octave():
            if bound_ns >= LEAST_BOUND_NS:
                yield f'zmqexec_{name}_bucket{{{labels},le="{bound_ns / NS_PER_S}"}} {count}'
        yield f'zmqexec_{name}_bucket{{{labels},le="+Inf"}} {histogram.count}'
        yield f"zmqexec_{name}_sum{{{labels}}} {histogram.sum_ns / NS_PER_S}"
        yield f"zmqexec_{name}_count{{{labels}}} {histogram.count}"


def _head(name: str, kind: str, help: str) -> Iterator[str]:
    yield f"# HELP zmqexec_{name} {help}"
    yield f"# TYPE zmqexec_{name} {kind}"
