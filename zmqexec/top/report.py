"""What `zmqexec-top` shows, as numbers: two snapshots of an engine and what happened between them.

Runs in: a process of its own.

`Report` is also the schema of `--json`: one object per report, fields by name. Times are seconds, shares and
occupancies numbers from 0 to 1; null stands for what is not known: a latency of which there was none in the interval,
or the CPU of a process that cannot be seen. Totals count from the start of the engine, everything that is named a rate,
a share or a quantile is about the interval.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from zmqexec.bus.observer import Process
from zmqexec.bus.statistics import NS_PER_S, Histogram, RankSnapshot, Snapshot, Waits

STATES = {"R": "running", "S": "sleeping", "D": "in the kernel", "T": "stopped", "t": "traced", "Z": "gone"}


class Latency(Struct, frozen=True, kw_only=True):
    """How long something took, over `count` times in the interval."""

    count: int
    p50_s: float | None
    p99_s: float | None


class WaitReport(Struct, frozen=True, kw_only=True):
    """How a process waited on the bus.

    spun, parked      waits that ended without and with having parked; totals
    spun_s, parked_s  time spent either way; totals
    spun_share        of the interval's waits, those that ended without having parked
    """

    spun: int
    parked: int
    spun_s: float
    parked_s: float
    spun_share: float | None


class RankReport(Struct, frozen=True, kw_only=True):
    """One rank.

    pid                   as the worker sees it; 0: it has not attached yet
    state                 of its process: running | sleeping | in the kernel | stopped | traced | gone (a zombie);
                          null: not seen
    phase, phase_s        what it is doing, and for how long
    step                  the step it is in or has finished last; null: none yet
    lag                   messages that the driver has published and it has not read
    uptime_s              since it attached
    cpu_share             of one core
    ring_occupancy        of the broadcast ring, by what it has not read
    reply_ring_occupancy  of its own ring, by what the driver has not read
    received, replied     records; totals
    blocked_s             it has waited for room in its reply ring; total
    pickup                from the driver's publishing a record to this rank's reading it; with run-ahead, the driver
                          publishes a step while the rank still computes the one before, and this includes that time
    reply                 from the driver's publishing a record to the driver's reading this rank's reply to it
    checksum_failures     of what it read; total
    last_error            the beginning of its last error, or ""
    """

    rank: int
    pid: int
    state: str | None
    phase: str
    phase_s: float
    step: int | None
    lag: int
    uptime_s: float | None
    cpu_share: float | None
    ring_occupancy: float
    reply_ring_occupancy: float
    received: int
    replied: int
    blocked_s: float
    waits: WaitReport
    pickup: Latency
    reply: Latency
    checksum_failures: int
    last_error: str


class DriverReport(Struct, frozen=True, kw_only=True):
    """The driver. Totals, but for `cpu_share` (of one core).

    blocked_s  it has waited for room in the broadcast ring
    """

    pid: int
    state: str | None
    cpu_share: float | None
    published: int
    published_bytes: int
    blocked_s: float
    waits: WaitReport
    checksum_failures: int


class Rates(Struct, frozen=True, kw_only=True):
    """What the engine got done, per second of the interval. Prompt tokens count when their request is admitted."""

    steps_per_s: float
    prompt_tokens_per_s: float
    generation_tokens_per_s: float


class Report(Struct, frozen=True, kw_only=True):
    """One engine.

    stats   its figures by name, as on /metrics: the fields of `zmqexec.protocol.EngineStats`
    has_ended  it has been closed, or its driver has exited
    """

    name: str
    wait_policy: str
    uptime_s: float
    interval_s: float
    has_ended: bool
    kv_cache_usage: float
    rates: Rates
    stats: dict[str, int]
    driver: DriverReport
    ranks: list[RankReport]


Processes = Mapping[int, Process]
"""By pid, those of an engine that were seen at the time of a snapshot."""


def make_report(
    driver_pid: int, before: Snapshot, after: Snapshot, was: Processes, now: Processes, has_ended: bool = False
) -> Report:
    """The report of the time between two snapshots, with the engine's processes as they were at each."""
    interval_s = max(after.seconds_since(before), 1e-9)

    def cpu_share(pid: int) -> float | None:
        if pid not in was or pid not in now:
            return None
        return (now[pid].cpu_s - was[pid].cpu_s) / interval_s

    def state(pid: int) -> str | None:
        return STATES.get(now[pid].state, now[pid].state) if pid in now else None

    stats, earlier = after.engine, before.engine
    driver = after.driver
    return Report(
        name=after.name,
        wait_policy=after.wait_policy,
        uptime_s=(after.time_ns - after.created_ns) / NS_PER_S,
        interval_s=interval_s,
        has_ended=has_ended,
        kv_cache_usage=stats.num_blocks_used / stats.num_blocks if stats.num_blocks else 0.0,
        rates=Rates(
            steps_per_s=(stats.steps - earlier.steps) / interval_s,
            prompt_tokens_per_s=(stats.prompt_tokens - earlier.prompt_tokens) / interval_s,
            generation_tokens_per_s=(stats.generation_tokens - earlier.generation_tokens) / interval_s,
        ),
        stats=msgspec.structs.asdict(stats),
        driver=DriverReport(
            pid=driver_pid,
            state=state(driver_pid),
            cpu_share=cpu_share(driver_pid),
            published=driver.published,
            published_bytes=driver.published_bytes,
            blocked_s=driver.blocked_ns / NS_PER_S,
            waits=_waits(before.driver.waits, driver.waits),
            checksum_failures=driver.checksum_failures,
        ),
        ranks=[
            _rank_report(after, old, new, state(new.status.pid), cpu_share(new.status.pid))
            for old, new in zip(before.ranks, after.ranks, strict=True)
        ],
    )


def _rank_report(
    snapshot: Snapshot, before: RankSnapshot, after: RankSnapshot, state: str | None, cpu_share: float | None
) -> RankReport:
    status, counts = after.status, after.counts
    between = counts - before.counts
    return RankReport(
        rank=status.rank,
        pid=status.pid,
        state=state,
        phase=status.phase.name,
        phase_s=max(0, snapshot.time_ns - status.heartbeat_ns) / NS_PER_S if status.heartbeat_ns else 0.0,
        step=status.step_id if status.step_id >= 0 else None,
        lag=max(0, snapshot.driver.published - counts.received),
        uptime_s=(snapshot.time_ns - after.attached_ns) / NS_PER_S if after.attached_ns else None,
        cpu_share=cpu_share,
        ring_occupancy=after.unread_slots / snapshot.num_slots,
        reply_ring_occupancy=after.unread_reply_slots / snapshot.reply_num_slots,
        received=counts.received,
        replied=counts.replied,
        blocked_s=counts.blocked_ns / NS_PER_S,
        waits=_waits(before.counts.waits, counts.waits),
        pickup=_latency(between.pickup),
        reply=_latency(between.reply),
        checksum_failures=counts.checksum_failures,
        last_error=status.error,
    )


def _waits(before: Waits, after: Waits) -> WaitReport:
    return WaitReport(
        spun=after.spun,
        parked=after.parked,
        spun_s=after.spun_ns / NS_PER_S,
        parked_s=after.parked_ns / NS_PER_S,
        spun_share=(after - before).spun_share,
    )


def _latency(histogram: Histogram) -> Latency:
    return Latency(count=histogram.count, p50_s=histogram.quantile(0.5), p99_s=histogram.quantile(0.99))
