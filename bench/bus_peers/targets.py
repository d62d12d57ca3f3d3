"""What is wanted of the bus, held against the rows of one run.

Runs in: the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bus_peers.peer import has_cpu_clocks
from bus_peers.plan import MIB, USUAL_BYTES
from bus_peers.registry import OURS, is_rival
from bus_peers.rows import Row

MANY_CORES = 16
ABOVE_BARE_US = 3.0
ONE_READER = {"vllm": 5, "ray-graph": 7, "zmq": 20, "ray-actors": 150}
FOUR_READERS = {"vllm": 4, "pipe": 3}
P99_OVER_P50 = 5
ON_MANY_CORES_US = {1: 5, 2: 7, 4: 10, 8: 16}
IDLE_PERCENT = {"idle_first_second_percent": 0.5, "idle_after_percent": 0.1}
PACED_OVER_BARE, PACED_CPU_PERCENT = 1.5, 5
FIRST_OVER_BARE, FIRST_OVER_PYTHON = 2, 1.25
LARGE_OVER_REFERENCE = 1.5
ENCODING_US = {
    "unchanged batch": (1, 1),
    "one admission and a new block in every sequence": (15, 15),
    "256 admissions": (60, 150),
}
UNCHANGED_BYTES = 200


@dataclass(frozen=True)
class Target:
    """One line: what is wanted, what was measured; `met` is None where it could not be measured or does not apply."""

    line: str
    wanted: str
    measured: str
    met: bool | None


class Targets:
    """All lines, from the rows of a run on `cores` cores; `pinned` are the reader counts with a core per process."""

    def __init__(self, rows: list[Row], encoding: list[dict[str, Any]], cores: int, pinned: set[int]) -> None:
        self._rows = rows
        self._cores = cores
        self.found: list[Target] = []
        self._one_reader(pinned)
        self._several_readers()
        self._many_cores()
        self._quiet()
        self._large()
        self._encoding(encoding)

    def _row(self, peer: str, readers: int, mode: str = "back_to_back", **fields: Any) -> Row | None:
        wanted = {"payload_bytes": USUAL_BYTES, "replies": "all", **fields}
        for row in self._rows:
            if (row["peer"], row["readers"], row["mode"]) == (peer, readers, mode) and "p50_us" in row:  # noqa: SIM102
                if all(row[name] == value for name, value in wanted.items()):
                    return row
        return None

    def _p50(self, peer: str, readers: int, mode: str = "back_to_back", **fields: Any) -> float | None:
        row = self._row(peer, readers, mode, **fields)
        return None if row is None else row["p50_us"]

    def _zmq(self, readers: int) -> float | None:
        """The faster of the two ZeroMQ patterns."""
        both = [self._p50(peer, readers) for peer in ("zmq-pub", "zmq-push")]
        return min((value for value in both if value is not None), default=None)

    def _judge(
        self, line: str, wanted: str, values: list[float | None], tell: Callable[..., tuple[str, bool]], note: str = ""
    ) -> None:
        if any(value is None for value in values):
            self.found.append(Target(line, wanted, note or "not measured", None))
            return
        measured, met = tell(*values)
        self.found.append(Target(line, wanted, f"{measured}; {note}" if note else measured, None if note else met))

    def _faster(self, line: str, peer: str, factor: float, ours: float | None, theirs: float | None) -> None:
        def tell(ours: float, theirs: float) -> tuple[str, bool]:
            return f"{theirs / ours:.1f} × ({ours:.1f} and {theirs:.1f} µs)", theirs >= factor * ours

        self._judge(line, f"≥ {factor} × faster than {peer}", [ours, theirs], tell)

    def _at_most(self, line: str, what: str, factor: float, ours: float | None, base: float | None) -> None:
        def tell(ours: float, base: float) -> tuple[str, bool]:
            return f"{ours / base:.2f} × ({ours:.1f} and {base:.1f} µs)", ours <= factor * base

        self._judge(line, f"≤ {factor} × {what}", [ours, base], tell)

    def _one_reader(self, pinned: set[int]) -> None:
        line = "1 reader, 4 KiB, a core for each process"
        note = "" if 1 in pinned else "processes were not pinned"

        def above(ours: float, bare: float) -> tuple[str, bool]:
            return f"+ {ours - bare:.1f} µs ({ours:.1f} and {bare:.1f})", ours <= bare + ABOVE_BARE_US

        ours = self._p50(OURS, 1)
        self._judge(
            line, f"p50 ≤ C called from Python + {ABOVE_BARE_US} µs", [ours, self._p50("c-python", 1)], above, note
        )
        for peer, factor in ONE_READER.items():
            self._faster(line, peer, factor, ours, self._zmq(1) if peer == "zmq" else self._p50(peer, 1))

    def _several_readers(self) -> None:
        self._faster("2 readers, 4 KiB", "vllm", 4, self._p50(OURS, 2), self._p50("vllm", 2))
        line = "4 readers, 4 KiB"
        for peer, factor in FOUR_READERS.items():
            self._faster(line, peer, factor, self._p50(OURS, 4), self._p50(peer, 4))
        row = self._row(OURS, 4) or {}

        def tail(p50: float, p99: float) -> tuple[str, bool]:
            return f"{p99 / p50:.1f} × ({p50:.1f} and {p99:.1f} µs)", p99 <= P99_OVER_P50 * p50

        self._judge(line, f"p99 ≤ {P99_OVER_P50} × p50", [row.get("p50_us"), row.get("p99_us")], tail)

    def _many_cores(self) -> None:
        few = "" if self._cores >= MANY_CORES else f"{self._cores} cores"
        for readers, limit_us in ON_MANY_CORES_US.items():
            self._judge(
                f"{readers} readers, 4 KiB, {MANY_CORES} cores or more",
                f"p50 ≤ {limit_us} µs",
                [self._p50(OURS, readers)],
                lambda p50, limit_us=limit_us: (f"{p50:.1f} µs", p50 <= limit_us),
                few,
            )

    def _quiet(self) -> None:
        for readers in (1, 2):
            row = self._row(OURS, readers, "silence") or {}
            for window, limit in IDLE_PERCENT.items():
                self._judge(
                    f"idle, {readers} readers",
                    f"{window.split('_')[1]}: every second < {limit} % of a core",
                    [max(row[window]) if window in row else None],
                    lambda worst, limit=limit: (f"{worst:.3f} %", worst < limit),
                    "" if has_cpu_clocks() else "CPU times are only known in ticks here",
                )
            row = self._row(OURS, readers, "paced", period_ms=5.0) or {}
            line = f"paced at 5 ms, {readers} readers"
            bare = self._p50("c-wake", readers, "paced", period_ms=5.0)
            self._at_most(line, "a bare futex wake, paced", PACED_OVER_BARE, row.get("p50_us"), bare)
            self._judge(
                line,
                f"≤ {PACED_CPU_PERCENT} % of a core per worker",
                [row.get("worker_cpu_percent")],
                lambda percent: (f"{percent:.2f} %", percent <= PACED_CPU_PERCENT),
            )
            peers = (OURS, "c-wake", "c-python-structs-wake")
            first, bare, floor = (self._p50(peer, readers, "silence") for peer in peers)
            line = f"first message after 2 s, {readers} readers"
            self._at_most(line, "a bare futex wake", FIRST_OVER_BARE, first, bare)
            self._at_most(line, "a futex wake from Python with structs", FIRST_OVER_PYTHON, first, floor)

    def _large(self) -> None:
        for num_bytes in (MIB, 16 * MIB):
            line = f"2 readers, {num_bytes // MIB} MiB"
            ours = self._p50(OURS, 2, payload_bytes=num_bytes)
            reference = self._p50("reference", 2, payload_bytes=num_bytes)
            self._at_most(line, "shared memory in pure Python", LARGE_OVER_REFERENCE, ours, reference)
            rivals = {
                row["peer"]: self._p50(row["peer"], 2, payload_bytes=num_bytes)
                for row in self._rows
                if is_rival(row["peer"])
            }
            known = {peer: p50 for peer, p50 in rivals.items() if p50 is not None}
            best = min(known, key=lambda peer: known[peer], default="")

            def beats(ours: float, theirs: float, best: str = best) -> tuple[str, bool]:
                return f"{theirs / ours:.2f} × {best} ({ours:.1f} and {theirs:.1f} µs)", ours < theirs

            self._judge(line, "faster than every peer", [ours, known.get(best)], beats)

    def _encoding(self, encoding: list[dict[str, Any]]) -> None:
        for row in encoding:
            line = f"256 sequences, {row['case']}"
            for way, limit_us in zip(("encode", "decode"), ENCODING_US[row["case"]], strict=True):
                self._judge(
                    line,
                    f"{way} ≤ {limit_us} µs",
                    [row[f"{way}_us"]],
                    lambda us, limit_us=limit_us: (f"{us:.2f} µs", us <= limit_us),
                )
            if row["case"] == "unchanged batch":
                size = row["bytes"]
                self._judge(line, f"≤ {UNCHANGED_BYTES} bytes", [size], lambda n: (f"{n} bytes", n <= UNCHANGED_BYTES))
