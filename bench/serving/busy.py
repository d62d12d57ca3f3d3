"""How much of a decode step the device computes, how much it waits, and what the host does meanwhile. Imports no torch.

A mark directly before and after each graph, or before and after the copies that are launched with it by one call, tells
when the device began and ended it; on the host a clock runs around the parts of a launch. Modes of run-ahead take turns
in short rounds, for the context grows with every step.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from serving.clock import percentiles

WARM_UP_STEPS = 10
ROUNDS = 10
SETTLING_STEPS = 2
"""At the beginning of a round, untimed: until as many steps are outstanding as there may be."""
ROUND_STEPS = 10
PROFILED_STEPS = 10
SPARE_STEPS = 26
"""For sequences that came in first, and decode while the others' prompts are computed."""

MARKS = "marks"

Value = TypeVar("Value")


def num_steps(num_modes: int) -> int:
    """Output tokens that a sequence must have for all of it."""
    return WARM_UP_STEPS + num_modes * ROUNDS * (SETTLING_STEPS + ROUND_STEPS) + PROFILED_STEPS + SPARE_STEPS


class Mark(Protocol):
    """A point in the device's time: `torch.cuda.Event(enable_timing=True)`, or a `HostMark`."""

    def record(self) -> None: ...
    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from here to there, once both have passed."""
        ...


class HostMark:
    """Where launching is computing: a point in the host's time."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def record(self) -> None:
        self.time_s = time.perf_counter()

    def elapsed_time(self, end: HostMark) -> float:
        return 1e3 * (end.time_s - self.time_s)


Span = tuple[Mark, Mark]


class Watch:
    """Stands around a runner's parts. Between `begin(mode)` and `end` it takes notes, else it lets everything pass."""

    def __init__(self, make_mark: Callable[[], Mark], num_modes: int) -> None:
        self._marks = [make_mark() for _ in range(2 * num_modes * ROUNDS * ROUND_STEPS)]
        for mark in self._marks:
            mark.record()  # which creates it: not in the middle of a step
        self._mode: int | None = None
        self._parts_s: dict[str, float] = {}
        self._begin = (0.0, 0.0)
        self._rounds: dict[int, list[list[Span]]] = defaultdict(list)
        self._steps_s: dict[int, list[dict[str, float]]] = defaultdict(list)
        self._wall_s: dict[int, float] = defaultdict(float)
        self._cpu_s: dict[int, float] = defaultdict(float)

    def begin(self, mode: int) -> None:
        """A round of steps with this run-ahead."""
        self._mode = mode
        self._rounds[mode].append([])
        self._begin = (time.perf_counter(), time.process_time())

    def end(self) -> None:
        """The round's end."""
        assert self._mode is not None
        self._wall_s[self._mode] += time.perf_counter() - self._begin[0]
        self._cpu_s[self._mode] += time.process_time() - self._begin[1]
        self._mode = None

    def step(self, launch: Callable[[], Value]) -> Value:
        """What `launch` returns: one step."""
        self._parts_s = {}
        begin = time.perf_counter()
        value = launch()
        if self._mode is not None:
            self._steps_s[self._mode].append({"all": time.perf_counter() - begin, **self._parts_s})
        return value

    def part(self, name: str, function: Callable[..., Value]) -> Callable[..., Value]:
        """`function` with a clock around it."""

        def timed(*arguments: Any) -> Value:
            begin = time.perf_counter()
            value = function(*arguments)
            self._parts_s[name] = self._parts_s.get(name, 0.0) + time.perf_counter() - begin
            return value

        return timed

    def marked(self, function: Callable[..., Value]) -> Callable[..., Value]:
        """`function`, which makes the device compute, between two marks."""

        def spanned(*arguments: Any) -> Value:
            if self._mode is None:
                return function(*arguments)
            begin, end = self._marks.pop(), self._marks.pop()
            record(begin)
            value = function(*arguments)
            record(end)
            self._rounds[self._mode][-1].append((begin, end))
            return value

        record = self.part(MARKS, lambda mark: mark.record())
        return spanned

    def figures(self, mode: int) -> dict[str, Any]:
        """Of all rounds with this run-ahead, after the device has done them.

        host_us, host_parts_us  launching a step, without the marks
        wall_us                 from step to step
        cpu_share               CPU seconds of this process, all threads, per second
        graph_us ... busy_share as `device_figures`
        """
        steps = self._steps_s[mode]
        whole = [step["all"] - step.get(MARKS, 0.0) for step in steps]
        names = [name for name in dict.fromkeys(itertools.chain(*steps)) if name not in ("all", MARKS)]
        parts = {name: [step.get(name, 0.0) for step in steps] for name in names}
        parts["other"] = [all_s - sum(own) for all_s, *own in zip(whole, *parts.values(), strict=True)]
        return {
            "run_ahead": mode,
            "host_us": round(1e6 * statistics.median(whole), 1),
            "host_parts_us": {name: _p50_p99(1e6 * s for s in own) for name, own in {"all": whole, **parts}.items()},
            "wall_us": round(1e6 * self._wall_s[mode] / len(steps), 1),
            "cpu_share": round(self._cpu_s[mode] / self._wall_s[mode], 4),
            **device_figures(self._rounds[mode]),
        }


def device_figures(rounds: list[list[Span]]) -> dict[str, Any]:
    """Of the graphs of each round, in the order in which they ran.

    graph_us    from a graph's begin to its end
    gap_us      from one's end to the next one's begin
    busy_share  graphs of the time from the first begin to the last end
    """
    graphs = [begin.elapsed_time(end) for spans in rounds for begin, end in spans]
    gaps = [end.elapsed_time(begin) for spans in rounds for (_, end), (begin, _) in itertools.pairwise(spans)]
    if not graphs:
        return {"graph_us": None, "gap_us": None, "busy_share": None}
    whole_ms = sum(spans[0][0].elapsed_time(spans[-1][1]) for spans in rounds if spans)
    return {
        "graph_us": round(1e3 * statistics.median(graphs), 1),
        "gap_us": _p50_p99(1e3 * gap for gap in gaps) if gaps else None,
        "busy_share": round(sum(graphs) / whole_ms, 4),
    }


def _p50_p99(values: Iterable[float]) -> dict[str, float]:
    found = percentiles(list(values))
    return {name: round(found[name], 1) for name in ("p50", "p99")}
