"""The state of every running sequence on the device, by slot, and the memory through which a step reaches it.

Runs in: worker.

The host keeps the counts (`worker/batch.py`); the tokens are here. A sampled token is appended to its sequence on the
device, so a decode step needs nothing from the host but the numbers of its slots and the blocks that are new.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]

HEADER = 2
"""Integers before the slots in a staged decode step: how many rows, how many block updates."""

KNOWN = -1
"""As the index of an update: the value is the slot's number of known tokens, not a block."""


class Slots:
    """Slots [0, max_num_seqs) on the device.

    token_ids     [slots, max_model_len + 1]  int32; only those that the device sampled are set
    num_known     [slots]                     int32, prompt and sampled tokens
    block_tables  [slots, max_blocks]         int32
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.token_ids = torch.zeros((max_num_seqs, max_model_len + 1), dtype=torch.int32, device=device)
        self.num_known = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        max_blocks = -(-(max_model_len + 1) // block_size)
        self.block_tables = torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device)

    def __len__(self) -> int:
        return len(self.num_known)


class DecodeRows:
    """What a decode step computes, at addresses that graphs can keep. Rows past the real ones are padding.

    step          [HEADER + rows + 3 · rows]  int32: number of rows and updates, the row's slots, (slot, index, block)
    row_slots     [rows]  int32; 0 in a padded row
    input_ids     [rows]  int32, the token sampled last
    positions     [rows]  int32
    context_lens  [rows]  int32, with the new token; 0 in a padded row
    slot_mapping  [rows]  int32, the cache row of the new token; -1 in a padded row
    sampled       [rows]  int32
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self.step = torch.zeros(staged_ints(max_rows), dtype=torch.int32, device=device)
        self.row_slots, self.input_ids, self.positions, self.context_lens, self.slot_mapping, self.sampled = (
            torch.zeros((6, max_rows), dtype=torch.int32, device=device).unbind(0)
        )


def staged_ints(max_rows: int) -> int:
    """Integers of a staged decode step: every row may bring one new block."""
    return HEADER + 4 * max_rows


def stage_decode(staged: Int32Array, slots: Int32Array, updates: Int32Array, max_rows: int) -> int:
    """Write a decode step into `staged`; how many of its integers are to be copied.

    slots    [num_rows]        ascending
    updates  [num_updates, 3]  (slot, index, block), at most `max_rows`
    """
    num_rows, num_updates = len(slots), len(updates)
    staged[0], staged[1] = num_rows, num_updates
    staged[HEADER : HEADER + num_rows] = slots
    staged[HEADER + num_rows : HEADER + max_rows] = -1
    end = HEADER + max_rows + 3 * num_updates
    staged[HEADER + max_rows : end] = updates.ravel()
    return end


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
