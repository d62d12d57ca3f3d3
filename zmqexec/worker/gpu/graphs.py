"""Decode steps as CUDA graphs, one for each of a ladder of batch sizes.

Runs in: worker. A batch runs in the smallest graph that holds it; the rows beyond it are padding, which reads and
writes nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from zmqexec.worker.gpu.device import Device, Graph

SMALL = (1, 2, 4, 8)
STEP = 8
WIDE_STEP = 16
WIDE_FROM = 64
"""Beyond this many rows, every 16th size has a graph: padding then costs at most a fifth of the rows."""


def ladder(max_rows: int) -> list[int]:
    """The batch sizes that have a graph, ascending; the last is `max_rows`."""
    sizes = {*SMALL, *range(STEP, WIDE_FROM, STEP), *range(WIDE_FROM, max_rows, WIDE_STEP)}
    return [*sorted(size for size in sizes if size < max_rows), max_rows]


class DecodeGraphs:
    """Runs `forward(num_rows)`, from graphs where they are enabled."""

    def __init__(
        self,
        device: Device,
        forward: Callable[[int], torch.Tensor],
        sizes: Iterable[int],
        pool: Any = None,
        on_captured: Callable[[], None] = lambda: None,
    ) -> None:
        """Captures a graph for each of `sizes`, the largest first: the smaller ones find their memory in its pool.

        pool         of `Device.graph_pool`: memory that all graphs of an engine share, for no two run at a time
        on_captured  called after each
        """
        self._forward = forward
        self._sizes = sorted(sizes)
        self._graphs: dict[int, tuple[Graph, torch.Tensor]] = {}
        for size in reversed(self._sizes):
            self._graphs[size] = device.capture(lambda size=size: forward(size), pool)  # type: ignore[misc]
            on_captured()

    def run(self, num_rows: int) -> torch.Tensor:
        """What `forward` returns for `num_rows` staged rows and their padding, valid until the next run."""
        if not self._sizes:
            with torch.inference_mode():
                return self._forward(num_rows)
        graph, result = self._of(num_rows)
        graph.replay()
        return result

    def handle(self, num_rows: int) -> int:
        """The cudaGraphExec_t that `run` launches for as many rows; 0 where there is none."""
        return self._of(num_rows)[0].handle if self._sizes else 0

    def _of(self, num_rows: int) -> tuple[Graph, torch.Tensor]:
        return self._graphs[self._sizes[bisect.bisect_left(self._sizes, num_rows)]]
