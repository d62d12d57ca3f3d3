"""What steps bring to the device and take from it, and the host's memory that it goes through.

Runs in: worker.

A buffer is free again when the driver has collected the step that used it, and the driver publishes no step before it
has collected the one that came `run_ahead + 1` before: of `run_ahead + 2` buffers, used in turn and by a step once,
nobody ever waits for one. The same holds for the events that stand behind results.

The driver hears of rank 0 alone. On other ranks a step's copy to the device lies before the sums that rank 0 needs, and
nobody reads their results.

Copies are launched by our own extension, and a decode step that is one graph by one call of it: a worker sleeps between
steps, and then the same line of Python takes ten times what it takes in a loop.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from zmqexec.protocol import StepInput
from zmqexec.worker.batch import Batch
from zmqexec.worker.gpu.device import Device, Event
from zmqexec.worker.kernels.decode_state import step_ints

Int32Array = npt.NDArray[np.int32]


class Buffer:
    """Pinned memory for a number of ints."""

    def __init__(self, num_ints: int, device: Device) -> None:
        self.tensor = torch.zeros(num_ints, dtype=torch.int32, pin_memory=device.is_cuda)
        self.ints: Int32Array = self.tensor.numpy()
        self.address = self.tensor.data_ptr()


class Fetched(NamedTuple):
    """What a step copies back: its tokens are the first of these ints, once the event has happened."""

    ints: Int32Array
    event: Event


class Staging:
    """Buffers for what a step copies to the device: to `target`, int32, on the stream that is current now.

    decodes  bitmap of the slots that `target` names; None: it has more than that
    """

    def __init__(self, target: torch.Tensor, run_ahead: int, device: Device) -> None:
        self._copy, self._stream = device.native.copy_async, device.stream()
        self.target = target
        self.decodes: bytes | None = None
        self._in_turn = itertools.cycle([Buffer(target.numel(), device) for _ in range(run_ahead + 2)])

    def take(self) -> Buffer:
        """The next buffer."""
        return next(self._in_turn)

    def send(self, buffer: Buffer, count: int) -> None:
        """Begin to copy its first `count` ints."""
        self.decodes = None
        self._copy(self.target.data_ptr(), buffer.address, 4 * count, 0, self._stream)


class Results:
    """Buffers for what steps copy back from `source`, int32, on the stream that is current now."""

    def __init__(self, source: torch.Tensor, run_ahead: int, device: Device) -> None:
        self._copy, self._stream = device.native.copy_async, device.stream()
        self.source = source
        buffers = [(Buffer(source.numel(), device), device.event()) for _ in range(run_ahead + 2)]
        self._in_turn = itertools.cycle(buffers)

    def fetch(self, count: int) -> Fetched:
        """Begin to copy the first `count` ints."""
        buffer, event = next(self._in_turn)
        self._copy(buffer.address, self.source.data_ptr(), 4 * count, event.handle, self._stream)
        return Fetched(buffer.ints, event)


class DecodeSteps:
    """Steps that only decode, taken in by one call of our extension. `Batch.take_in`, `Batch.finish` and `write_step`
    do the same in Python, except that here nobody hears of the tokens: they stay on the device.

    The call can launch the step's graph and fetch its tokens, too. It has buffers and events of its own.
    """

    def __init__(
        self,
        batch: Batch,
        num_cache_blocks: int,
        block_size: int,
        staging: Staging,
        results: Results,
        run_ahead: int,
        device: Device,
    ) -> None:
        num_slots, max_blocks = batch.block_tables.shape
        assert staging.target.numel() == step_ints(num_slots, num_slots) and results.source.numel() == num_slots
        arrays = batch.num_known, batch.num_computed, batch.num_blocks, batch.block_tables
        sizes = num_slots, max_blocks, block_size, num_cache_blocks, batch.token_ids.shape[1] - 1
        on_device = staging.target.data_ptr(), results.source.data_ptr(), device.stream()
        self._fixed = np.array([*(array.ctypes.data for array in arrays), *sizes, *on_device], np.int64)
        self._address = self._fixed.ctypes.data
        self._staging = staging
        self._native = device.native.decode_step
        buffers = [
            (Buffer(staging.target.numel(), device), Buffer(num_slots, device), device.event())
            for _ in range(run_ahead + 2)
        ]
        self._owners = batch, results, buffers  # of what the addresses name
        self._in_turn = itertools.cycle(
            (staged.address, tokens.address, event.handle, Fetched(tokens.ints, event))
            for staged, tokens, event in buffers
        )

    def begin(self, step: StepInput, graph: int) -> Fetched | None:
        """Take in `step`, send it to the device unless that has just its slots, launch the cudaGraphExec_t and fetch a
        token of each slot. With 0 for the graph the caller launches and fetches.

        None where the step is for `Batch.take_in`, which takes it or says what is wrong with it.
        """
        staged, tokens, event, fetched = next(self._in_turn)
        if not graph:
            tokens = event = 0
        decodes, new_blocks, staging = step.decodes, step.new_blocks, self._staging
        are_known = decodes == staging.decodes
        if self._native(self._address, decodes, new_blocks, are_known, staged, graph, tokens, event) < 0:
            return None
        staging.decodes = None if new_blocks else decodes
        return fetched
