"""What the host's sampler needs to sample from a model on a GPU.

Runs in: worker.
"""

from __future__ import annotations

import torch

from zmqexec.worker.collectives import Collectives
from zmqexec.worker.sampler import HasLogits


class HostLogits:
    """The logits of `inner` on the host."""

    def __init__(self, inner: HasLogits) -> None:
        self._inner = inner

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._inner.logits(hidden).cpu()


class HostCollectives(Collectives):
    """Collectives of host tensors, by way of the device."""

    def __init__(self, inner: Collectives, device: torch.device) -> None:
        self.rank = inner.rank
        self.tp_size = inner.tp_size
        self._inner = inner
        self._device = device

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.all_gather(tensor).sum(0)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.tp_size == 1:
            return tensor.unsqueeze(0)
        return self._inner.all_gather(tensor.to(self._device)).cpu()

    def close(self) -> None:
        pass
