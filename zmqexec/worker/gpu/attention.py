"""Attention of prefills, and the plan that a step's decodes share.

Runs in: worker.

Prefills use torch's variable-length flash attention over contiguous keys: of the chunk itself, or, where a prefix is
cached, gathered from the cache's pages. Chunks are attended in groups, so that a short rest of many prompts behind one
long prefix does not gather that prefix for all of them at a time, and many whole contexts beside it gather nothing.
float32 is for truth, not for speed: one call of `scaled_dot_product_attention` per sequence. Those of a deterministic
engine are in `deterministic.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from zmqexec.worker.kernels import reference

WORTH_A_GROUP = 1024
"""Tokens whose keys and values take longer to gather than one more call of the attention takes to start: estimated."""


class PrefillContexts(Protocol):
    """Prefills of a step that are attended together."""

    @property
    def num_tokens(self) -> int:
        """Query tokens of all of them."""
        ...

    def attend(self, qkv: torch.Tensor, num_heads: int, cache: torch.Tensor, scale: float) -> torch.Tensor:
        """As `Contexts.attend`."""
        ...


@dataclass(frozen=True)
class Contexts:
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

    def attend(self, qkv: torch.Tensor, num_heads: int, cache: torch.Tensor, scale: float) -> torch.Tensor:
        """Causal attention of the chunks, each of whose queries sees its sequence up to itself.

        Returns [num_tokens, num_heads, head_dim].

        qkv    [num_tokens, num_heads + 2 · num_kv_heads, head_dim]  rotated
        cache  [num_blocks, 2, num_kv_heads, block_size, head_dim]   holds the chunks' keys and values already
        """
        num_kv_heads = cache.shape[2]
        query = qkv[:, :num_heads]
        if self.blocks is None:
            keys, values = qkv[:, num_heads : num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads :]
        else:
            keys = cache[self.blocks, 0, :, self.offsets]
            values = cache[self.blocks, 1, :, self.offsets]
        if query.is_cuda and query.dtype != torch.float32:
            attended: torch.Tensor = torch.ops.aten._flash_attention_forward(
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
            return attended
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        begin = context_begin = 0
        for query_len, context_len in zip(self.query_lens, self.context_lens, strict=True):
            chunk, context = slice(begin, begin + query_len), slice(context_begin, context_begin + context_len)
            kv = torch.stack([keys[context], values[context]], dim=1)
            out[chunk] = reference.prefill_attention(query[chunk], kv, scale)
            begin, context_begin = chunk.stop, context.stop
        return out


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
