"""The kernels that the model on a GPU is made of, on one device.

Runs in: worker. Shapes stand in `kernels/` and csrc/cuda; everything runs on torch's current stream, takes part in
programmatic dependent launch, and may be captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from zmqexec.worker.gpu.device import Device
from zmqexec.worker.kernels import skinny_gemm, tiled_gemm
from zmqexec.worker.kernels.decode_state import DecodeRows, SlotState, begin_decode
from zmqexec.worker.kernels.paged_attention import AttentionWorkspace, Launch, choose_launch
from zmqexec.worker.kernels.reference import padded_decode_attention

SKINNY_ROWS = 16
"""Up to here `skinny_gemm` computes a decode step's products, above it `tiled_gemm`. On an H200, 7B, µs a layer without
attention, by the one, the other and cuBLAS: 111, 108 and 127 for 16 rows, where 8 rows take the first 99. (Since the
other has become the faster one for 16, no whole step was tried with it.) Other GPUs than Hopper have cuBLAS there,
which for 24 rows took 128 where `skinny_gemm` took 133."""

TILED_ROWS = 128
"""As above, by `tiled_gemm` and by cuBLAS: 111 and 127 for 32 rows, 118 and 131 for 64, 129 and 141 for 128; half of
each matrix: 65 and 78, 69 and 78, 78 and 84. More rows than these it does not take."""


@dataclass(frozen=True)
class Places:
    """Where a step's tokens stand.

    slot_mapping  [num_tokens]  int32, the cache row for the token's keys and values; -1: none
    positions     [num_tokens]  int32, rows of `cos` and `sin`
    cos, sin      [positions, head_dim / 2]  float32
    """

    slot_mapping: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class Products(Protocol):
    """Linear layers by some means; every matrix is [out, in]."""

    def adds_residual(self, bias: torch.Tensor | None) -> bool:
        """Whether `linear_residual_` adds within the product. Otherwise a norm behind it had better add."""
        ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x · weightᵀ + bias."""
        ...

    def linear_residual_(
        self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """residual += x · weightᵀ + bias."""
        ...


class LibraryProducts:
    """Of any number of rows, by the library."""

    def adds_residual(self, bias: torch.Tensor | None) -> bool:
        """As `Products.adds_residual`."""
        return bias is None

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `Products.linear`."""
        return torch.nn.functional.linear(x, weight, bias)

    def linear_residual_(
        self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """As `Products.linear_residual_`; without a bias, summed before it is rounded."""
        if bias is None:
            residual.addmm_(x, weight.t())
        else:
            residual += self.linear(x, weight, bias)


def attention_workspace(device: Device, launch: Launch, **sizes: int) -> AttentionWorkspace:
    """The workspace of the attention kernel; `sizes` as there."""
    return AttentionWorkspace(
        device.torch_device,
        **sizes,
        variant=launch.variant,
        min_split_tiles=launch.min_split_tiles,
        num_blocks=device.num_sms * launch.blocks_per_sm,
        module=device.native,
    )


def attend_padded(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    row_slots: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    at_once: int,
) -> None:
    """Attention of one token per row in plain torch, `at_once` rows at a time.

    out, query               [num_rows, num_heads, head_dim]
    row_slots, context_lens  [num_rows]  int32
    """
    for begin in range(0, len(out), at_once):
        part = slice(begin, begin + at_once)
        tables = block_tables[row_slots[part].long()]
        out[part] = padded_decode_attention(query[part], cache, tables, context_lens[part], scale)


class DecodeAttention:
    """Attention of one new token per row: `plan` once per step, `attend` in every layer.

    pdl  the kernels may start while their predecessors end

    float32 is computed by plain torch, which needs to know the longest context on the host and so cannot be captured in
    a graph.
    """

    def __init__(
        self,
        device: Device,
        dtype: torch.dtype,
        state: SlotState,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        fixed_split_tokens: int = 0,
    ) -> None:
        """`fixed_split_tokens` as in `AttentionWorkspace`; in float32, any but 0: each row is computed alone."""
        self.pdl = True
        self._state = state
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self._is_alone = fixed_split_tokens > 0
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._native = device.native
        self._workspace: AttentionWorkspace | None = None
        self._workspaces = {
            launch: attention_workspace(
                device,
                launch,
                max_rows=state.num_known.numel(),
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                max_context_len=state.token_ids.shape[1],
                fixed_split_tokens=fixed_split_tokens,
            )
            for launch in self._launches(state.num_known.numel() if dtype != torch.float32 else 0)
        }

    def _launches(self, max_rows: int) -> set[Launch]:
        return {self._launch(num_rows) for num_rows in range(1, max_rows + 1)}

    def _launch(self, num_rows: int) -> Launch:
        """Each sums in an order of its own, and so all rows of a deterministic engine have the same."""
        return choose_launch(self._head_dim, 1 if self._is_alone else num_rows, self._num_kv_heads, self._native)

    @property
    def has_kernel(self) -> bool:
        """Whether it can be captured."""
        return bool(self._workspaces)

    def plan(self, row_slots: torch.Tensor, context_lens: torch.Tensor) -> None:
        """row_slots, context_lens  [num_rows]  int32; a padded row has a context of 0."""
        if self._workspaces:
            self._workspace = self._workspaces[self._launch(len(context_lens))]
            self._workspace.plan(context_lens, row_slots, pdl=self.pdl)
        else:
            self._rows = row_slots, context_lens

    def attend(self, out: torch.Tensor, query: torch.Tensor, cache: torch.Tensor, scale: float) -> None:
        """out, query  [num_rows, num_heads, head_dim]; rows of `out` that are padding are left as they are."""
        tables = self._state.block_tables
        if self._workspace is not None:
            self._workspace.attend(out, query, cache, tables, scale=scale, pdl=self.pdl)
            return
        assert self._rows is not None
        slots, lens = self._rows
        # As many rows at a time as gather what one of the longest possible does.
        at_once = 1 if self._is_alone else max(1, self._state.token_ids.shape[1] // max(1, int(lens.max())))
        attend_padded(out, query, cache, tables, slots, lens, scale, at_once)


class Ops:
    """The other kernels.

    pdl     they may start while their predecessors end
    tuning  of `skinny_gemm`

    Its products are `Products` of up to TILED_ROWS rows.
    """

    def __init__(self, device: Device) -> None:
        self.pdl = True
        self.tuning = skinny_gemm.DEFAULT
        self._device = device
        self._native = device.native
        self._dtypes = {
            torch.float32: self._native.FLOAT32,
            torch.bfloat16: self._native.BFLOAT16,
            torch.float16: self._native.FLOAT16,
        }

    # ── either end of a step ────────────────────────────────────────────────────────────────────────────────────────

    def begin_decode(self, step: torch.Tensor, max_rows: int, state: SlotState, rows: DecodeRows) -> None:
        """From the staged step to the input of `rows`."""
        begin_decode(step, max_rows, state, rows, pdl=self.pdl)

    def append(
        self,
        state: SlotState,
        slots: torch.Tensor,
        known: torch.Tensor,
        sampled: torch.Tensor,
        out: torch.Tensor,
        *,
        pdl: bool = False,
    ) -> None:
        """Append `sampled` to the sequences of `slots`, and copy it to `out`.

        slots, known, sampled, out  [num_rows]  int32; where `known` is 0, the row is padding
        """
        self._native.finish_decode(
            sampled.data_ptr(),
            slots.data_ptr(),
            known.data_ptr(),
            len(sampled),
            state.token_ids.data_ptr(),
            state.num_known.data_ptr(),
            state.token_ids.shape[1],
            out.data_ptr(),
            self._device.stream(),
            pdl,
        )

    def gather_embedding(self, table: torch.Tensor, token_ids: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """[num_tokens, hidden]: rows of `table` for int32 ids in [first, first + count), zeros for others."""
        out = table.new_empty((len(token_ids), table.shape[1]))
        self._native.gather_embedding(
            out.data_ptr(),
            table.data_ptr(),
            token_ids.data_ptr(),
            len(token_ids),
            table.shape[1],
            first,
            count,
            self._dtypes[table.dtype],
            self._device.stream(),
            self.pdl,
        )
        return out

    def argmax(self, logits: torch.Tensor, out: torch.Tensor, values: torch.Tensor | None, first_id: int) -> None:
        """first_id + the column of each row's largest logit, into `out` [num_rows] int32; that logit into `values`."""
        self._native.argmax(
            out.data_ptr(),
            0 if values is None else values.data_ptr(),
            logits.data_ptr(),
            *logits.shape,
            logits.stride(0),
            first_id,
            self._device.stream(),
            self.pdl,
        )

    # ── layers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As `kernels.rms_norm`."""
        return self._rms_norm(None, x, weight, eps)

    def add_rms_norm_(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """residual += x; the norm of that."""
        return self._rms_norm(residual, x, weight, eps)

    def _rms_norm(
        self, residual: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._native.rms_norm(
            out.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            *x.shape,
            x.stride(0),
            eps,
            self._dtypes[x.dtype],
            self._device.stream(),
            self.pdl,
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """As `kernels.silu_mul`, of a contiguous `gate_up`."""
        rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, inner))
        self._native.silu_mul(
            out.data_ptr(),
            gate_up.data_ptr(),
            rows,
            inner,
            self._dtypes[gate_up.dtype],
            self._device.stream(),
            self.pdl,
        )
        return out

    def rope_write_kv_(
        self, qkv: torch.Tensor, num_heads: int, cache: torch.Tensor, places: Places, *, keep_keys: bool
    ) -> None:
        """Rotate queries in `qkv`, and keys too where they are wanted there, and store keys and values in the cache.

        qkv    [num_tokens, num_heads + 2 · num_kv_heads, head_dim]  contiguous
        cache  [num_blocks, 2, num_kv_heads, block_size, head_dim]
        """
        num_kv_heads, block_size, head_dim = cache.shape[2:]
        self._native.rope_write_kv(
            0,
            qkv.data_ptr(),
            cache.data_ptr(),
            places.slot_mapping.data_ptr(),
            places.positions.data_ptr(),
            places.cos.data_ptr(),
            places.sin.data_ptr(),
            len(qkv),
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            keep_keys,
            self._dtypes[qkv.dtype],
            self._device.stream(),
            self.pdl,
        )

    # ── products that stream their weights ──────────────────────────────────────────────────────────────────────────

    def streams(self, num_rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> bool:
        """Whether the functions below take a product of this shape."""
        if num_rows <= SKINNY_ROWS:
            return skinny_gemm.supported(num_rows, out_features, in_features, dtype)
        device = self._device.torch_device
        return num_rows <= TILED_ROWS and tiled_gemm.supported(num_rows, out_features, in_features, dtype, device)

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """x · weightᵀ + bias; `out` and `out_dtype` for few rows only."""
        if len(x) > SKINNY_ROWS:
            return tiled_gemm.linear(x, weight, bias, pdl=self.pdl)
        return skinny_gemm.linear(x, weight, bias, out=out, out_dtype=out_dtype, tuning=self.tuning)

    def adds_residual(self, bias: torch.Tensor | None) -> bool:
        """As `Products.adds_residual`."""
        return True

    def linear_residual_(
        self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """residual += x · weightᵀ + bias."""
        if len(x) > SKINNY_ROWS:
            tiled_gemm.linear_residual_(residual, x, weight, bias, pdl=self.pdl)
        else:
            skinny_gemm.linear_residual_(residual, x, weight, bias, tuning=self.tuning)

    def linear_silu_mul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """silu(gate) · up of x · weightᵀ + bias."""
        if len(x) > SKINNY_ROWS:
            return tiled_gemm.linear_silu_mul(x, weight, bias, pdl=self.pdl)
        return skinny_gemm.linear_silu_mul(x, weight, bias, tuning=self.tuning)

    def qkv_rope_write(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        cache: torch.Tensor,
        places: Places,
        num_heads: int,
    ) -> torch.Tensor:
        """Rotated queries [num_tokens, num_heads, head_dim]; keys and values go into the cache."""
        if len(x) > SKINNY_ROWS:
            qkv = tiled_gemm.linear(x, weight, bias, pdl=self.pdl).view(len(x), -1, cache.shape[-1])
            self.rope_write_kv_(qkv, num_heads, cache, places, keep_keys=False)
            return qkv[:, :num_heads]
        return skinny_gemm.qkv_rope_write(
            x,
            weight,
            bias,
            cache,
            places.slot_mapping,
            places.positions,
            places.cos,
            places.sin,
            num_heads=num_heads,
            tuning=self.tuning,
        )


def wide_logits(hidden: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
    """float32 [num_rows, vocab_rows] of any number of rows; where the library can, without rounding in between."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, lm_head.t(), out_dtype=torch.float32)
    return torch.nn.functional.linear(hidden, lm_head).float()
