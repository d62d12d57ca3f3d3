"""Attention of prefills, and the plan that a step's decodes share.

Runs in: worker.

Prefills use torch's variable-length flash attention over contiguous keys: of the chunk itself, or, where a prefix is
cached, gathered from the cache's pages. Chunks are attended in groups, so that a short rest of many prompts behind one
long prefix does not gather that prefix for all of them at a time. float32 is for truth, not for speed: one call of
`scaled_dot_product_attention` per sequence. Those of a deterministic engine are in `deterministic.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from zmqexec.worker.kernels import reference


class PrefillContexts(Protocol):
    """Prefills of a step that are attended together."""

    @property
    def num_tokens(self) -> int:
        """Query tokens of all of them."""
        ...

    def attend(self, out: torch.Tensor, qkv: torch.Tensor, num_heads: int, cache: torch.Tensor, scale: float) -> None:
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

    def attend(self, out: torch.Tensor, qkv: torch.Tensor, num_heads: int, cache: torch.Tensor, scale: float) -> None:
        """Causal attention of the chunks, each of whose queries sees its sequence up to itself.

        out    [num_tokens, num_heads, head_dim]
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
            out.copy_(
                torch.ops.aten._flash_attention_forward(
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
            )
            return
        begin = context_begin = 0
        for query_len, context_len in zip(self.query_lens, self.context_lens, strict=True):
            chunk, context = slice(begin, begin + query_len), slice(context_begin, context_begin + context_len)
            kv = torch.stack([keys[context], values[context]], dim=1)
            out[chunk] = reference.prefill_attention(query[chunk], kv, scale)
            begin, context_begin = chunk.stop, context.stop


def groups_of(context_lens: Sequence[int], most: int) -> list[range]:
    """Consecutive chunks in groups whose contexts have at most `most` tokens together; a longer one is alone."""
    groups: list[range] = []
    total = 0
    for index, length in enumerate(context_lens):
        total += length
        if groups and total <= most:
            groups[-1] = range(groups[-1].start, index + 1)
        else:
            groups.append(range(index, index + 1))
            total = length
    return groups
