"""What the ranks of a tensor-parallel group exchange inside a step: sums of partial results and gathered shards.

Runs in: worker.

Every rank calls the same collectives in the same order with tensors of the same shape: both follow from the
`StepInput`, which all ranks receive. torch's default process group is never touched: it belongs to the user's program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from zmqexec.bus.status import Phase


class Collectives(Protocol):
    """A group of `tp_size` ranks, seen from `rank`."""

    rank: int
    tp_size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, bit-identical on each; `tensor` may be overwritten and returned."""
        ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's `tensor`, stacked in rank order: [tp_size, *tensor.shape]."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class LocalCollectives:
    """The group of one rank."""

    rank = 0
    tp_size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)

    def close(self) -> None:
        pass


class PhasedCollectives:
    """`inner`, showing on the status page when this rank waits for its peers: a stall then names the collective."""

    def __init__(self, inner: Collectives, on_phase: Callable[[Phase], None]) -> None:
        self.rank = inner.rank
        self.tp_size = inner.tp_size
        self._inner = inner
        self._on_phase = on_phase
        self._phase = Phase.IDLE

    def enter(self, phase: Phase) -> None:
        """What this rank does between collectives from now on."""
        self._phase = phase
        self._on_phase(phase)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.tp_size == 1:
            return tensor
        self._on_phase(Phase.COLLECTIVE)
        tensor = self._inner.all_reduce(tensor)
        self._on_phase(self._phase)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.tp_size == 1:
            return tensor.unsqueeze(0)
        self._on_phase(Phase.COLLECTIVE)
        tensor = self._inner.all_gather(tensor)
        self._on_phase(self._phase)
        return tensor

    def close(self) -> None:
        self._inner.close()
