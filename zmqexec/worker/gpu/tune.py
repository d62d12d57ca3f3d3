"""How the kernels of a decode step are launched, chosen by the time of the whole graph on this GPU.

Runs in: worker. What is chosen changes no bit of any result, and all ranks choose the same.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import torch

from zmqexec.worker.gpu.collectives import GpuCollectives
from zmqexec.worker.gpu.device import Device
from zmqexec.worker.gpu.ops import DecodeAttention, Ops

CANDIDATES = [(stages, pdl) for pdl in (True, False) for stages in (2, 3, 4)]
"""Stages of the weights' rings: more hide more of the memory's latency, fewer leave the next kernel room beside them.
And whether kernels start early at all. On an H200, 7B, µs a layer of one row without attention: 96 with 4 stages, 124
with 3, 111 where nothing starts early; of 16 rows 111, 114 and 120."""

REPLAYS = 6
ROUNDS = 2


def tune(
    device: Device,
    ops: Ops,
    attention: DecodeAttention,
    collectives: GpuCollectives,
    forward: Callable[[int], torch.Tensor],
    num_rows: int,
) -> None:
    """Leave `ops` and `attention` as is fastest for steps of `num_rows`."""
    times: list[list[float]] = []
    for candidate in CANDIDATES:
        _choose(ops, attention, candidate)
        graph, _ = device.capture(lambda: forward(num_rows), device.graph_pool())

        def replay(graph: object = graph) -> None:
            for _ in range(REPLAYS):
                graph.replay()  # type: ignore[attr-defined]

        times.append([device.time_ms(replay) for _ in range(ROUNDS + 1)][1:])
    own = torch.tensor([statistics.median(each) for each in times], device=device.torch_device)
    slowest_rank = collectives.all_gather(own).amax(0)
    _choose(ops, attention, CANDIDATES[int(slowest_rank.argmin())])


def _choose(ops: Ops, attention: DecodeAttention, candidate: tuple[int, bool]) -> None:
    stages, pdl = candidate
    ops.pdl = attention.pdl = pdl
    ops.tuning = dataclasses.replace(ops.tuning, stages=stages, pdl=pdl)
