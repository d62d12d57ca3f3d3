"""The model's kernels behind one door: shapes stated and checked here, computed by the version for the device.

Runs in: worker. Every version is plain torch for now (`reference.py`).
"""

from __future__ import annotations

import torch

from zmqexec.errors import InternalError
from zmqexec.worker.kernels import reference
from zmqexec.worker.kernels.plan import DecodePlan


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

    x        [num_tokens, hidden]  float32, bfloat16 or float16
    weight   [hidden]              as x
    returns  [num_tokens, hidden]  as x; computed in float32
    """
    _check(x.dim() == 2 and weight.shape == x.shape[1:], "rms_norm", x=x, weight=weight)
    return reference.rms_norm(x, weight, eps)


def rope_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate query and key heads in place, pairing dimension i with i + head_dim / 2 (Llama's layout).

    heads     [num_tokens, num_heads, head_dim]  float32, bfloat16 or float16; may be a strided view
    cos, sin  [num_tokens, head_dim / 2]         float32
    """
    ok = heads.dim() == 3 and cos.shape == sin.shape == (heads.shape[0], heads.shape[2] // 2)
    _check(ok and heads.shape[2] % 2 == 0, "rope_", heads=heads, cos=cos, sin=sin)
    reference.rope_(heads, cos, sin)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up.

    gate_up  [num_tokens, 2 · inner]  gate columns, then up columns
    returns  [num_tokens, inner]      as gate_up
    """
    _check(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, "silu_mul", gate_up=gate_up)
    return reference.silu_mul(gate_up)


def write_kv(cache: torch.Tensor, slot_mapping: torch.Tensor, kv: torch.Tensor) -> None:
    """Store the keys and values of new tokens.

    cache         [num_blocks · block_size, 2, num_kv_heads, head_dim]
    slot_mapping  [num_tokens]  int64, distinct rows of the cache
    kv            [num_tokens, 2, num_kv_heads, head_dim]  as cache
    """
    ok = kv.shape[1:] == cache.shape[1:] and slot_mapping.shape == kv.shape[:1]
    _check(ok, "write_kv", cache=cache, slot_mapping=slot_mapping, kv=kv)
    reference.write_kv(cache, slot_mapping, kv)


def decode_attention(query: torch.Tensor, cache: torch.Tensor, plan: DecodePlan, *, scale: float) -> torch.Tensor:
    """Attention of one new token per sequence over its paged KV cache, which holds that token's already.

    query    [num_seqs, num_heads, head_dim]
    cache    [num_blocks · block_size, 2, num_kv_heads, head_dim]  as query; rows outside the contexts are not read
    plan     of these sequences' block tables and context lengths
    returns  [num_seqs, num_heads, head_dim]  as query

    `scale` multiplies the logits; query head h reads KV head h // (num_heads // num_kv_heads). Accumulates in float32.
    Layout: Kwon et al. 2023 (arXiv:2309.06180).
    """
    ok = query.dim() == 3 and cache.dim() == 4 and cache.shape[3] == query.shape[2]
    ok = ok and query.shape[1] % cache.shape[2] == 0 and query.shape[0] == sum(tile.num_seqs for tile in plan.tiles)
    _check(ok, "decode_attention", query=query, cache=cache)
    return reference.decode_attention(query, cache, plan, scale)


def prefill_attention(query: torch.Tensor, kv: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Causal attention of the last `num_tokens` tokens of one sequence over the whole of it.

    query    [num_tokens, num_heads, head_dim]
    kv       [context_len, 2, num_kv_heads, head_dim]  as query, with context_len >= num_tokens: query i is token
             context_len - num_tokens + i and sees the tokens up to itself
    returns  [num_tokens, num_heads, head_dim]  as query

    `scale` and heads as in `decode_attention`.
    """
    ok = query.dim() == 3 and kv.dim() == 4 and kv.shape[1] == 2 and kv.shape[3] == query.shape[2]
    ok = ok and kv.shape[0] >= query.shape[0] and query.shape[1] % kv.shape[2] == 0
    _check(ok, "prefill_attention", query=query, kv=kv)
    return reference.prefill_attention(query, kv, scale)


def _check(ok: bool, kernel: str, **tensors: torch.Tensor) -> None:
    if not ok:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise InternalError(f"{kernel}: shapes do not fit its docstring: {shapes}")
