"""The all-reduce's bench, as far as it is about tensors and not about GPUs."""

from __future__ import annotations

import contextlib
import gc
import types
import weakref

import pytest
import torch
from gpu_kernels.all_reduce import MODULUS, Ranked


def ranked(device_type: str, *, rank: int = 0) -> Ranked:
    self = Ranked.__new__(Ranked)
    self.torch, self.rank, self.ranks, self.device = torch, rank, 2, torch.device(device_type)
    return self


def test_a_replay_keeps_the_tensors_whose_addresses_its_graph_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: replays.append(1)))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: contextlib.nullcontext())
    kept = []
    replay = None
    for _ in range(2):
        x = torch.zeros(8)

        def calls(x: torch.Tensor = x) -> None:
            x.add_(1)

        kept.append(weakref.ref(x))
        replay = (ranked("cuda").captured(calls), replay)
    del x, calls
    gc.collect()
    assert [reference() is not None for reference in kept] == [True, True]
    replay[0]()
    assert replays == [1]
    assert torch.equal(kept[1](), torch.full((8,), 2.0))  # run once, captured once
    del replay
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_state_that_left_the_path_is_told_with_its_elements(rank: int) -> None:
    states = [torch.arange(shape, dtype=torch.float32) % MODULUS for shape in (2000, 300)]
    both = [[state.clone() for state in states] for _ in range(2)]
    steps = [7, 12]
    for number, count in enumerate(steps):
        for _ in range(count):
            total = both[0][number] + both[1][number]
            for peer in range(2):
                both[peer][number] = (3 * total + 7 * peer + 1) % MODULUS
    mine = both[rank]
    assert ranked("cpu", rank=rank).wrong_states(mine, steps) == []
    right = mine[1][5].item()
    mine[1][5] = -1.0
    first = [{"element": 5, "is": -1.0, "should be": right}]
    told = {"graph": 1, "calls": 12, "elements": 1, "of": 300, "first": first}
    assert ranked("cpu", rank=rank).wrong_states(mine, steps) == [told]
