"""Llama (Touvron et al. 2023, arXiv:2302.13971) with grouped-query attention, on one rank's shard of it.

Runs in: worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zmqexec.model_config import ModelConfig, Sharding
from zmqexec.worker import kernels
from zmqexec.worker.batch import Rows
from zmqexec.worker.collectives import Collectives
from zmqexec.worker.kernels.plan import DecodePlan
from zmqexec.worker.kv_cache import KVCache
from zmqexec.worker.models.layers import Linear, RotaryAngles, VocabParallel
from zmqexec.worker.models.weights import LayerWeights, LlamaWeights


@dataclass(frozen=True)
class Layer:
    """One layer's shard, ready to compute. Names as in `LayerWeights`."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear

    @classmethod
    def of(cls, weights: LayerWeights) -> Layer:
        """Lay out these weights for computing."""
        return cls(
            input_norm=weights.input_norm,
            post_norm=weights.post_norm,
            qkv=Linear(weights.qkv, weights.qkv_bias),
            o=Linear(weights.o, weights.o_bias),
            gate_up=Linear(weights.gate_up, weights.gate_up_bias),
            down=Linear(weights.down, weights.down_bias),
        )


class LlamaModel:
    """The layers between token ids and logits. Two all-reduces per layer, one for the embedding."""

    def __init__(
        self,
        config: ModelConfig,
        sharding: Sharding,
        weights: LlamaWeights,
        collectives: Collectives,
        max_model_len: int,
    ) -> None:
        self._eps = config.rms_norm_eps
        self._head_dim = config.head_dim
        self._num_heads = len(sharding.heads)
        self._num_kv_heads = len(sharding.kv_heads)
        self._scale = config.head_dim**-0.5
        self._norm = weights.norm
        self._layers = [Layer.of(layer) for layer in weights.layers]
        self._collectives = collectives
        self._vocab = VocabParallel(weights.embedding, weights.lm_head, sharding.vocab, collectives)
        self._rotary = RotaryAngles(config.rope, config.head_dim, config.max_position_embeddings, max_model_len)

    def forward(self, rows: Rows, cache: KVCache, plan: DecodePlan) -> torch.Tensor:
        """Compute `rows`, leave their keys and values in `cache`, and return [num_tokens, hidden] before the last norm.

        `plan` covers the step's decodes, whose contexts include the new token.
        """
        hidden = self._vocab.embed(rows.token_ids)
        angles = self._rotary.at(rows.positions, rows.num_prompt)
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            normed = kernels.rms_norm(hidden, layer.input_norm, self._eps)
            hidden = hidden + self._attention(layer, normed, rows, angles, layer_cache, plan)
            normed = kernels.rms_norm(hidden, layer.post_norm, self._eps)
            hidden = hidden + self._mlp(layer, normed)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits of rows of `forward`'s result, float32 [num_rows, vocab_rows]."""
        return self._vocab.logits(kernels.rms_norm(hidden, self._norm, self._eps))

    def _attention(
        self,
        layer: Layer,
        hidden: torch.Tensor,
        rows: Rows,
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
        plan: DecodePlan,
    ) -> torch.Tensor:
        num_heads, num_kv_heads, head_dim = self._num_heads, self._num_kv_heads, self._head_dim
        # Heads in the order queries, keys, values: one rotation covers the first two, one copy stores the last two.
        heads = layer.qkv(hidden).view(len(hidden), -1, head_dim)
        kernels.rope_(heads[:, : num_heads + num_kv_heads], *angles)
        query = heads[:, :num_heads]
        kv = heads[:, num_heads:].view(-1, 2, num_kv_heads, head_dim)
        kernels.write_kv(cache, rows.slot_mapping, kv)

        parts = []
        for prefill in rows.prefills:
            chunk = slice(prefill.row, prefill.row + prefill.stop - prefill.start)
            context = kv[chunk] if prefill.context_rows is None else cache.index_select(0, prefill.context_rows)
            parts.append(kernels.prefill_attention(query[chunk], context, scale=self._scale))
        if len(rows.decode_slots):
            parts.append(kernels.decode_attention(query[rows.num_prefill_tokens :], cache, plan, scale=self._scale))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._collectives.all_reduce(layer.o(attended.flatten(1)))

    def _mlp(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        inner = kernels.silu_mul(layer.gate_up(hidden))
        return self._collectives.all_reduce(layer.down(inner))
