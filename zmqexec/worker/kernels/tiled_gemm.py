"""Linear layers for 17 to 128 tokens on Hopper: the weights streamed once through bulk copies and warp-group products.

Runs in: worker. Kernel: csrc/cuda/tiled_gemm_sm90a.cu, for bfloat16 and float16 on compute capability 9.0.

All functions accumulate in float32 and round once to the tensors' type wherever separate kernels would store: after the
projection, after the activation. Only the sum of a residual is taken before the projection is rounded. Tolerance
against `reference.py` over float32 products, for results near 1: 2 units in the last place, after the activation 8.

A token's result has the same bits for any tokens beside it.

With programmatic dependent launch the weights are read before the previous kernel on the stream has ended: it must not
be what writes them.

Every matrix is [out, in] and contiguous; x may be a strided view. Rows of all tensors are multiples of 16 bytes apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from zmqexec.errors import InternalError
from zmqexec.worker.kernels import native

MAX_TOKENS = 128
ROWS = (64, 96, 128, 160, 176, 192, 224)
SPLITS = (1, 2, 4, 8)

_STORE, _ADD_RESIDUAL, _SILU_MUL = range(3)


@dataclass(frozen=True)
class Tile:
    """What a thread block computes.

    rows    of the weight, one of ROWS
    splits  how many blocks share it, each with a part of the columns: one of SPLITS
    stages  of the block's ring; 0: as many as fit
    """

    rows: int
    splits: int = 1
    stages: int = 0


def supported(num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the functions below take this shape there; otherwise use the library's matrix product."""
    return (
        0 <= num_tokens <= MAX_TOKENS
        and out_features >= 16
        and out_features % 16 == 0
        and in_features >= 8
        and in_features % 8 == 0
        and dtype in (torch.bfloat16, torch.float16)
        and native.capability(device) == 90
    )


@cache
def choose_tile(out_features: int, num_sms: int) -> Tile:
    """The tile that leaves the fewest SMs without work, where a split and a second wave of blocks cost something.

    On an H200, for the matrices of Llama-2-7B on one and two GPUs and 32 to 128 tokens, the fastest or nearly so.
    """

    def score(tile: Tile) -> float:
        blocks = -(-out_features // tile.rows) * tile.splits
        waves = -(-blocks // num_sms)
        return blocks / (waves * num_sms) - 0.09 * math.log2(tile.splits) - 0.05 * (waves - 1)

    return max((Tile(rows, splits) for rows in ROWS for splits in SPLITS), key=score)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
    pdl: bool = True,
) -> torch.Tensor:
    """x · weightᵀ + bias.

    x        [num_tokens, in]
    weight   [out, in]         as x
    bias     [out]             as x
    tile     None: as `choose_tile`
    pdl      may start while its predecessor on the stream ends
    returns  [num_tokens, out] as x: `out`, whose rows may be apart, or a new tensor
    """
    if out is None:
        out = x.new_empty((x.shape[0], weight.shape[0]))
    _check(out.shape == (x.shape[0], weight.shape[0]), "linear", x=x, weight=weight, out=out)
    _launch("linear", _STORE, x, weight, bias, out, None, tile, pdl)
    return out


def linear_residual_(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tile: Tile | None = None,
    pdl: bool = True,
) -> torch.Tensor:
    """residual += x · weightᵀ + bias, summed in float32 and rounded once; returns `residual`.

    residual  [num_tokens, out]  as x; must not overlap x
    Otherwise as `linear`.
    """
    _check(residual.shape == (x.shape[0], weight.shape[0]), "linear_residual_", residual=residual, x=x, weight=weight)
    _launch("linear_residual_", _ADD_RESIDUAL, x, weight, bias, residual, residual, tile, pdl)
    return residual


def linear_silu_mul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
    pdl: bool = True,
) -> torch.Tensor:
    """silu(gate) · up of the projection x · weightᵀ + bias.

    weight   [2 · inner, in]      rows of gate, then of up; inner a multiple of 8
    bias     [2 · inner]
    returns  [num_tokens, inner]  as x: `out`, whose rows may be apart, or a new tensor
    Otherwise as `linear`.
    """
    inner = weight.shape[0] // 2
    if out is None:
        out = x.new_empty((x.shape[0], inner))
    ok = out.shape == (x.shape[0], inner) and weight.shape[0] % 16 == 0
    _check(ok, "linear_silu_mul", x=x, weight=weight, out=out)
    _launch("linear_silu_mul", _SILU_MUL, x, weight, bias, out, None, tile, pdl)
    return out


def _launch(
    name: str,
    epilogue: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    tile: Tile | None,
    pdl: bool,
) -> None:
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    ok = weight.shape == (out_features, in_features) and weight.is_contiguous() and weight.dtype == x.dtype == out.dtype
    ok = ok and x.stride(-1) == 1 and out.stride(-1) == 1
    ok = ok and (bias is None or (bias.shape == (out_features,) and bias.dtype == x.dtype and bias.is_contiguous()))
    ok = ok and supported(num_tokens, out_features, in_features, x.dtype, x.device)
    _check(ok, name, x=x, weight=weight, out=out)
    if num_tokens == 0:
        return
    module, stream = native.module_of(x.device), native.stream_of(x.device)
    tile = tile or choose_tile(out_features, native.num_sms(x.device))
    module.tiled_gemm(
        weight.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        num_tokens,
        out_features,
        in_features,
        x.stride(0) if num_tokens > 1 else in_features,
        out.stride(0) if num_tokens > 1 else out_features,
        module.BFLOAT16 if x.dtype == torch.bfloat16 else module.FLOAT16,
        0 if bias is None else bias.data_ptr(),
        epilogue,
        0 if residual is None else residual.data_ptr(),
        0 if residual is None or num_tokens == 1 else residual.stride(0),
        tile.rows,
        tile.splits,
        tile.stages,
        stream,
        pdl,
    )


def _check(ok: bool, kernel: str, **tensors: torch.Tensor) -> None:
    if not ok:
        shapes = ", ".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())
        raise InternalError(f"{kernel}: shapes, types or strides do not fit its docstring: {shapes}")
