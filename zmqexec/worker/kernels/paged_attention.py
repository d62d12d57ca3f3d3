"""Paged attention on the GPU: the plan of a step and the buffers it lives in, and the call of each layer.

Runs in: worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from zmqexec.errors import InternalError
from zmqexec.model_config import GPU_HEAD_DIMS
from zmqexec.worker.kernels import native

MANY_ITEMS = 1024
"""KV heads of rows: what a launch divides among its blocks."""


@dataclass(frozen=True)
class Launch:
    """How paged attention is launched.

    variant          which of the compiled kernels of a head dim
    blocks_per_sm    how many of its blocks an SM gets
    min_split_tiles  tiles of 16 tokens in the smallest part of a split context: merging the parts costs what smaller
                     ones would save
    """

    variant: int
    blocks_per_sm: int
    min_split_tiles: int


def choose_launch(head_dim: int, num_rows: int, num_kv_heads: int, module: ModuleType) -> Launch:
    """The fastest for a step of so many rows, padded ones included.

    Heads of 128, on an H100, µs: with few items one block of 8 warps per SM (50 against 52 for 8 rows of 4096 tokens, 8
    KV heads; 55 against 68 for one of 32768), with many three of 4 warps (24 against 46 for 256 rows of 40 tokens, 8 KV
    heads; 361 against 364 for 64 of 1024, 32 KV heads).

    Parts of at least 16 and 4 tiles, on an H100, of 32 heads over 8 KV heads: 7.1 and 8.6 for one row of 1024 tokens;
    over 32: 6.3 and 7.8 for one of 300, 18.7 and 22.1 for eight of 300; no difference from 1000 tokens on. Of 24 and 16
    with many items, on an H200: 87.9 and 90.4 for 32 rows of 690 tokens, 32 KV heads; 247.9 and 248.2 for 64 of 1024.
    """
    is_many = num_rows * num_kv_heads >= MANY_ITEMS
    variant, blocks_per_sm = 0, module.attention_grid(head_dim, 0)[0]
    if head_dim == 128:
        variant, blocks_per_sm = (0, 3) if is_many else (2, 1)
    return Launch(variant, blocks_per_sm, min_split_tiles=24 if is_many else 16)


class AttentionWorkspace:
    """Plan, tickets and partial results of paged attention, at addresses that a CUDA graph may keep.

    `plan` once per step, then `attend` once per layer, on one stream. All layers that share a workspace have equal
    heads and window; a model that alternates windows has a workspace for each.

    max_rows            of a step, <= 1024
    max_query_len       of a row: more than 16 // (num_heads // num_kv_heads) are computed in several passes
    max_context_len     of a row; matters with `fixed_split_tokens` only
    window              tokens that a query sees, itself included; 0: all
    fixed_split_tokens  multiple of 64; 0 splits contexts as fills the GPU best. Otherwise they are split at multiples
                        of it, so that a row's result depends, to the bit, on nothing else in the batch, and a query
                        token's not on how many share its row
    num_blocks          of the launch; None: as many as leave an SM's next kernel room beside them
    """

    def __init__(
        self,
        device: torch.device,
        *,
        max_rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_context_len: int,
        max_query_len: int = 1,
        window: int = 0,
        fixed_split_tokens: int = 0,
        min_split_tiles: int = 16,
        variant: int = 0,
        num_blocks: int | None = None,
        module: ModuleType | None = None,
    ) -> None:
        if num_heads % num_kv_heads != 0 or head_dim not in GPU_HEAD_DIMS:
            raise InternalError(f"no paged attention for {num_heads} heads, {num_kv_heads} KV heads of {head_dim}")
        self._module = native.module_of(device) if module is None else module
        if num_blocks is None:
            num_blocks = native.num_sms(device) * self._module.attention_grid(head_dim, variant)[0]
        self.num_blocks = num_blocks
        self._device = device
        self._max_rows, self._max_query_len = max_rows, max_query_len
        self._num_kv_heads, self._group, self._head_dim = num_kv_heads, num_heads // num_kv_heads, head_dim
        self._window, self._fixed_split_tokens, self._variant = window, fixed_split_tokens, variant
        self._min_split_tiles = min_split_tiles
        sizes = self._module.attention_workspace_bytes(
            num_blocks,
            max_rows,
            num_kv_heads,
            self._group,
            head_dim,
            max_query_len,
            max_context_len,
            fixed_split_tokens,
        )
        # zeros(): tickets and plan are never read before `plan` has written them, but a stray read shall be harmless.
        self._buffers = [torch.zeros(max(16, size), dtype=torch.uint8, device=device) for size in sizes]
        self._addresses = tuple(buffer.data_ptr() for buffer in self._buffers)
        self._dtypes = {torch.bfloat16: self._module.BFLOAT16, torch.float16: self._module.FLOAT16}

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers)

    def plan(
        self,
        context_lens: torch.Tensor,
        row_slots: torch.Tensor | None = None,
        query_starts: torch.Tensor | None = None,
        *,
        pdl: bool = True,
    ) -> None:
        """Divide this step's attention among the blocks of the launch.

        context_lens  [num_rows]      int32, tokens including the new ones; 0: a padded row
        row_slots     [num_rows]      int32, each row's row of the block tables; None: row i is slot i
        query_starts  [num_rows + 1]  int32, row i has tokens [starts[i], starts[i + 1]) of the step; None: token i
        """
        num_rows = context_lens.shape[0]
        ok = context_lens.dtype == torch.int32 and num_rows <= self._max_rows
        ok = ok and (row_slots is None or (row_slots.dtype == torch.int32 and row_slots.shape == (num_rows,)))
        ok = ok and (query_starts is None or (query_starts.dtype == torch.int32 and len(query_starts) == num_rows + 1))
        if not ok:
            raise InternalError(f"attention plan of {num_rows} rows does not fit a workspace of {self._max_rows}")
        self._module.attention_plan(
            self._addresses[0],
            self._addresses[1],
            context_lens.data_ptr(),
            0 if row_slots is None else row_slots.data_ptr(),
            0 if query_starts is None else query_starts.data_ptr(),
            num_rows,
            self._num_kv_heads,
            self._group,
            self._window,
            self._fixed_split_tokens,
            self._min_split_tiles,
            self.num_blocks,
            self._stream(),
            pdl,
        )

    def attend(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        cache: torch.Tensor,
        block_tables: torch.Tensor,
        *,
        scale: float,
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        pdl: bool = True,
    ) -> None:
        """Attention of the step's new tokens over their sequences' cache, which holds them already: one layer.

        out           [num_tokens, num_heads, head_dim]                    bfloat16 or float16, contiguous
        query         [num_tokens, num_heads, head_dim]                    as out; rows may lie apart
        cache         [num_blocks, 2, num_kv_heads, block_size, head_dim]  as out; keys, then values
        block_tables  [num_slots, max_blocks]                              int32; entries past a context are not read
        alibi_slopes  [num_heads]                                          float32

        Rows of `out` that belong to padded rows of the plan are left as they are. `scale` multiplies the logits, then
        comes softcap · tanh(logit / softcap) (0: none), then ALiBi (Press et al. 2022, arXiv:2108.12409). Query head h
        reads KV head h // (num_heads // num_kv_heads); the mask is bottom-right causal. Accumulates in float32.
        Layout: Kwon et al. 2023 (arXiv:2309.06180). Kernel: csrc/cuda/paged_attention.cu. Reference: reference.py,
        tolerance 1e-2 (bfloat16) or 2e-3 (float16) of the largest value.
        """
        heads = (self._num_kv_heads * self._group, self._head_dim)
        ok = out.shape == query.shape and query.shape[1:] == heads and query.stride()[1:] == (self._head_dim, 1)
        ok = ok and out.is_contiguous() and cache.is_contiguous() and block_tables.stride(-1) == 1
        ok = ok and cache.dim() == 5 and cache.shape[1:3] == (2, self._num_kv_heads)
        ok = ok and cache.shape[4] == self._head_dim and cache.shape[3] % 16 == 0
        ok = ok and block_tables.dim() == 2 and block_tables.dtype == torch.int32
        ok = ok and out.dtype == query.dtype == cache.dtype and out.dtype in self._dtypes
        ok = ok and (alibi_slopes is None or (alibi_slopes.shape == heads[:1] and alibi_slopes.dtype == torch.float32))
        if not ok:
            raise InternalError(
                f"paged attention: shapes do not fit its docstring: out {list(out.shape)}, query {list(query.shape)}, "
                f"cache {list(cache.shape)} {cache.dtype}, block_tables {list(block_tables.shape)}"
            )
        self._module.paged_attention(
            out.data_ptr(),
            query.data_ptr(),
            cache.data_ptr(),
            block_tables.data_ptr(),
            0 if alibi_slopes is None else alibi_slopes.data_ptr(),
            *self._addresses,
            query.stride(0),
            block_tables.stride(0),
            self._num_kv_heads,
            self._group,
            self._head_dim,
            cache.shape[3],
            self._window,
            scale,
            softcap,
            self._max_query_len,
            self.num_blocks,
            self._variant,
            self._dtypes[out.dtype],
            self._stream(),
            pdl,
        )

    def _stream(self) -> int:
        return native.stream_of(self._device)
