"""Which measurements, with which budgets. A transport's turn is a list of cells; turns alternate.

Runs in: the benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bus_peers.registry import Entry

KIB, MIB = 1 << 10, 1 << 20
USUAL_BYTES = 4 * KIB  # of paced steps and of those after silence
NEAR_READERS = (1, 2)
SLACK_S = 40.0


@dataclass(frozen=True)
class Cell:
    """One measurement: `mode` is the method of `host.Host` that makes it.

    replies    "all" or "rank 0"
    arguments  of the method, beyond size and replies
    """

    mode: str
    num_bytes: int
    replies: str
    period_ms: float | None
    arguments: tuple[tuple[str, Any], ...]
    expected_s: float

    def command(self, num_readers: int) -> dict[str, Any]:
        num_replies = num_readers if self.replies == "all" else 1
        return {"do": self.mode, "num_bytes": self.num_bytes, "num_replies": num_replies, **dict(self.arguments)}

    @property
    def deadline_s(self) -> float:
        return 2 * self.expected_s + SLACK_S


@dataclass(frozen=True)
class Plan:
    """Budgets of a run.

    budget_s       of a back-to-back cell, per repetition
    max_samples    of such a cell, per repetition
    paced          steps per repetition by period in ms
    silences       of two seconds, per repetition, of `near` transports with one reader; of others, and with two, one
    silent_in      in how many repetitions there are silences, of `near` transports and of others: they take most time
    """

    repetitions: int
    readers: tuple[int, ...]
    payloads: tuple[int, ...]
    budget_s: float
    paced: dict[float, int]
    silences: int
    silent_in: tuple[int, int]
    min_samples: int = 20
    min_large_samples: int = 3
    max_samples: int = 5000

    def cells(self, entry: Entry, num_readers: int, repetition: int) -> list[Cell]:
        """What is measured of a transport in its turn."""
        cells = []
        for num_bytes in self.payloads:
            for replies in ("all", "rank 0") if num_readers > 1 else ("all",):
                min_samples = self.min_large_samples if num_bytes >= MIB else self.min_samples
                budget = (
                    ("budget_s", self.budget_s),
                    ("min_samples", min_samples),
                    ("max_samples", self.max_samples),
                )
                cells.append(Cell("back_to_back", num_bytes, replies, None, budget, self.budget_s))
        if entry.silent and num_readers in (NEAR_READERS if entry.near else (1,)):
            for period_ms, count in self.paced.items():
                pace = (("period_s", period_ms / 1000), ("count", count))
                cells.append(Cell("paced", USUAL_BYTES, "all", period_ms, pace, count * period_ms / 1000))
            silences = self.silences if entry.near and num_readers == 1 else 1
            if repetition < self.silent_in[0 if entry.near else 1]:
                cells.append(Cell("silence", USUAL_BYTES, "all", None, (("count", silences),), 2.0 * silences))
        return cells


def full(readers: tuple[int, ...]) -> Plan:
    payloads = (256, USUAL_BYTES, 64 * KIB, MIB, 16 * MIB)
    return Plan(3, readers, payloads, 0.08, {2.0: 150, 5.0: 100, 20.0: 25}, silences=2, silent_in=(3, 2))


def quick(readers: tuple[int, ...]) -> Plan:
    return Plan(3, readers, (USUAL_BYTES, MIB), 0.03, {5.0: 30}, silences=1, silent_in=(1, 0), min_samples=5)
