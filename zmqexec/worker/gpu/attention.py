"""Attention of prefills, and the plan that a step's decodes share.

Runs in: worker.

On Hopper, prefills are attended where the paged cache holds their contexts (`PagedPrefills`). Elsewhere, and for heads
and blocks that our kernel does not take, torch's variable-length flash attention has contiguous keys: of the chunk
itself, or, where a prefix is cached, gathered from the cache's pages (`GatheredPrefills`). Those chunks are attended in
groups, so that a short rest of many prompts behind one long prefix does not gather that prefix for all of them at a
time, and many whole contexts beside it gather nothing. float32 is for truth, not for speed: one call of
`scaled_dot_product_attention` per sequence. Prefills of a deterministic engine are in `deterministic.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from zmqexec.worker.batch import Prefill
from zmqexec.worker.kernels import reference
from zmqexec.worker.kernels.paged_prefill import items_of, prefill_attention

ToDevice = Callable[..., list[torch.Tensor]]
"""The arrays given to it as int32 on the device."""

WORTH_A_GROUP = 1024
"""Tokens whose keys and values take longer to gather than one more call of the attention takes to start: estimated."""


class PrefillContexts(Protocol):
    """Prefills of a step that are attended together."""

    @property
    def num_tokens(self) -> int:
        """Query tokens of all of them."""
        ...

    @property
    def wants_keys(self) -> bool:
        """Whether `attend` reads rotated keys from `qkv`."""
        ...

    def attend(self, out: torch.Tensor, qkv: torch.Tensor, num_heads: int, cache: torch.Tensor, scale: float) -> None:
        """Causal attention of the chunks, each of whose queries sees its sequence up to itself.

        out    [num_tokens, num_heads, head_dim]
        qkv    [num_tokens, num_heads + 2 · num_kv_heads, head_dim]  rotated
        cache  [num_blocks, 2, num_kv_heads, block_size, head_dim]   holds the chunks' keys and values already
        """
        ...


class Prefills(Protocol):
    """How an engine attends prefills."""

    def contexts(self, prefills: Sequence[Prefill], slot_mapping: torch.Tensor) -> Sequence[PrefillContexts]:
        """Those of a step, in order; `slot_mapping` as in `batch.Rows`."""
        ...


@dataclass(frozen=True)
class PagedContexts:
    """All prefills of a step; chunk i has query tokens [cu_query[i], cu_query[i + 1]).

    block_tables  [num_slots, max_blocks]  int32
    slots, context_lens  [num_chunks]      int32; tokens up to the chunk's end
    cu_query      [num_chunks + 1]         int32
    items         [num_items, 2]           int32, as `items_of`
    """

    num_tokens: int
    block_tables: torch.Tensor
    slots: torch.Tensor
    cu_query: torch.Tensor
    context_lens: torch.Tensor
    items: torch.Tensor
    wants_keys: bool = False

    def attend(self, out: torch.Tensor, qkv: torch.Tensor, num_heads: int, cache: torch.Tensor, scale: float) -> None:
        """As `PrefillContexts.attend`."""
        chunks = (self.block_tables, self.slots, self.cu_query, self.context_lens, self.items)
        prefill_attention(out, qkv[:, :num_heads], cache, *chunks, scale)


class PagedPrefills:
    """Attention over the cache, through the block tables that the decodes use."""

    def __init__(self, block_tables: torch.Tensor, to_device: ToDevice) -> None:
        self._block_tables = block_tables
        self._to_device = to_device

    def contexts(self, prefills: Sequence[Prefill], slot_mapping: torch.Tensor) -> list[PagedContexts]:
        """As `Prefills.contexts`."""
        if not prefills:
            return []
        lens = [prefill.stop - prefill.start for prefill in prefills]
        starts: npt.NDArray[Any] = np.cumsum([0, *lens])
        slots, stops = np.array([(prefill.slot, prefill.stop) for prefill in prefills]).T
        items = items_of(lens, [prefill.stop for prefill in prefills])
        slots32, starts32, stops32, items32 = self._to_device(slots, starts, stops, items.reshape(-1))
        return [PagedContexts(sum(lens), self._block_tables, slots32, starts32, stops32, items32.view(-1, 2))]


@dataclass(frozen=True)
class GatheredContexts:
    """Prefills of a step that are attended together: chunk i has query tokens [cu_query[i], cu_query[i + 1]) of them.

    num_tokens    of all chunks
    query_lens    tokens of each chunk, on the host
    context_lens  tokens of each chunk's sequence up to the chunk's end, on the host
    cu_query      [num_chunks + 1]  int32 on the device, running sum of query_lens
    cu_context    [num_chunks + 1]  int32 on the device, of context_lens
    blocks        [sum of context_lens]  int64 on the device, the block of every context token; None: no chunk has a
    offsets       prefix in the cache; and its place in the block
    """

    num_tokens: int
    query_lens: list[int]
    context_lens: list[int]
    cu_query: torch.Tensor
    cu_context: torch.Tensor
    blocks: torch.Tensor | None
    offsets: torch.Tensor | None

    @property
    def wants_keys(self) -> bool:
        """As `PrefillContexts.wants_keys`."""
        return self.blocks is None

    def attend(self, out: torch.Tensor, qkv: torch.Tensor, num_heads: int, cache: torch.Tensor, scale: float) -> None:
        """As `PrefillContexts.attend`."""
        num_kv_heads = cache.shape[2]
        query = qkv[:, :num_heads]
        if self.blocks is None:
            keys, values = qkv[:, num_heads : num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads :]
        else:
            keys = cache[self.blocks, 0, :, self.offsets]
            values = cache[self.blocks, 1, :, self.offsets]
        if query.is_cuda and query.dtype != torch.float32:
            attended = torch.ops.aten._flash_attention_forward(
                query=query,
                key=keys,
                value=values,
                cum_seq_q=self.cu_query,
                cum_seq_k=self.cu_context,
                max_q=max(self.query_lens),
                max_k=max(self.context_lens),
                dropout_p=0.0,
                is_causal=True,
                return_debug_mask=False,
                scale=scale,
            )[0]
            out.copy_(attended)
            return
        begin = context_begin = 0
        for query_len, context_len in zip(self.query_lens, self.context_lens, strict=True):
            chunk, context = slice(begin, begin + query_len), slice(context_begin, context_begin + context_len)
            kv = torch.stack([keys[context], values[context]], dim=1)
            out[chunk] = reference.prefill_attention(query[chunk], kv, scale)
            begin, context_begin = chunk.stop, context.stop


class GatheredPrefills:
    """Attention over contiguous keys, of at most `most` tokens at a time; a longer context is alone."""

    def __init__(self, most: int, block_size: int, to_device: ToDevice) -> None:
        self._most = most
        self._block_size = block_size
        self._to_device = to_device

    def contexts(self, prefills: Sequence[Prefill], slot_mapping: torch.Tensor) -> list[GatheredContexts]:
        """As `Prefills.contexts`."""
        groups = groups_of([(prefill.start, prefill.stop) for prefill in prefills], self._most)
        return [self._group(prefills[group.start : group.stop], slot_mapping) for group in groups]

    def _group(self, prefills: Sequence[Prefill], slot_mapping: torch.Tensor) -> GatheredContexts:
        query_lens = [prefill.stop - prefill.start for prefill in prefills]
        if all(prefill.start == 0 for prefill in prefills):
            (sums,) = self._to_device(np.cumsum([0, *query_lens]))
            return GatheredContexts(sum(query_lens), query_lens, query_lens, sums, sums, None, None)
        context_lens = [prefill.stop for prefill in prefills]
        cache_rows = [
            slot_mapping[prefill.row : prefill.row + prefill.stop]
            if prefill.context_rows is None
            else prefill.context_rows
            for prefill in prefills
        ]
        blocks, offsets = np.divmod(torch.cat(cache_rows).numpy(), self._block_size)
        sums, context_sums, blocks32, offsets32 = self._to_device(
            np.cumsum([0, *query_lens]), np.cumsum([0, *context_lens]), blocks, offsets
        )
        return GatheredContexts(
            sum(query_lens), query_lens, context_lens, sums, context_sums, blocks32.long(), offsets32.long()
        )


def groups_of(chunks: Sequence[tuple[int, int]], most: int) -> list[range]:
    """Consecutive chunks in groups whose contexts have at most `most` tokens together; a longer one is alone.

    chunks  (start, stop): tokens [0, start) of the chunk's sequence are cached, its own are [start, stop)

    Chunks that gather cached tokens are not in a group with a run of whole contexts of `WORTH_A_GROUP` tokens.
    """
    groups: list[range] = []
    total, cut_before = 0, _group_starts(chunks)
    for index, (_, stop) in enumerate(chunks):
        total += stop
        if groups and total <= most and index not in cut_before:
            groups[-1] = range(groups[-1].start, index + 1)
        else:
            groups.append(range(index, index + 1))
            total = stop
    return groups


def _group_starts(chunks: Sequence[tuple[int, int]]) -> set[int]:
    """Where so many tokens of whole contexts begin or end that they are a group of their own."""
    cuts, begin = set(), 0
    for is_whole, run in itertools.groupby(chunks, key=lambda chunk: chunk[0] == 0):
        stops = [stop for _, stop in run]
        end = begin + len(stops)
        if is_whole and sum(stops) >= WORTH_A_GROUP:
            cuts |= {begin, end}
        begin = end
    return cuts
