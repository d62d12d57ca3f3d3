"""Llama on a GPU: the layers as few kernels as they can be, for a decode step in a graph and for any other step.

Runs in: worker. `models/llama.py` is the same model in plain torch, and the truth for this one.

A step of at most `SKINNY_ROWS` rows streams each weight once through `skinny_gemm`, with what surrounds the product
fused into it: five kernels a layer. Larger ones use cuBLAS, and prefills torch's flash attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from zmqexec.model_config import ModelConfig, Sharding
from zmqexec.worker.gpu.attention import AttentionPlan, Contexts, attend_prefills
from zmqexec.worker.gpu.collectives import GpuCollectives
from zmqexec.worker.gpu.ops import Ops
from zmqexec.worker.models.layers import RotaryAngles
from zmqexec.worker.models.weights import LayerWeights, LlamaWeights

SKINNY_ROWS = 8


@dataclass(frozen=True)
class Tokens:
    """The tokens of a step and where they stand.

    token_ids     [num_tokens]  int32
    slot_mapping  [num_tokens]  int32, the cache row for the token's keys and values; -1: none
    positions     [num_tokens]  int32, rows of `cos` and `sin`
    cos, sin      [positions, head_dim / 2]  float32
    """

    token_ids: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


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
    ) -> None:
        self._config = config
        self._eps = config.rms_norm_eps
        self._head_dim = config.head_dim
        self._num_heads = len(sharding.heads)
        self._num_kv_heads = len(sharding.kv_heads)
        self._scale = config.head_dim**-0.5
        self._held = sharding.vocab
        self._weights = weights
        self._collectives = collectives
        self._ops = ops
        self._rotary = RotaryAngles(config.rope, config.head_dim, config.max_position_embeddings, max_model_len)
        # An output token's angles depend on its position alone, whatever the rope.
        positions = torch.arange(max_model_len)
        cos, sin = self._rotary.at(positions, torch.zeros_like(positions))
        self.cos, self.sin = (table.to(weights.norm.device) for table in (cos, sin))

    def angles(self, positions: torch.Tensor, num_prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Angles [num_tokens, head_dim / 2] of prompt tokens, where they depend on more than the position."""
        if self._config.rope.rope_type != "dynamic":
            return None
        cos, sin = self._rotary.at(positions, num_prompt)
        return cos.to(self.cos.device), sin.to(self.cos.device)

    def forward(
        self, tokens: Tokens, cache: list[torch.Tensor], contexts: Contexts | None, plan: AttentionPlan | None
    ) -> torch.Tensor:
        """Compute the tokens, leave their keys and values in `cache`; [num_tokens, hidden] before the last norm.

        Tokens of `contexts` (prefills) come first, the decodes that `plan` covers after them.
        """
        hidden = self._embed(tokens.token_ids)
        if contexts is None and len(hidden) <= SKINNY_ROWS and self._ops.has_skinny(hidden):
            return self._forward_skinny(hidden, tokens, cache, plan)
        partial: torch.Tensor | None = None
        for layer, layer_cache in zip(self._weights.layers, cache, strict=True):
            normed = self._add_norm(hidden, partial, layer.input_norm)
            attended = self._attention(layer, normed, tokens, layer_cache, contexts, plan)
            normed = self._add_norm(hidden, linear(attended, layer.o, layer.o_bias), layer.post_norm)
            inner = self._ops.silu_mul(linear(normed, layer.gate_up, layer.gate_up_bias))
            partial = linear(inner, layer.down, layer.down_bias)
        if partial is not None:
            self._settle(hidden, partial)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits of rows of `forward`'s result, float32 [num_rows, vocab_rows].

        -inf past the end of the vocabulary.
        """
        ops, weights = self._ops, self._weights
        if len(hidden) <= SKINNY_ROWS and ops.has_skinny(hidden):
            logits = ops.linear(hidden, weights.lm_head, None, norm=(weights.norm, self._eps), out_dtype=torch.float32)
        else:
            logits = ops.wide_logits(ops.rms_norm(hidden, weights.norm, self._eps), weights.lm_head)
        if len(self._held) < logits.shape[1]:
            logits[:, len(self._held) :] = -torch.inf
        return logits

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden]; each token's row is on one rank and zero on the others, so the sum is exact."""
        table, held = self._weights.embedding, self._held
        hidden = self._ops.gather_embedding(table, token_ids, held.start, len(held))
        return hidden if self._collectives.tp_size == 1 else self._collectives.all_reduce(hidden)

    def _add_norm(self, hidden: torch.Tensor, partial: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """Add what the ranks' `partial` sums up to to `hidden`, in place; the norm of that."""
        if partial is None:
            return self._ops.rms_norm(hidden, weight, self._eps)
        if self._collectives.tp_size == 1:
            return self._ops.add_rms_norm_(hidden, partial, weight, self._eps)
        return self._collectives.all_reduce_residual_norm(hidden, partial, weight, self._eps)

    def _settle(self, hidden: torch.Tensor, partial: torch.Tensor) -> None:
        if self._collectives.tp_size == 1:
            hidden += partial
        else:
            self._collectives.all_reduce_residual_(hidden, partial)

    def _attention(
        self,
        layer: LayerWeights,
        normed: torch.Tensor,
        tokens: Tokens,
        cache: torch.Tensor,
        contexts: Contexts | None,
        plan: AttentionPlan | None,
    ) -> torch.Tensor:
        num_heads = self._num_heads
        qkv = linear(normed, layer.qkv, layer.qkv_bias).view(len(normed), -1, self._head_dim)
        self._ops.rope_write_kv_(qkv, num_heads, cache, tokens)
        attended = torch.empty_like(qkv[:, :num_heads], memory_format=torch.contiguous_format)
        num_prefill = contexts.num_tokens if contexts else 0
        if contexts:
            attend_prefills(attended[:num_prefill], qkv[:num_prefill], num_heads, cache, contexts, self._scale)
        if plan:
            self._ops.paged_attention(attended[num_prefill:], qkv[num_prefill:, :num_heads], cache, plan, self._scale)
        return attended.view(len(normed), -1)

    def _forward_skinny(
        self, hidden: torch.Tensor, tokens: Tokens, cache: list[torch.Tensor], plan: AttentionPlan | None
    ) -> torch.Tensor:
        ops, eps = self._ops, self._eps
        assert plan is not None
        attended = hidden.new_empty((len(hidden), self._num_heads, self._head_dim))
        for layer, layer_cache in zip(self._weights.layers, cache, strict=True):
            query = ops.qkv_rope_write(
                hidden, layer.qkv, layer.qkv_bias, (layer.input_norm, eps), layer_cache, tokens, self._num_heads
            )
            ops.paged_attention(attended, query, layer_cache, plan, self._scale)
            self._project_(hidden, attended.view(len(hidden), -1), layer.o, layer.o_bias)
            inner = ops.linear_silu_mul(hidden, layer.gate_up, layer.gate_up_bias, (layer.post_norm, eps))
            self._project_(hidden, inner, layer.down, layer.down_bias)
        return hidden

    def _project_(
        self, hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """hidden += the sum over the ranks of x · weightᵀ + bias."""
        if self._collectives.tp_size == 1:
            self._ops.linear_residual_(hidden, x, weight, bias)
        else:
            self._collectives.all_reduce_residual_(hidden, self._ops.linear(x, weight, bias))
