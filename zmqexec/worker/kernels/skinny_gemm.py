"""Linear layers for at most 32 tokens: one kernel from the normed hidden state to what the next kernel reads.

Runs in: worker. Kernel: csrc/cuda/skinny_gemm.cu, for bfloat16 and float16 on sm_80 and newer.

All functions accumulate in float32 and round once to the tensors' type wherever separate kernels would store: after the
projection, after the activation or the rotation. Only the sum of a residual is taken before the projection is rounded.
Tolerance against `reference.py` over float32 products, for results near 1: 2 units in the last place, after a rotation
4, after the activation 8.

A token's result has the same bits for any number of tokens beside it and for any number of SMs.

With programmatic dependent launch the weights are read before the previous kernel on the stream has ended: it must not
be what writes them.

Every matrix is [out, in] and contiguous; x may be a strided view with contiguous rows of a multiple of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zmqexec.errors import InternalError
from zmqexec.worker.kernels import native

MAX_TOKENS = 32

_STORE, _ADD_RESIDUAL, _SILU_MUL, _ROPE_WRITE = range(4)


@dataclass(frozen=True)
class Tuning:
    """How the kernel runs: no bit of the result depends on it.

    stages       1 to 4 stages of a warp's ring; 0: as many as leave room for a successor's block on the SM, at most 3
    x_mode       1: x stays in shared memory, 2: it is streamed beside the weights; 0: chosen by the room it takes
    blocks       thread blocks; 0: one per SM
    pdl          may start while its predecessor on the stream ends (sm_90 and newer)
    """

    stages: int = 0
    x_mode: int = 0
    blocks: int = 0
    pdl: bool = True


DEFAULT = Tuning()


def supported(num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether the functions below take this shape; otherwise use the library's matrix product."""
    return (
        0 <= num_tokens <= MAX_TOKENS
        and out_features >= 1
        and in_features >= 8
        and in_features % 8 == 0
        and dtype in (torch.bfloat16, torch.float16)
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tuning: Tuning = DEFAULT,
) -> torch.Tensor:
    """x · weightᵀ + bias.

    x        [num_tokens, in]
    weight   [out, in]         as x
    bias     [out]             as x
    returns  [num_tokens, out] as x or float32: `out`, whose rows may be apart, or a new tensor of `out_dtype`
    """
    if out is None:
        out = x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
    ok = out.shape == (x.shape[0], weight.shape[0]) and out.dtype in (x.dtype, torch.float32)
    _check(ok and out.stride(-1) == 1, "linear", x=x, weight=weight, out=out)
    _launch("linear", _STORE, x, weight, bias, out, tuning, out_float=out.dtype == torch.float32)
    return out


def linear_residual_(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tuning: Tuning = DEFAULT,
) -> torch.Tensor:
    """residual += x · weightᵀ + bias, summed in float32 and rounded once; returns `residual`.

    residual  [num_tokens, out]  as x, rows may be apart; must not overlap x
    Otherwise as `linear`.
    """
    ok = residual.shape == (x.shape[0], weight.shape[0]) and residual.dtype == x.dtype and residual.stride(-1) == 1
    _check(ok, "linear_residual_", residual=residual, x=x, weight=weight)
    _launch("linear_residual_", _ADD_RESIDUAL, x, weight, bias, residual, tuning, residual=residual)
    return residual


def linear_silu_mul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    tuning: Tuning = DEFAULT,
) -> torch.Tensor:
    """silu(gate) · up of the projection x · weightᵀ + bias.

    weight   [2 · inner, in]      rows of gate, then of up; inner a multiple of 4
    bias     [2 · inner]
    returns  [num_tokens, inner]  as x: `out`, whose rows may be apart, or a new tensor
    """
    inner = weight.shape[0] // 2
    if out is None:
        out = x.new_empty((x.shape[0], inner))
    ok = out.shape == (x.shape[0], inner) and out.dtype == x.dtype and out.stride(-1) == 1 and weight.shape[0] % 8 == 0
    _check(ok, "linear_silu_mul", x=x, weight=weight, out=out)
    _launch("linear_silu_mul", _SILU_MUL, x, weight, bias, out, tuning)
    return out


def qkv_rope_write(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_heads: int,
    out: torch.Tensor | None = None,
    tuning: Tuning = DEFAULT,
) -> torch.Tensor:
    """Rotated queries of the projection x · weightᵀ + bias; its rotated keys and its values go into the cache.

    weight        [(num_heads + 2 · num_kv_heads) · head_dim, in]  heads of query, key and value; head_dim % 8 == 0
    cache         [num_blocks, 2, num_kv_heads, block_size, head_dim]  as x
    slot_mapping  [num_tokens]  int32, block · block_size + place in the block; -1: not cached
    positions     [num_tokens]  int32, rows of cos and sin; also those of padding
    cos, sin      [max_position, head_dim / 2]  float32
    returns       [num_tokens, num_heads, head_dim]  as x: `out`, or a new tensor

    Pairs dimension i with i + head_dim / 2, as `rope_`. The projection is rounded before it is rotated.
    """
    num_kv_heads, block_size, head_dim = cache.shape[2:]
    if out is None:
        out = x.new_empty((x.shape[0], num_heads, head_dim))
    ok = (
        out.shape == (x.shape[0], num_heads, head_dim) and out.dtype == x.dtype == cache.dtype and cache.is_contiguous()
    )
    ok = ok and (out.shape[0] == 0 or out[0].is_contiguous()) and cache.shape[1] == 2 and head_dim % 8 == 0
    ok = ok and weight.shape[0] == (num_heads + 2 * num_kv_heads) * head_dim
    ok = ok and slot_mapping.shape == positions.shape == x.shape[:1] and cos.shape == sin.shape
    ok = ok and slot_mapping.dtype == positions.dtype == torch.int32 and cos.dtype == sin.dtype == torch.float32
    ok = ok and cos.shape[1:] == (head_dim // 2,) and cos.is_contiguous() and sin.is_contiguous()
    ok = ok and slot_mapping.is_contiguous() and positions.is_contiguous()
    _check(ok, "qkv_rope_write", x=x, weight=weight, out=out, cache=cache, slot_mapping=slot_mapping, cos=cos, sin=sin)
    addresses = [tensor.data_ptr() for tensor in (cache, slot_mapping, positions, cos, sin)]
    rope = (*addresses, num_heads, num_kv_heads, head_dim, block_size)
    _launch("qkv_rope_write", _ROPE_WRITE, x, weight, bias, out, tuning, rope=rope)
    return out


_NO_ROPE = (0,) * 9


def _launch(
    name: str,
    epilogue: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tuning: Tuning,
    *,
    out_float: bool = False,
    residual: torch.Tensor | None = None,
    rope: tuple[int, ...] = _NO_ROPE,
) -> None:
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    ok = weight.shape == (out_features, in_features) and weight.dtype == x.dtype and weight.is_contiguous()
    ok = ok and x.stride(-1) == 1 and supported(num_tokens, out_features, in_features, x.dtype)
    ok = ok and (bias is None or (bias.shape == (out_features,) and bias.dtype == x.dtype and bias.is_contiguous()))
    _check(ok, name, x=x, weight=weight)
    if num_tokens == 0:
        return
    module, stream = native.module_of(x.device), native.stream_of(x.device)
    module.skinny_gemm(
        weight.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        out.stride(0),
        module.BFLOAT16 if x.dtype == torch.bfloat16 else module.FLOAT16,
        out_float,
        0 if bias is None else bias.data_ptr(),
        epilogue,
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        *rope,
        tuning.blocks or native.num_sms(x.device),
        tuning.stages,
        tuning.x_mode,
        stream,
        tuning.pdl,
    )


def _check(ok: bool, kernel: str, **tensors: torch.Tensor) -> None:
    if not ok:
        shapes = ", ".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())
        raise InternalError(f"{kernel}: shapes, types or strides do not fit its docstring: {shapes}")
