"""Llama on a GPU: the layers as few kernels as they can be, for a decode step in a graph and for any other step.

Runs in: worker. `models/llama.py` is the same model in plain torch, and the truth for this one.

A step that only decodes streams each weight once through our own products, with what follows the product fused into
it: seven kernels a layer up to `SKINNY_ROWS` rows, and eight up to `TILED_ROWS`, on Hopper. Other steps use cuBLAS. A
deterministic engine computes all steps as `deterministic.py` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from zmqexec.model_config import ModelConfig, Sharding
from zmqexec.worker.gpu.attention import PrefillContexts
from zmqexec.worker.gpu.collectives import GpuCollectives
from zmqexec.worker.gpu.deterministic import FixedProducts, by_fixed_rows, check_product
from zmqexec.worker.gpu.ops import SKINNY_ROWS, DecodeAttention, LibraryProducts, Ops, Places, Products, wide_logits
from zmqexec.worker.gpu.pad_heads import pad_angles
from zmqexec.worker.models.layers import RotaryAngles
from zmqexec.worker.models.weights import LayerWeights, LlamaWeights


class GpuLlama:
    """One rank's shard. Residuals are kept in the model's dtype, sums and norms are computed in float32."""

    def __init__(
        self,
        config: ModelConfig,
        sharding: Sharding,
        weights: LlamaWeights,
        collectives: GpuCollectives,
        max_model_len: int,
        ops: Ops,
        decode_attention: DecodeAttention,
        head_dim: int,
        *,
        deterministic: bool = False,
    ) -> None:
        """`head_dim` is that of the weights, which may have been padded."""
        self._config = config
        self._deterministic = deterministic
        self._eps = config.rms_norm_eps
        self._head_dim = head_dim
        self._num_heads = len(sharding.heads)
        self._num_kv_heads = len(sharding.kv_heads)
        tp_size = collectives.tp_size
        self._inner_sizes = {len(Sharding(config, rank, tp_size).intermediate) for rank in range(tp_size)}
        self._scale = config.head_dim**-0.5
        self._held = sharding.vocab
        self._weights = weights
        self._collectives = collectives
        self._ops = ops
        self._products: Products = FixedProducts() if deterministic else LibraryProducts()
        self._decode_attention = decode_attention
        self._rotary = RotaryAngles(
            config.rope, config.head_dim, config.max_position_embeddings, max_model_len, one_at_a_time=deterministic
        )
        # An output token's angles depend on its position alone, whatever the rope.
        positions = torch.arange(max_model_len)
        cos, sin = self._rotary.at(positions, torch.zeros_like(positions))
        self.cos, self.sin = (self._angles(table) for table in (cos, sin))

    def angles(self, positions: torch.Tensor, num_prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Angles [num_tokens, head_dim / 2] of prompt tokens, where they depend on more than the position."""
        if self._config.rope.rope_type != "dynamic":
            return None
        cos, sin = self._rotary.at(positions, num_prompt)
        return self._angles(cos), self._angles(sin)

    def _angles(self, table: torch.Tensor) -> torch.Tensor:
        return pad_angles(table, self._head_dim).to(self._weights.norm.device)

    def forward(
        self,
        token_ids: torch.Tensor,
        places: Places,
        cache: list[torch.Tensor],
        contexts: Sequence[PrefillContexts],
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the tokens, leave their keys and values in `cache`; [num_tokens, hidden] before the last norm, or
        [num_wanted, hidden].

        Tokens of `contexts` (prefills) come first, then one of each row that `decode_attention` has planned.

        wanted  [num_wanted]  int32, tokens whose rows alone are returned, in this order: behind the attention of the
                last layer, the others are not computed. None: all. The same on every rank.
        """
        hidden = self._embed(token_ids)
        if not len(hidden):
            return hidden
        if not contexts and self._is_streamed(hidden):
            hidden = self._forward_streamed(hidden, places, cache)
            return hidden if wanted is None else hidden.index_select(0, wanted)
        layers, products = self._weights.layers, self._products
        normed = self._ops.rms_norm(hidden, layers[0].input_norm, self._eps)
        for layer, following, layer_cache in zip(layers, [*layers[1:], None], cache, strict=True):
            attended = self._attention(layer, normed, places, layer_cache, contexts)
            if following is None and wanted is not None:
                hidden, attended = hidden.index_select(0, wanted), attended.index_select(0, wanted)
                if not len(wanted):
                    return hidden
            normed = self._project_(products, hidden, attended, layer.o, layer.o_bias, layer.post_norm)
            inner = self._ops.silu_mul(products.linear(normed, layer.gate_up, layer.gate_up_bias))
            if following is None:
                self._add_(products, hidden, inner, layer.down, layer.down_bias)
            else:
                normed = self._project_(products, hidden, inner, layer.down, layer.down_bias, following.input_norm)
        return hidden

    @property
    def vocab_rows(self) -> int:
        """Columns of this rank's logits."""
        return len(self._weights.lm_head)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """This rank's columns of the logits of rows of `forward`'s result, float32 [num_rows, vocab_rows].

        In `out` where it is given. -inf past the end of the vocabulary.
        """
        ops, weights = self._ops, self._weights
        normed = ops.rms_norm(hidden, weights.norm, self._eps)
        if len(hidden) <= SKINNY_ROWS and self._is_streamed(hidden):
            logits = ops.linear(normed, weights.lm_head, None, out=out, out_dtype=torch.float32)
        else:
            logits = self._wide_logits(normed)
            logits = logits if out is None else out.copy_(logits)
        if len(self._held) < logits.shape[1]:
            logits[:, len(self._held) :] = -torch.inf
        return logits

    def _is_streamed(self, hidden: torch.Tensor) -> bool:
        """Whether all products of these rows are our own, on every rank: all call the same collectives."""
        num_rows, width = hidden.shape
        if self._deterministic:
            return False
        layer = self._weights.layers[0]
        shapes = [(weight.shape[0], weight.shape[1]) for weight in (layer.qkv, layer.o)]
        shapes += [shape for inner in self._inner_sizes for shape in ((2 * inner, width), (width, inner))]
        return all(self._ops.streams(num_rows, rows, columns, hidden.dtype) for rows, columns in shapes)

    def check_products(self) -> None:
        """`ConfigError` where the matrix library cannot do what `deterministic` promises: each shape once."""
        weights = self._weights
        layer = weights.layers[0]
        pairs = {
            "qkv": (layer.qkv, layer.qkv_bias),
            "o": (layer.o, layer.o_bias),
            "gate_up": (layer.gate_up, layer.gate_up_bias),
            "down": (layer.down, layer.down_bias),
        }
        for name, (weight, bias) in pairs.items():
            check_product(lambda x, w=weight, b=bias: linear(x, w, b), weight, f"{name} {list(weight.shape)}")  # type: ignore[misc]
        lm_head = weights.lm_head
        check_product(lambda x: wide_logits(x, lm_head), lm_head, f"lm_head {list(lm_head.shape)}")

    def _wide_logits(self, normed: torch.Tensor) -> torch.Tensor:
        lm_head = self._weights.lm_head
        if self._deterministic:
            return by_fixed_rows(lambda part: wide_logits(part, lm_head), normed)
        return wide_logits(normed, lm_head)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden]; each token's row is on one rank and zero on the others, so the sum is exact."""
        table, held = self._weights.embedding, self._held
        hidden = self._ops.gather_embedding(table, token_ids, held.start, len(held))
        return hidden if self._collectives.tp_size == 1 else self._collectives.all_reduce(hidden)

    def _add_norm(self, hidden: torch.Tensor, partial: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Add what the ranks' `partial` sums up to to `hidden`, in place; the norm of that."""
        if self._collectives.tp_size == 1:
            return self._ops.add_rms_norm_(hidden, partial, weight, self._eps)
        if self._deterministic:
            self._collectives.all_reduce_residual_(hidden, partial)
            return self._ops.rms_norm(hidden, weight, self._eps)
        return self._collectives.all_reduce_residual_norm(hidden, partial, weight, self._eps)

    def _attention(
        self,
        layer: LayerWeights,
        normed: torch.Tensor,
        places: Places,
        cache: torch.Tensor,
        contexts: Sequence[PrefillContexts],
    ) -> torch.Tensor:
        num_heads = self._num_heads
        qkv = self._products.linear(normed, layer.qkv, layer.qkv_bias).view(len(normed), -1, self._head_dim)
        keep_keys = any(group.wants_keys for group in contexts)
        self._ops.rope_write_kv_(qkv, num_heads, cache, places, keep_keys=keep_keys)
        attended = qkv.new_empty((len(normed), num_heads, self._head_dim))
        begin = 0
        for group in contexts:
            end = begin + group.num_tokens
            group.attend(attended[begin:end], qkv[begin:end], num_heads, cache, self._scale)
            begin = end
        if begin < len(normed):
            self._decode_attention.attend(attended[begin:], qkv[begin:, :num_heads], cache, self._scale)
        return attended.view(len(normed), -1)

    def _forward_streamed(self, hidden: torch.Tensor, places: Places, cache: list[torch.Tensor]) -> torch.Tensor:
        ops, layers = self._ops, self._weights.layers
        # Padded rows of it keep whatever is there; a row's product reaches no other row.
        attended = hidden.new_empty((len(hidden), self._num_heads, self._head_dim))
        normed = ops.rms_norm(hidden, layers[0].input_norm, self._eps)
        for layer, following, layer_cache in zip(layers, [*layers[1:], None], cache, strict=True):
            query = ops.qkv_rope_write(normed, layer.qkv, layer.qkv_bias, layer_cache, places, self._num_heads)
            self._decode_attention.attend(attended, query, layer_cache, self._scale)
            normed = self._project_(ops, hidden, attended.view(len(hidden), -1), layer.o, layer.o_bias, layer.post_norm)
            inner = ops.linear_silu_mul(normed, layer.gate_up, layer.gate_up_bias)
            if following is None:
                self._add_(ops, hidden, inner, layer.down, layer.down_bias)
            else:
                normed = self._project_(ops, hidden, inner, layer.down, layer.down_bias, following.input_norm)
        return hidden

    def _add_(
        self, products: Products, hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """hidden += the sum over the ranks of x · weightᵀ + bias."""
        if self._collectives.tp_size == 1:
            products.linear_residual_(hidden, x, weight, bias)
        else:
            self._collectives.all_reduce_residual_(hidden, products.linear(x, weight, bias))

    def _project_(
        self,
        products: Products,
        hidden: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm: torch.Tensor,
    ) -> torch.Tensor:
        """hidden += the sum over the ranks of x · weightᵀ + bias; the norm of that."""
        if self._collectives.tp_size == 1 and products.adds_residual(bias):
            products.linear_residual_(hidden, x, weight, bias)
            return self._ops.rms_norm(hidden, norm, self._eps)
        return self._add_norm(hidden, products.linear(x, weight, bias), norm)
