"""What `zmqexec-top` shows, as lines of text.

Runs in: a process of its own.
"""

from __future__ import annotations

from zmqexec.bus.observer import Observer
from zmqexec.top.report import DriverReport, Latency, RankReport, Report, WaitReport

COLUMNS = (
    "rank", "pid", "up", "state", "phase", "for", "step", "lag", "ring", "replies", "pick-up p50 / p99",
    "reply p50 / p99", "blocked", "spun", "CPU",
)  # fmt: skip
LEFT_ALIGNED = {"state", "phase"}


def lines_of(report: Report) -> list[str]:
    """The whole report."""
    stats, rates, driver = report.stats, report.rates, report.driver
    lines = [
        f"{printable(report.name)}   pid {driver.pid}   up {_uptime(report.uptime_s)}   "
        f"{len(report.ranks)} worker{'s' if len(report.ranks) > 1 else ''}   wait policy {report.wait_policy}"
        + ("   HAS ENDED" if report.has_ended else ""),
        f"  {rates.generation_tokens_per_s:,.0f} tokens/s out   {rates.prompt_tokens_per_s:,.0f} tokens/s in   "
        f"{rates.steps_per_s:,.1f} steps/s   over {report.interval_s:.1f} s",
        f"  {stats['num_running']} running   {stats['num_waiting']} waiting   "
        f"KV cache {_percent(report.kv_cache_usage)} of {stats['num_blocks']} blocks   "
        f"{stats['preemptions']} preemptions",
        *_driver_lines(driver, stats),
        "",
        *_table([COLUMNS, *(_row(rank) for rank in report.ranks)]),
    ]
    lines += [f"rank {rank.rank} last error: {printable(rank.last_error)}" for rank in report.ranks if rank.last_error]
    return lines


def list_of(engines: list[Observer]) -> list[str]:
    """One line for each engine: how to name it here, and its name."""
    names = [reference_of(engine, engines) for engine in engines]
    width = max(map(len, names), default=0)
    return [f"{name:>{width}}  {printable(engine.name)}" for name, engine in zip(names, engines, strict=True)]


def reference_of(engine: Observer, engines: list[Observer]) -> str:
    """The engine's pid; PID:FD where its process has several."""
    alone = [other.pid for other in engines].count(engine.pid) == 1
    return str(engine.pid) if alone else f"{engine.pid}:{engine.fd}"


def printable(text: str) -> str:
    """`text` without anything that a terminal would take for a command."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _driver_lines(driver: DriverReport, stats: dict[str, int]) -> list[str]:
    dropped = {
        "stale replies": stats["stale_replies"],
        "replies of another epoch": stats["wrong_epoch_replies"],
        "checksum failures of the driver": driver.checksum_failures,
    }
    return [
        f"  driver {driver.state or '?'}   CPU {_percent(driver.cpu_share)}   published {driver.published:,} messages, "
        f"{driver.published_bytes:,} bytes   blocked {_duration(driver.blocked_s)}   spun {_spun(driver.waits)}",
        *(f"  {count} {what}" for what, count in dropped.items() if count),
    ]


def _row(rank: RankReport) -> tuple[str, ...]:
    checksums = f" ({rank.checksum_failures} checksum failures)" if rank.checksum_failures else ""
    return (
        str(rank.rank),
        str(rank.pid) if rank.pid else "-",
        "-" if rank.uptime_s is None else _uptime(rank.uptime_s),
        rank.state or "-",
        rank.phase + checksums,
        _duration(rank.phase_s),
        "-" if rank.step is None else str(rank.step),
        str(rank.lag),
        _percent(rank.ring_occupancy),
        _percent(rank.reply_ring_occupancy),
        _latency(rank.pickup),
        _latency(rank.reply),
        _duration(rank.blocked_s),
        _spun(rank.waits),
        _percent(rank.cpu_share),
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if name in LEFT_ALIGNED else f"{cell:>{width}}"
            for name, cell, width in zip(COLUMNS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _latency(latency: Latency) -> str:
    if latency.p50_s is None or latency.p99_s is None:
        return "-"
    return f"{_duration(latency.p50_s)} / {_duration(latency.p99_s)}"


def _spun(waits: WaitReport) -> str:
    return _percent(waits.spun_share)


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    """Three digits and a unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs" if seconds else "0 s"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"


def _uptime(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
