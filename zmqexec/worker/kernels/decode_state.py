"""Both ends of a decode step on the device: from the slots' state to the model's input, and back with its tokens.

Runs in: worker. `begin_decode` and `finish_decode` are the first and the last kernel of a decode graph. The only thing
that the host sends in between is a `step` buffer; `write_step` says what is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zmqexec.errors import InternalError
from zmqexec.worker.kernels import native

MOST_ROWS = 1024
"""Rows of one graph: `begin_decode` is a single block, one thread for each."""

HEADER_INTS = 2
UPDATE_INTS = 3


@dataclass(frozen=True)
class SlotState:
    """What the device knows of every slot. The three tensors are allocated once; graphs hold their addresses.

    token_ids     [num_slots, max_model_len + 1]  int32; those of [0, num_known) that were sampled here. A decode reads
                                                  the last of them; what the sequence was admitted with is not needed
    num_known     [num_slots]                     int32
    block_tables  [num_slots, max_blocks]         int32
    """

    token_ids: torch.Tensor
    num_known: torch.Tensor
    block_tables: torch.Tensor
    block_size: int

    def __post_init__(self) -> None:
        num_slots = self.num_known.numel()
        ok = self.token_ids.dim() == self.block_tables.dim() == 2 and self.num_known.dim() == 1
        ok = ok and self.token_ids.shape[0] == self.block_tables.shape[0] == num_slots and self.block_size > 0
        tensors = {"token_ids": self.token_ids, "num_known": self.num_known, "block_tables": self.block_tables}
        _check(ok, "SlotState", **tensors)

    @classmethod
    def allocate(cls, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> SlotState:
        """State of empty slots."""
        max_blocks = -(-(max_model_len + 1) // block_size)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(zeros(num_slots, max_model_len + 1), zeros(num_slots), zeros(num_slots, max_blocks), block_size)


@dataclass(frozen=True)
class DecodeRows:
    """The input of one graph's rows, real ones first. `begin_decode` writes it; all are int32 [rows].

    input_ids     the newest known token; padding 0
    positions     its position, num_known - 1; padding 0
    context_lens  num_known; padding 0
    slot_mapping  the cache row of that token; padding -1
    row_slots     padding 0
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    context_lens: torch.Tensor
    slot_mapping: torch.Tensor
    row_slots: torch.Tensor

    def __post_init__(self) -> None:
        tensors = vars(self)
        shapes_agree = all(tensor.shape == self.input_ids.shape for tensor in tensors.values())
        _check(self.input_ids.dim() == 1 and len(self) <= MOST_ROWS and shapes_agree, "DecodeRows", **tensors)

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def allocate(cls, rows: int, device: torch.device) -> DecodeRows:
        """Rows of a graph; their contents are undefined until `begin_decode`."""
        return cls(*(torch.empty(rows, dtype=torch.int32, device=device) for _ in range(5)))

    def first(self, rows: int) -> DecodeRows:
        """Views of the first rows: graphs of all sizes can share the memory."""
        return DecodeRows(*(tensor[:rows] for tensor in vars(self).values()))


def step_ints(max_rows: int, max_updates: int) -> int:
    """Length of a step buffer."""
    return HEADER_INTS + max_rows + UPDATE_INTS * max_updates


def write_step(
    buffer: npt.NDArray[np.int32],
    max_rows: int,
    row_slots: npt.NDArray[np.integer[Any]] | Sequence[int],
    updates: npt.NDArray[np.integer[Any]] | Sequence[tuple[int, int, int]],
) -> int:
    """Fill a step buffer and return how many of its ints must be copied to the device.

    buffer     [step_ints(max_rows, max_updates)]  int32, on the host
    row_slots  [num_rows]        distinct slots to decode
    updates    [num_updates, 3]  (slot, index, block): block_tables[slot][index] = block, before the rows read it
    """
    pairs = np.asarray(updates, np.int32).reshape(-1, UPDATE_INTS)
    num_rows, num_ints = len(row_slots), step_ints(max_rows, len(pairs))
    if num_rows > max_rows or num_ints > len(buffer):
        raise InternalError(f"{num_rows} rows and {len(pairs)} updates do not fit a step of {len(buffer)} ints")
    rows_end = HEADER_INTS + max_rows
    buffer[0] = num_rows
    buffer[1] = len(pairs)
    buffer[HEADER_INTS : HEADER_INTS + num_rows] = row_slots
    buffer[HEADER_INTS + num_rows : rows_end] = -1
    buffer[rows_end:num_ints] = pairs.reshape(-1)
    return num_ints


def begin_decode(step: torch.Tensor, max_rows: int, state: SlotState, rows: DecodeRows, *, pdl: bool = False) -> None:
    """Apply the step's block-table updates to `state`, then write the input of `rows`.

    step  [step_ints(max_rows, max_updates)]  int32, as `write_step` fills it, with at most len(rows) real rows

    Exact. Kernel: csrc/cuda/decode_state.cu. pdl: it may start while its predecessor in the graph ends.
    """
    _check(
        step.dim() == 1 and len(rows) <= max_rows and step.numel() >= HEADER_INTS + max_rows, "begin_decode", step=step
    )
    device = state.num_known.device
    module, stream = native.module_of(device), native.stream_of(device)
    module.begin_decode(
        step.data_ptr(),
        max_rows,
        len(rows),
        state.token_ids.data_ptr(),
        state.num_known.data_ptr(),
        state.block_tables.data_ptr(),
        state.num_known.numel(),
        state.token_ids.shape[1],
        state.block_tables.shape[1],
        state.block_size,
        rows.input_ids.data_ptr(),
        rows.positions.data_ptr(),
        rows.context_lens.data_ptr(),
        rows.slot_mapping.data_ptr(),
        rows.row_slots.data_ptr(),
        stream,
        pdl,
    )


def finish_decode(
    sampled: torch.Tensor, rows: DecodeRows, state: SlotState, out: torch.Tensor, *, pdl: bool = False
) -> None:
    """Append the token of each real row to its slot: token_ids[slot, num_known] = token, num_known += 1.

    sampled  [len(rows)]  int32
    out      [len(rows)]  int32, for the host: the same tokens; -1 in padding

    Exact. Kernel: csrc/cuda/decode_state.cu. pdl: it may start while its predecessor in the graph ends.
    """
    _check(sampled.shape == out.shape == (len(rows),), "finish_decode", sampled=sampled, out=out)
    device = state.num_known.device
    module, stream = native.module_of(device), native.stream_of(device)
    module.finish_decode(
        sampled.data_ptr(),
        rows.row_slots.data_ptr(),
        rows.context_lens.data_ptr(),
        len(rows),
        state.token_ids.data_ptr(),
        state.num_known.data_ptr(),
        state.token_ids.shape[1],
        out.data_ptr(),
        stream,
        pdl,
    )


def _check(ok: bool, name: str, **tensors: torch.Tensor) -> None:
    device = next(iter(tensors.values())).device
    plain = all(t.dtype == torch.int32 and t.is_contiguous() and t.device == device for t in tensors.values())
    if not ok or not plain:
        shapes = ", ".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())
        raise InternalError(f"{name}: shapes or types do not fit its docstring: {shapes}")
