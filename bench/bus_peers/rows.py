"""From samples to rows: the numbers of one transport in one cell over all repetitions.

Runs in: the benchmark.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bus_peers.plan import Cell

MIN_SAMPLES_P999 = 1000

Row = dict[str, Any]


def make_row(peer: str, num_readers: int, cell: Cell, answers: list[dict[str, Any]]) -> Row:
    """p50 and p99 are medians over the repetitions of each one's own; p99.9 is of all samples together.

    cpu_us_per_round_trip  CPU time of all processes of the group, also of those that the library itself started
    worker_cpu_percent     paced: of a core, of the busiest worker
    idle_percent           after a message: of a core, of the whole group, each window of one second by itself
    """
    row: Row = {
        "peer": peer,
        "readers": num_readers,
        "mode": cell.mode,
        "payload_bytes": cell.num_bytes,
        "replies": cell.replies,
        "period_ms": cell.period_ms,
    }
    reasons = [answer["unsupported"] for answer in answers if "unsupported" in answer]
    if reasons:
        return row | {"unsupported": reasons[0]}
    repetitions = [answer["samples_ns"] for answer in answers]
    pooled = [sample for samples in repetitions for sample in samples]
    row |= {
        "samples": len(pooled),
        "p50_us": _us(statistics.median(percentile(samples, 0.5) for samples in repetitions)),
        "p99_us": _us(statistics.median(percentile(samples, 0.99) for samples in repetitions)),
        "p999_us": _us(percentile(pooled, 0.999)) if len(pooled) >= MIN_SAMPLES_P999 else None,
        "p50_us_each": [_us(percentile(samples, 0.5)) for samples in repetitions],
        "p99_us_each": [_us(percentile(samples, 0.99)) for samples in repetitions],
    }
    if cell.mode == "silence":
        row["p50_us"] = _us(percentile(pooled, 0.5))  # a repetition has one or two
        row["p99_us"] = None
        for name, index in (("idle_first_second_percent", 0), ("idle_after_percent", 1)):
            windows = [window for answer in answers for window in answer["windows"][index]]
            row[name] = [round(100 * window["cpu_ns"] / window["wall_ns"], 4) for window in windows]
        return row
    spent = [answer["cpu_ns"] / len(answer["samples_ns"]) for answer in answers]
    row["cpu_us_per_round_trip"] = _us(statistics.median(spent))
    if cell.mode == "paced":
        busiest = [100 * max(answer["worker_cpu_ns"]) / answer["wall_ns"] for answer in answers]
        row["worker_cpu_percent"] = round(statistics.median(busiest), 3)
    return row


def percentile(samples: Sequence[int], share: float) -> float:
    """The smallest sample that at least `share` of all do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _us(nanoseconds: float) -> float:
    return round(nanoseconds / 1000, 3)
