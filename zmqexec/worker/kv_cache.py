"""The paged KV cache of one rank.

Runs in: worker.
"""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of every cached token, by layer.

    layers[i]  [num_blocks · block_size, 2, num_kv_heads, head_dim]: token t of block b is row b · block_size + t, its
               keys (rotated) at [row, 0] and its values at [row, 1], so that one copy moves both

    The memory is not initialised: a row may be read only after it has been written.
    """

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks * block_size, 2, num_kv_heads, head_dim)
        self.layers = [torch.empty(shape, dtype=dtype) for _ in range(num_layers)]
