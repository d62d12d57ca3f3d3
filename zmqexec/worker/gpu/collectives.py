"""What ranks on GPUs exchange inside a step, as the model needs it. `nccl.py` is the group of several ranks.

Runs in: worker.
"""

from __future__ import annotations

from typing import Protocol

import torch


class GpuCollectives(Protocol):
    """A group of `tp_size` ranks, seen from `rank`. Everything is launched on torch's current stream."""

    rank: int
    tp_size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, bit-identical on each; `tensor` may be overwritten and returned."""
        ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's `tensor`, stacked in rank order: [tp_size, *tensor.shape]."""
        ...

    def all_reduce_residual_(self, hidden: torch.Tensor, partial: torch.Tensor) -> None:
        """hidden += the sum of the ranks' `partial`, rounded once. Both [num_rows, hidden]."""
        ...

    def all_reduce_residual_norm(
        self, hidden: torch.Tensor, partial: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """`all_reduce_residual_`, then the RMSNorm of `hidden`."""
        ...

    def health(self) -> str | None:
        """What went wrong on the device, if a rank gave up on a peer; costs a read of host memory."""
        ...

    def close(self) -> None:
        """Leave the group. Never waits for a peer."""
        ...


class LocalGpuCollectives:
    """The group of one rank."""

    rank = 0
    tp_size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)

    def all_reduce_residual_(self, hidden: torch.Tensor, partial: torch.Tensor) -> None:
        hidden += partial

    def all_reduce_residual_norm(
        self, hidden: torch.Tensor, partial: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        raise NotImplementedError("a rank alone adds and norms in one kernel of its own")

    def health(self) -> str | None:
        return None

    def close(self) -> None:
        pass
