"""What ranks on GPUs exchange inside a step, as the model needs it. `nccl.py` is the group of several ranks.

Runs in: worker.
"""

from __future__ import annotations

from typing import Protocol

import torch

from zmqexec.worker.collectives import Collectives, LocalCollectives


class GpuCollectives(Collectives, Protocol):
    """What `Collectives` has, launched on torch's current stream, and sums with what follows them. `close` never waits
    for a peer."""

    def all_reduce_residual_(self, hidden: torch.Tensor, partial: torch.Tensor) -> None:
        """hidden += the sum of the ranks' `partial`, rounded once. Both [num_rows, hidden]."""
        ...

    def all_reduce_residual_norm(
        self, hidden: torch.Tensor, partial: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """`all_reduce_residual_`, then the RMSNorm of `hidden`."""
        ...

    def health(self) -> str | None:
        """What went wrong on the device, if a rank gave up on a peer."""
        ...


class LocalGpuCollectives(LocalCollectives):
    """The group of one rank."""

    def all_reduce_residual_(self, hidden: torch.Tensor, partial: torch.Tensor) -> None:
        hidden += partial

    def all_reduce_residual_norm(
        self, hidden: torch.Tensor, partial: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        raise NotImplementedError("a rank alone adds and norms in one kernel of its own")

    def health(self) -> str | None:
        return None
