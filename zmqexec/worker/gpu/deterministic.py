"""What a deterministic engine computes otherwise, so that a token's bits are its own.

Runs in: worker. A token's bits must not depend on how many rows the step has, nor on whether it is a row of a prefill,
of a decode or of a graph. Norms, rotations, activations and the device's sampler are so anyway: a kernel of ours
computes each row by itself. The rest is not:

    matrix products   the library picks its algorithm by the shape: here all of them have FIXED_ROWS rows
    attention         a context is split as the batch wants it: here at multiples of `split_tokens`, and prefills go
                      through the decodes' kernel
    sums over ranks   large ones are NCCL's: here `NcclCollectives(in_rank_order=True)`
    the host's part   angles of dynamic NTK, random choices and log-probabilities: `one_at_a_time`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear, pad

from zmqexec.errors import ConfigError
from zmqexec.worker.batch import Prefill
from zmqexec.worker.gpu.attention import ToDevice
from zmqexec.worker.gpu.device import Device
from zmqexec.worker.gpu.ops import attend_padded, attention_workspace
from zmqexec.worker.kernels.decode_state import SlotState
from zmqexec.worker.kernels.paged_attention import AttentionWorkspace, choose_launch

FIXED_ROWS = 64

ALIGNMENT = 256
"""Bytes. torch allocates with more; below it, the library may let the alignment choose its algorithm too."""

LEAST_SPLIT_TOKENS = 256
MOST_SPLITS = 64
"""Of a context: bounds the memory of partial results, of which every row of a step may need as many."""

SPLIT_STEP = 64
QUERY_ROWS = 16
"""What the attention kernel wants of a split, and how many query heads it computes at a time."""

PARTIAL_BYTES = 64 << 20
MOST_ROWS = 1024
"""Of one launch of a prefill's attention: its partial results, and what a plan takes."""

Int32Array = npt.NDArray[np.int32]


def by_fixed_rows(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`product(x)`, computed for FIXED_ROWS rows at a time, the last of them filled up with zeros.

    x        [num_rows, in]   contiguous
    returns  [num_rows, out]  contiguous
    """
    parts = [product(_fixed(part)) for part in torch.split(x, FIXED_ROWS)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[: len(x)]


class FixedProducts:
    """`Products` of FIXED_ROWS rows at a time, by the library."""

    def adds_residual(self, bias: torch.Tensor | None) -> bool:
        """As `Products.adds_residual`."""
        return False

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `Products.linear`."""
        return by_fixed_rows(lambda part: linear(part, weight, bias), x)

    def linear_residual_(
        self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """As `Products.linear_residual_`."""
        residual += self.linear(x, weight, bias)


def _fixed(part: torch.Tensor) -> torch.Tensor:
    missing = FIXED_ROWS - len(part)
    if missing:
        return pad(part, (0, 0, 0, missing))
    return part if part.data_ptr() % ALIGNMENT == 0 else part.clone()


def check_product(product: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor, what: str) -> None:
    """`ConfigError` where a row's bits depend on its place among the FIXED_ROWS.

    weight  [out, in]  what `product` multiplies by
    """
    generator = torch.Generator(weight.device).manual_seed(0)
    row = torch.randn((1, weight.shape[1]), generator=generator, device=weight.device).to(weight.dtype)
    results = product(row.expand(FIXED_ROWS, -1).contiguous())
    bits = results.contiguous().view(torch.int16 if results.itemsize == 2 else torch.int32)
    if not torch.equal(bits, bits[:1].expand_as(bits)):
        raise ConfigError(
            f"deterministic: the product with {what} gives equal rows different bits by their place among "
            f"{FIXED_ROWS}, so this GPU's matrix library cannot keep the promise in {weight.dtype}; use another dtype "
            "or build of torch, or turn it off",
            "deterministic",
        )


def split_tokens(max_context_len: int) -> int:
    """At whose multiples a context is split."""
    return max(LEAST_SPLIT_TOKENS, -(-max_context_len // (MOST_SPLITS * SPLIT_STEP)) * SPLIT_STEP)


@dataclass(frozen=True)
class RowGroup:
    """Rows of prefills that are attended together: row i has query tokens [query_starts[i], query_starts[i + 1]).

    tokens        of all the step's prefills
    row_slots     [num_rows]      int32 on the device
    context_lens  [num_rows]      int32 on the device, up to the row's last token
    query_starts  [num_rows + 1]  int32 on the device, counted from the group's first token
    """

    tokens: slice
    row_slots: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor


@dataclass(frozen=True)
class FixedContexts:
    """The prefills of a step, for a deterministic engine."""

    attention: FixedPrefills
    num_tokens: int
    groups: list[RowGroup]
    wants_keys: bool = False

    def attend(self, out: torch.Tensor, qkv: torch.Tensor, num_heads: int, cache: torch.Tensor, scale: float) -> None:
        """As `PrefillContexts.attend`."""
        for group in self.groups:
            self.attention.attend(out[group.tokens], qkv[group.tokens, :num_heads], cache, group, scale)


class FixedPrefills:
    """Attention of prefills by the decodes' kernel, split where theirs are.

    A chunk is cut into rows of as many tokens as the kernel computes at a time. Those share what they load, but each
    has the bits of a row of its own: tokens that it does not see add exact zeros, as long as their values are finite.
    """

    def __init__(
        self,
        device: Device,
        dtype: torch.dtype,
        state: SlotState,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        to_device: ToDevice,
    ) -> None:
        self._state = state
        self._to_device = to_device
        group, max_context_len = num_heads // num_kv_heads, state.token_ids.shape[1]
        self._row_tokens = 1 if dtype == torch.float32 else max(1, QUERY_ROWS // group)
        heads_at_once = min(QUERY_ROWS, group)
        tiles = num_kv_heads * -(-group * self._row_tokens // QUERY_ROWS)
        splits = -(-max_context_len // split_tokens(max_context_len))
        row_bytes = 4 * tiles * splits * heads_at_once * self._row_tokens * (head_dim + 4)
        self._rows_at_once = min(MOST_ROWS, max(1, PARTIAL_BYTES // row_bytes))
        self._workspace: AttentionWorkspace | None = None  # there is no kernel for float32
        if dtype != torch.float32:
            self._workspace = attention_workspace(
                device,
                choose_launch(head_dim, 1, num_kv_heads, device.native),  # as for decodes
                max_rows=self._rows_at_once,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                max_context_len=max_context_len,
                max_query_len=self._row_tokens,
                fixed_split_tokens=split_tokens(max_context_len),
            )

    def contexts(self, prefills: Sequence[Prefill], slot_mapping: torch.Tensor) -> list[FixedContexts]:
        """As `Prefills.contexts`."""
        if not prefills:
            return []
        rows = np.array(
            [
                (prefill.slot, min(begin + self._row_tokens, prefill.stop), min(self._row_tokens, prefill.stop - begin))
                for prefill in prefills
                for begin in range(prefill.start, prefill.stop, self._row_tokens)
            ],
            np.int32,
        )
        groups: list[RowGroup] = []
        num_tokens = 0
        for first in range(0, len(rows), self._rows_at_once):
            slots, lens, counts = rows[first : first + self._rows_at_once].T
            starts: npt.NDArray[Any] = np.cumsum([0, *counts])
            tokens = slice(num_tokens, num_tokens + int(starts[-1]))
            groups.append(RowGroup(tokens, *self._to_device(slots, lens, starts)))
            num_tokens = tokens.stop
        return [FixedContexts(self, num_tokens, groups)]

    def attend(
        self, out: torch.Tensor, query: torch.Tensor, cache: torch.Tensor, group: RowGroup, scale: float
    ) -> None:
        """One layer of a group. out, query  [num_tokens, num_heads, head_dim]; `cache` holds the tokens already."""
        tables = self._state.block_tables
        if self._workspace is None:
            attend_padded(out, query, cache, tables, group.row_slots, group.context_lens, scale, at_once=1)
            return
        # The plans of all groups share their memory, so each is made anew in every layer.
        self._workspace.plan(group.context_lens, group.row_slots, group.query_starts, pdl=False)
        self._workspace.attend(out, query, cache, tables, scale=scale, pdl=False)
