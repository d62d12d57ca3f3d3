"""One token per row from the filtered softmax, by inverse CDF.

Runs in: worker.

The tokens of a row in descending probability (ties: the lower id first) divide [0, 1) into intervals; the row's
uniform number picks one. Filters keep a prefix of that order: min_p and top_k first, then top_p of what is left.
Everything is float64 and depends on the row alone, so that the choice does not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NUM_CANDIDATES = 512
"""Tokens ranked before a row falls back to sorting the whole vocabulary: most rows decide within them."""

ROWS_AT_ONCE = 16
"""Bounds the float64 copies of the logits."""


@dataclass(frozen=True)
class Filters:
    """What each row keeps. All tensors [num_rows]; `top_k` is int64 in [1, vocab], the rest float64.

    temperature > 0, 0 < top_p <= 1, 0 <= min_p <= 1. Neutral: top_k = vocab, top_p = 1, min_p = 0.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def rows(self, rows: slice | torch.Tensor) -> Filters:
        """The filters of these rows."""
        return Filters(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])


def choose(
    logits: torch.Tensor, filters: Filters, uniforms: torch.Tensor, rows_at_once: int = ROWS_AT_ONCE
) -> torch.Tensor:
    """The token of each row.

    logits    [num_rows, vocab]  float32
    uniforms  [num_rows]         float64 in [0, 1)
    returns   [num_rows]         int64
    """
    chosen = [
        _choose(logits[part], filters.rows(part), uniforms[part])
        for part in (slice(start, start + rows_at_once) for start in range(0, len(logits), rows_at_once))
    ]
    return torch.cat(chosen)


def _choose(logits: torch.Tensor, filters: Filters, uniforms: torch.Tensor) -> torch.Tensor:
    scaled = logits.double() / filters.temperature.unsqueeze(1)
    weights = (scaled - scaled.amax(1, keepdim=True)).exp_()
    if weights.shape[1] <= NUM_CANDIDATES:
        return _decide(weights, *_ranked(weights), filters, uniforms)[0]
    tokens, decided = _decide(weights, *_leading(weights), filters, uniforms)
    if not decided.all():
        rest = (~decided).nonzero().squeeze(1)
        tokens[rest] = _decide(weights[rest], *_ranked(weights[rest]), filters.rows(rest), uniforms[rest])[0]
    return tokens


def _ranked(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All tokens in order: their weights, their ids, and how many of them are known to be in their place."""
    values, ids = weights.sort(dim=1, descending=True, stable=True)
    return values, ids, torch.full((len(weights),), weights.shape[1])


def _leading(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_ranked` of the likeliest tokens. Of those as light as the last, others may be missing: they do not count."""
    ids = weights.topk(NUM_CANDIDATES, dim=1, sorted=False).indices.sort(dim=1).values
    values, order = weights.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order), (values > values[:, -1:]).sum(1)


def _decide(
    weights: torch.Tensor,
    values: torch.Tensor,
    ids: torch.Tensor,
    num_placed: torch.Tensor,
    filters: Filters,
    uniforms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each row, and whether the ranked tokens suffice to know it.

    weights      [num_rows, vocab]   softmax numerators; the largest is 1
    values, ids  [num_rows, ranked]  the likeliest of them, in order
    num_placed   [num_rows]          of those, how many are certain
    """
    rank = torch.arange(values.shape[1])
    kept = (values >= filters.min_p.unsqueeze(1)) & (rank < filters.top_k.unsqueeze(1))
    cumulative = (values * kept).cumsum(1)
    # Mass after min_p and top_k. It is known even if it reaches past the ranked tokens, unless top_k ends it there.
    inside = kept.sum(1) <= num_placed
    min_p_mass = torch.where(weights >= filters.min_p.unsqueeze(1), weights, 0.0).sum(1)
    mass = torch.where(inside, cumulative[:, -1], min_p_mass)
    decided = inside | (filters.top_k == weights.shape[1])

    heavier = cumulative - values
    kept &= (heavier < (filters.top_p * mass).unsqueeze(1)) | (filters.top_p >= 1.0).unsqueeze(1)
    num_kept = kept.sum(1)
    inside = num_kept <= num_placed
    mass = torch.where(inside, torch.where(kept, values, 0.0).sum(1), mass)
    decided &= inside | (filters.top_p >= 1.0)

    beyond = cumulative > (uniforms * mass).unsqueeze(1)
    index = torch.where(beyond.any(1), beyond.int().argmax(1), values.shape[1])
    # Rounding may leave the target at the very end of the last interval.
    index = torch.where(inside, index.minimum(num_kept - 1), index).clamp_(min=0)
    decided &= index < num_placed
    return ids.gather(1, index.clamp(max=values.shape[1] - 1).unsqueeze(1)).squeeze(1), decided
