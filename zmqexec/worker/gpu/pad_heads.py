"""Heads of a size that the attention kernel has not, made larger with zeros when the weights are loaded.

Runs in: worker. A padded query times a padded key is the same sum, and padded values meet columns of zeros. Rotation
pairs dimension i with i + head_dim / 2, so each half is padded by itself.
"""

from __future__ import annotations

import dataclasses

import torch

from zmqexec.worker.models.weights import LayerWeights, LlamaWeights


def pad_weights(weights: LlamaWeights, head_dim: int, padded: int) -> LlamaWeights:
    """The same model with heads of `padded`, layer by layer, so that few are in memory twice."""
    layers = weights.layers
    for index, layer in enumerate(layers):
        layers[index] = _pad_layer(layer, head_dim, padded)
    return weights


def pad_angles(table: torch.Tensor, padded: int) -> torch.Tensor:
    """[positions, padded / 2] of [positions, head_dim / 2]; what padding is rotated by does not matter."""
    return torch.nn.functional.pad(table, (0, padded // 2 - table.shape[1]))


def _pad_layer(layer: LayerWeights, head_dim: int, padded: int) -> LayerWeights:
    return dataclasses.replace(
        layer,
        qkv=_pad_rows(layer.qkv, head_dim, padded),
        qkv_bias=None if layer.qkv_bias is None else _pad_rows(layer.qkv_bias, head_dim, padded),
        o=_pad_rows(layer.o.t(), head_dim, padded).t().contiguous(),
    )


def _pad_rows(rows: torch.Tensor, head_dim: int, padded: int) -> torch.Tensor:
    """Rows come in heads of `head_dim`, each in two halves."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    wider = halves.new_zeros((len(halves), 2, padded // 2, *rows.shape[1:]))
    wider[:, :, : head_dim // 2] = halves
    return wider.flatten(0, 2)
