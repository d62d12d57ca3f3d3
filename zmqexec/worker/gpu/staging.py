"""What steps bring to the device and take from it, and the host's memory that it goes through.

Runs in: worker.

A buffer is free again when the driver has collected the step that used it, and the driver publishes no step before it
has collected the one that came `run_ahead + 1` before: of `run_ahead + 2` buffers, used in turn, nobody ever waits for
one. The same holds for the events that stand behind results.

The driver hears of rank 0 alone. On other ranks a step's copy to the device lies before the sums that rank 0 needs, and
nobody reads their results.

Copies are launched by our own extension: a worker sleeps between steps, and then the same line of Python takes ten
times what it takes in a loop.
"""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from zmqexec.protocol import StepInput
from zmqexec.worker.batch import Batch
from zmqexec.worker.gpu.device import Device, Event

Int32Array = npt.NDArray[np.int32]


class Buffer:
    """Pinned memory for a number of ints."""

    def __init__(self, num_ints: int, device: Device) -> None:
        self.tensor = torch.zeros(num_ints, dtype=torch.int32, pin_memory=device.is_cuda)
        self.ints: Int32Array = self.tensor.numpy()
        self.address = self.tensor.data_ptr()


class Staging:
    """Buffers for what a step copies to the device: to `target`, int32, on the stream that is current now."""

    def __init__(self, target: torch.Tensor, run_ahead: int, device: Device) -> None:
        self._copy, self._stream = device.native.copy_async, device.stream()
        self._target, self._address = target, target.data_ptr()
        self._in_turn = itertools.cycle([Buffer(target.numel(), device) for _ in range(run_ahead + 2)])

    def take(self) -> Buffer:
        """The next buffer."""
        return next(self._in_turn)

    def send(self, buffer: Buffer, count: int) -> None:
        """Begin to copy its first `count` ints."""
        self._copy(self._address, buffer.address, 4 * count, 0, self._stream)


class Results:
    """Buffers for what steps copy back from `source`, int32, on the stream that is current now."""

    def __init__(self, source: torch.Tensor, run_ahead: int, device: Device) -> None:
        self._copy, self._stream = device.native.copy_async, device.stream()
        self._source, self._address = source, source.data_ptr()
        buffers = [(Buffer(source.numel(), device), device.event()) for _ in range(run_ahead + 2)]
        self._in_turn = itertools.cycle(buffers)

    def fetch(self, count: int) -> tuple[Int32Array, Event]:
        """Begin to copy the first `count` ints; they are there when the event, which follows it, has happened."""
        buffer, event = next(self._in_turn)
        self._copy(buffer.address, self._address, 4 * count, event.handle, self._stream)
        return buffer.ints[:count], event


class DecodeSteps:
    """Steps that only decode, taken in by one call of our extension. `Batch.take_in`, `Batch.finish` and `write_step`
    do the same in Python, except that here nobody hears of the tokens: they stay on the device."""

    def __init__(self, batch: Batch, num_cache_blocks: int, block_size: int, native: ModuleType) -> None:
        num_slots, max_blocks = batch.block_tables.shape
        self._batch = batch  # which owns the memory
        self._stage = native.stage_decodes
        self._arrays = [
            array.ctypes.data for array in (batch.num_known, batch.num_computed, batch.num_blocks, batch.block_tables)
        ]
        max_model_len = batch.token_ids.shape[1] - 1
        self._sizes = (num_slots, max_blocks, block_size, num_cache_blocks, max_model_len)

    def stage(self, step: StepInput, buffer: Buffer) -> int:
        """Take in `step`, of at most as many new blocks as there are slots, and write it to `buffer`.

        Returns how many ints must be copied to the device; -1 where the step is for `Batch.take_in`, which takes it or
        says what is wrong with it.
        """
        most = self._sizes[0]
        count: int = self._stage(step.decodes, step.new_blocks, *self._arrays, *self._sizes, buffer.address, most, most)
        return count
