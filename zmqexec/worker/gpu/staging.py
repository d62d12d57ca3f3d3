"""Pinned memory through which steps reach the device and results come back.

Runs in: worker.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]


class Staging:
    """Pinned buffers for what a step copies to the device or back, used in turn.

    A buffer is free again when the driver has collected the step that used it, and the driver publishes no step before
    it has collected the one that came `run_ahead + 1` before: with one buffer more, nobody ever waits for one.
    """

    def __init__(self, num_ints: int, run_ahead: int, *, pinned: bool) -> None:
        self._buffers = [torch.zeros(num_ints, dtype=torch.int32, pin_memory=pinned) for _ in range(run_ahead + 2)]
        self._next = 0

    def take(self) -> tuple[torch.Tensor, Int32Array]:
        """The next buffer, as torch and numpy see it."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        return buffer, buffer.numpy()
