"""Counters, gauges and histograms in Prometheus' text format.

Runs in: server. Format: https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4). The event loop is
the only thread that touches them, so they need no locks.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from zmqexec.bus.statistics import Snapshot
from zmqexec.protocol import EngineStats
from zmqexec.server.bus_metrics import bus_lines

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "abort", "error")
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Cumulative buckets of a duration in seconds."""

    def __init__(self, name: str, help: str, buckets: Sequence[float]) -> None:
        self.name = name
        self._help = help
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count `count` events of `value` seconds each."""
        self._counts[bisect.bisect_left(self._buckets, value)] += count
        self._sum += value * count

    def lines(self) -> Iterable[str]:
        yield f"# HELP {self.name} {self._help}"
        yield f"# TYPE {self.name} histogram"
        total = 0
        for bound, count in zip((*self._buckets, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{self.name}_bucket{{le="{bound}"}} {total}'
        yield f"{self.name}_sum {self._sum}"
        yield f"{self.name}_count {total}"


class Metrics:
    """All that /metrics shows: what this process measures, and the driver's latest numbers."""

    def __init__(self) -> None:
        self.open_requests = 0
        self.finished: Counter[str] = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self.time_to_first_token = Histogram(
            "zmqexec_time_to_first_token_seconds", "From arrival to the first token.", REQUEST_BUCKETS_S
        )
        self.inter_token_latency = Histogram(
            "zmqexec_inter_token_latency_seconds", "Between two tokens of a sample.", TOKEN_BUCKETS_S
        )
        self.request_latency = Histogram(
            "zmqexec_e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_BUCKETS_S
        )
        self.queue_time = Histogram(
            "zmqexec_request_queue_time_seconds", "From arrival to the first step.", REQUEST_BUCKETS_S
        )

    def render(self, stats: EngineStats, bus: Snapshot | None = None) -> bytes:
        """The page as it is now; without a bus that can be seen, without its part."""
        usage = stats.num_blocks_used / stats.num_blocks if stats.num_blocks else 0.0
        gauges = {
            "num_requests_running": ("Sequences in the running batch.", stats.num_running),
            "num_requests_waiting": ("Sequences that wait for a place in the batch.", stats.num_waiting),
            "kv_cache_usage_ratio": ("Share of the KV cache's blocks that open sequences hold.", usage),
            "http_requests_open": ("Completion requests that the server is answering.", self.open_requests),
        }
        counters = {
            "prompt_tokens_total": ("Prompt tokens of all requests.", stats.prompt_tokens),
            "cached_prompt_tokens_total": ("Those found in the prefix cache.", stats.cached_prompt_tokens),
            "generation_tokens_total": ("Tokens generated.", stats.generation_tokens),
            "preemptions_total": ("Sequences put back because the KV cache was full.", stats.preemptions),
            "steps_total": ("Steps of the engine.", stats.steps),
            "stale_replies_total": ("Replies that matched no outstanding step, dropped.", stats.stale_replies),
            "wrong_epoch_replies_total": ("Replies of another epoch, dropped.", stats.wrong_epoch_replies),
        }
        lines: list[str] = []
        for kind, group in (("gauge", gauges), ("counter", counters)):
            for name, (help, value) in group.items():
                lines += (f"# HELP zmqexec_{name} {help}", f"# TYPE zmqexec_{name} {kind}", f"zmqexec_{name} {value}")
        name = "zmqexec_requests_finished_total"
        lines += (f"# HELP {name} Samples that ended, by reason.", f"# TYPE {name} counter")
        lines += (f'{name}{{reason="{reason}"}} {count}' for reason, count in self.finished.items())
        for histogram in (self.time_to_first_token, self.inter_token_latency, self.request_latency, self.queue_time):
            lines += histogram.lines()
        if bus is not None:
            lines += bus_lines(bus)
        return ("\n".join(lines) + "\n").encode()


class RequestTimer:
    """The measurements of one HTTP request with `num_choices` samples, from its arrival to `close`."""

    def __init__(self, metrics: Metrics, num_choices: int) -> None:
        self._metrics = metrics
        self._arrived = time.monotonic()
        self._last_token: dict[int, float] = {}
        self._unfinished = num_choices
        metrics.open_requests += 1

    def tokens(self, choice: int, count: int, queue_s: float) -> None:
        """`count` new tokens of a choice are there."""
        now = time.monotonic()
        before = self._last_token.get(choice)
        self._last_token[choice] = now
        if before is not None:
            # Tokens that came together share the time since the last ones.
            self._metrics.inter_token_latency.observe((now - before) / count, count)
        else:
            self._metrics.queue_time.observe(queue_s)
            self._metrics.time_to_first_token.observe(now - self._arrived)
            if count > 1:
                self._metrics.inter_token_latency.observe(0.0, count - 1)

    def finish(self, reason: str) -> None:
        """A choice has ended."""
        self._unfinished -= 1
        self._metrics.finished[reason] += 1
        self._metrics.request_latency.observe(time.monotonic() - self._arrived)

    def close(self, reason: str | None) -> None:
        """The request is over; choices that have not finished ended for `reason` (None: never began). Once."""
        if reason is not None:
            self._metrics.finished[reason] += self._unfinished
        self._metrics.open_requests -= 1
