"""Pinned memory through which steps reach the device and results come back.

Runs in: worker.

A buffer is free again when the driver has collected the step that used it, and the driver publishes no step before it
has collected the one that came `run_ahead + 1` before: of `run_ahead + 2` buffers, used in turn, nobody ever waits for
one. The same holds for the events that stand behind results.

The driver hears of rank 0 alone. On other ranks a step's copy to the device lies before the sums that rank 0 needs, and
nobody reads their results.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import torch

from zmqexec.worker.gpu.device import Device, Event

Int32Array = npt.NDArray[np.int32]


class Staging:
    """Buffers for what a step copies to the device."""

    def __init__(self, num_ints: int, run_ahead: int, device: Device) -> None:
        buffers = [_pinned(num_ints, device) for _ in range(run_ahead + 2)]
        self._in_turn = itertools.cycle([(buffer, buffer.numpy()) for buffer in buffers])

    def take(self) -> tuple[torch.Tensor, Int32Array]:
        """The next buffer, as torch and numpy see it."""
        return next(self._in_turn)


class Results:
    """Buffers for what steps copy back from `source`, int32 on the device."""

    def __init__(self, source: torch.Tensor, run_ahead: int, device: Device) -> None:
        self._source = source
        self._in_turn = itertools.cycle([_Result(source, device) for _ in range(run_ahead + 2)])

    def fetch(self, count: int) -> tuple[Int32Array, Event]:
        """Begin to copy the first `count` ints; they are there when the event, which follows it, has happened."""
        result = next(self._in_turn)
        if len(result.ints) != count:
            result.resize(count)
        if count:
            result.here.copy_(result.there, non_blocking=True)
        result.event.record()
        return result.ints, result.event


class _Result:
    """One buffer, with views of as many ints as the last step that used it had: mostly the next has as many."""

    def __init__(self, source: torch.Tensor, device: Device) -> None:
        self._source = source
        self._buffer = _pinned(len(source), device)
        self.event = device.event()
        self.resize(0)

    def resize(self, count: int) -> None:
        self.there, self.here = self._source[:count], self._buffer[:count]
        self.ints: Int32Array = self.here.numpy()


def _pinned(num_ints: int, device: Device) -> torch.Tensor:
    return torch.zeros(num_ints, dtype=torch.int32, pin_memory=device.is_cuda)
