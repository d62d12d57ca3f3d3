"""Attention of prefills on Hopper, over keys and values where they lie in the paged cache.

Runs in: worker. Kernel: csrc/cuda/prefill_attention_sm90a.cu, for bfloat16 and float16 on compute capability 9.0.

FlashAttention (Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608) over a paged cache (Kwon et al. 2023,
arXiv:2309.06180). Scores, softmax and sums are float32; the weights are rounded to the tensors' type before they are
multiplied with the values, the result once. Tolerance against float32, of the largest expected value: 1e-2 for
bfloat16, 2e-3 for float16.

A token's result has the same bits whatever chunks are attended beside its own, and whatever blocks hold its context.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from zmqexec.errors import InternalError
from zmqexec.worker.kernels import native

HEAD_DIMS = (64, 128)
TILE_TOKENS = 128
"""Keys that the kernel takes at a time: a block holds a part of them or several times as many. And query tokens."""

Int32Array = npt.NDArray[np.int32]


def supported(head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `prefill_attention` takes such heads and blocks there."""
    return (
        head_dim in HEAD_DIMS
        and block_size >= 8
        and (block_size in (8, 16, 32, 64) or block_size % TILE_TOKENS == 0)
        and dtype in (torch.bfloat16, torch.float16)
        and native.capability(device) == 90
    )


def items_of(query_lens: Sequence[int], context_lens: Sequence[int]) -> Int32Array:
    """`items` of `prefill_attention`: [num_items, 2], chunk and first query token, those with the most keys first."""
    items = [
        (context_len - query_len + min(first + TILE_TOKENS, query_len), chunk, first)
        for chunk, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True))
        for first in range(0, query_len, TILE_TOKENS)
    ]
    items.sort(reverse=True)
    return np.array([item[1:] for item in items], np.int32).reshape(-1, 2)


def prefill_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    cu_query: torch.Tensor,
    context_lens: torch.Tensor,
    items: torch.Tensor,
    scale: float,
    *,
    takes_turns: bool = True,
    blocks: int = 0,
    pdl: bool = True,
) -> None:
    """Causal attention of chunks of tokens, each of which sees its sequence up to itself.

    out           [num_tokens, num_heads, head_dim]  as query; only the chunks' tokens are written
    query         [num_tokens, num_heads, head_dim]  bf16 or fp16, rotated
    cache         [num_blocks, 2, num_kv_heads, block_size, head_dim]  as query: keys, then values; the chunks' too
    block_tables  [num_slots, max_blocks]  int32, block numbers; entries past the context are unread
    slots         [num_chunks]      int32, the row of block_tables of each chunk
    cu_query      [num_chunks + 1]  int32, chunk i has query tokens [cu_query[i], cu_query[i + 1])
    context_lens  [num_chunks]      int32, tokens of the chunk's sequence up to the chunk's end
    items         [num_items, 2]    int32, as `items_of`
    takes_turns   the halves of a thread block alternate in asking for matrix products
    blocks        thread blocks at most; 0: one per SM
    pdl           may start while its predecessor on the stream ends

    A token's heads are contiguous, tokens of out and query may be apart; every address is 16-aligned. `scale`
    multiplies the logits; query head h reads KV head h // (num_heads // num_kv_heads).
    """
    num_tokens, num_heads, head_dim = query.shape
    num_blocks, _, num_kv_heads, block_size, _ = cache.shape
    num_chunks = len(context_lens)
    ok = out.shape == query.shape and cache.shape == (num_blocks, 2, num_kv_heads, block_size, head_dim)
    ok = ok and out.dtype == query.dtype == cache.dtype and cache.is_contiguous() and block_tables.dim() == 2
    ok = ok and all(heads.stride()[1:] == (head_dim, 1) for heads in (out, query))
    ok = ok and slots.shape == (num_chunks,) and cu_query.shape == (num_chunks + 1,) and block_tables.stride(1) == 1
    ok = ok and all(tensor.dtype == torch.int32 for tensor in (block_tables, slots, cu_query, context_lens))
    ok = ok and items.shape[1:] == (2,) and items.dtype == torch.int32
    ok = ok and all(tensor.is_contiguous() for tensor in (slots, cu_query, context_lens, items))
    if not (ok and supported(head_dim, block_size, query.dtype, query.device)):
        raise InternalError(
            f"prefill_attention: shapes, types or strides do not fit its docstring: out {list(out.shape)}, "
            f"query {list(query.shape)} {query.dtype}, cache {list(cache.shape)} {cache.dtype}, "
            f"block_tables {list(block_tables.shape)}, slots {list(slots.shape)}, cu_query {list(cu_query.shape)}, "
            f"context_lens {list(context_lens.shape)}, items {list(items.shape)}"
        )
    module = native.module_of(query.device)
    module.prefill_attention(
        out.data_ptr(),
        query.data_ptr(),
        cache.data_ptr(),
        block_tables.data_ptr(),
        slots.data_ptr(),
        cu_query.data_ptr(),
        context_lens.data_ptr(),
        items.data_ptr(),
        num_tokens,
        len(items),
        num_blocks,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        query.stride(0) if num_tokens > 1 else num_heads * head_dim,
        out.stride(0) if num_tokens > 1 else num_heads * head_dim,
        block_tables.stride(0),
        scale,
        takes_turns,
        blocks or native.num_sms(query.device),
        module.BFLOAT16 if query.dtype == torch.bfloat16 else module.FLOAT16,
        native.stream_of(query.device),
        pdl,
    )
