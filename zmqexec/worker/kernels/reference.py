"""The model's kernels in plain torch: what runs on the CPU, and the truth for any faster version.

Runs in: worker. `kernels/__init__.py` gives the shapes and checks them.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from zmqexec.worker.kernels.plan import DecodePlan

PREFILL_TILE = 512
"""Query tokens per attention call over a cached prefix: bounds the mask's memory at long contexts."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def rope_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    half = heads.shape[-1] // 2
    low, high = heads[..., :half].float(), heads[..., half:].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated_low = low * cos - high * sin
    heads[..., half:] = high * cos + low * sin
    heads[..., :half] = rotated_low


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    inner = gate_up.shape[-1] // 2
    return silu(gate_up[..., :inner]).mul_(gate_up[..., inner:])


def write_kv(cache: torch.Tensor, slot_mapping: torch.Tensor, kv: torch.Tensor) -> None:
    cache.index_copy_(0, slot_mapping, kv)


def decode_attention(query: torch.Tensor, cache: torch.Tensor, plan: DecodePlan, scale: float) -> torch.Tensor:
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = cache.shape[2]
    blocks = cache.view(-1, *plan.workspace.shape[1:])
    # The query heads that share a KV head become the rows of one small matrix.
    query = query.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = torch.empty_like(query)
    for tile in plan.tiles:
        gathered = plan.workspace[: len(tile.blocks)]
        torch.index_select(blocks, 0, tile.blocks, out=gathered)
        # What a block holds past the context is another sequence's, or was never written: NaN there would spread.
        gathered.flatten(0, 1).index_fill_(0, tile.tail_rows, 0.0)
        kv = gathered.view(tile.num_seqs, -1, *cache.shape[1:])[:, : tile.length]
        keys, values = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
        out[tile.seqs] = scaled_dot_product_attention(query[tile.seqs], keys, values, attn_mask=tile.mask, scale=scale)
    return out.view(num_seqs, num_heads, head_dim)


def prefill_attention(query: torch.Tensor, kv: torch.Tensor, scale: float) -> torch.Tensor:
    num_tokens, num_heads, head_dim = query.shape
    context_len, _, num_kv_heads, _ = kv.shape
    group = num_heads // num_kv_heads
    # KV heads are the batch, the query heads of each its heads: keys are shared by stride 0, not copied.
    keys = kv[:, 0].permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1)
    values = kv[:, 1].permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1)
    grouped = query.view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    if context_len == num_tokens:
        out = scaled_dot_product_attention(grouped, keys, values, is_causal=True, scale=scale)
    else:
        prefix_len = context_len - num_tokens
        tiles = [
            _prefill_tile(grouped[:, :, start : start + PREFILL_TILE], keys, values, prefix_len + start, scale)
            for start in range(0, num_tokens, PREFILL_TILE)
        ]
        out = torch.cat(tiles, dim=2)
    return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def _prefill_tile(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first_position: int, scale: float
) -> torch.Tensor:
    """Attention of consecutive queries, the first at `first_position`, over the keys at and before each."""
    num_tokens = query.shape[2]
    length = first_position + num_tokens
    mask = torch.ones((num_tokens, length), dtype=torch.bool, device=query.device).tril(first_position)
    return scaled_dot_product_attention(query, keys[:, :, :length], values[:, :, :length], attn_mask=mask, scale=scale)


def padded_decode_attention(
    query: torch.Tensor, cache: torch.Tensor, block_tables: torch.Tensor, context_lens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of one new token per row over a paged cache, all contexts padded to the longest; for truth, not speed.

    query         [num_rows, num_heads, head_dim]
    cache         [num_blocks, 2, num_kv_heads, block_size, head_dim]  as query
    block_tables  [num_rows, max_blocks]  int32; entries past a context are not read
    context_lens  [num_rows]              int32, >= 1
    returns       as query
    """
    num_kv_heads, block_size = cache.shape[2:4]
    length = int(context_lens.max())
    positions = torch.arange(length, device=query.device)
    inside = positions < context_lens.unsqueeze(1)
    tables = block_tables[:, : -(-length // block_size)].long()
    blocks = torch.where(inside, tables.repeat_interleave(block_size, dim=1)[:, :length], tables[:, :1])
    # Past a context anything may lie in the cache, even NaN: there the first token is taken, and masked.
    offsets = torch.where(inside, positions % block_size, 0)
    keys, values = (cache[blocks, part, :, offsets].transpose(1, 2) for part in range(2))
    grouped = query.reshape(len(query), num_kv_heads, -1, query.shape[-1])
    mask = inside.view(len(query), 1, 1, length)
    return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale).reshape(query.shape)


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    row_slots: torch.Tensor | None = None,
    query_starts: torch.Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row by row in float32 (shapes: paged_attention.py); the rows of `out` that no row of the batch has are 0."""
    num_heads = query.shape[1]
    num_kv_heads, block_size = cache.shape[2:4]
    out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    for row, context_len in enumerate(context_lens.tolist()):
        begin, end = (row, row + 1) if query_starts is None else query_starts[row : row + 2].tolist()
        if context_len == 0 or begin == end:
            continue
        positions = torch.arange(context_len - (end - begin), context_len, device=query.device).unsqueeze(1)
        first_seen = max(0, context_len - (end - begin) + 1 - window) if window > 0 else 0
        tokens = torch.arange(first_seen, context_len, device=query.device)
        slot = row if row_slots is None else int(row_slots[row])
        blocks = block_tables[slot].long()[tokens // block_size]
        kv = cache[blocks, :, :, tokens % block_size].float()  # [tokens, 2, num_kv_heads, head_dim]
        kv = kv.repeat_interleave(num_heads // num_kv_heads, dim=2)
        logits = torch.einsum("qhd,khd->hqk", query[begin:end].float(), kv[:, 0]) * scale
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        if alibi_slopes is not None:
            logits = logits + alibi_slopes.float().view(-1, 1, 1) * (tokens - positions)
        hidden = tokens > positions
        if window > 0:
            hidden = hidden | (tokens <= positions - window)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, kv[:, 1])
    return out
