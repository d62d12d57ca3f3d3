"""The kernels against dense formulas, with everything that must not be read set to NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqexec.errors import InternalError
from zmqexec.worker import kernels
from zmqexec.worker.kernels import plan as plan_module
from zmqexec.worker.kernels.plan import DecodePlanner


def dense_attention(query, keys, values, scale):
    """One query per row of `query`, bottom-right causal, in float64.

    query [num_tokens, num_heads, head_dim]; keys, values [context_len, num_kv_heads, head_dim]
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = (tensor.double().repeat_interleave(group, dim=1) for tensor in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    num_tokens, context_len = query.shape[0], keys.shape[0]
    hidden = torch.arange(context_len) > torch.arange(num_tokens).unsqueeze(1) + context_len - num_tokens
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def paged(contexts, block_size, num_kv_heads, head_dim, generator):
    """A cache with these contexts in scattered blocks, all else NaN: cache, block tables, and each sequence's rows."""
    counts = [-(-context // block_size) for context in contexts]
    num_blocks = sum(counts) + 3
    blocks = torch.randperm(num_blocks, generator=generator).tolist()
    cache = torch.full((num_blocks * block_size, 2, num_kv_heads, head_dim), torch.nan)
    tables = np.full((len(contexts), max(counts) + 2), -1, np.int32)
    rows = []
    for seq, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        own = [blocks.pop() for _ in range(count)]
        tables[seq, :count] = own
        rows.append(torch.tensor([own[t // block_size] * block_size + t % block_size for t in range(context)]))
        cache[rows[-1]] = torch.randn((context, 2, num_kv_heads, head_dim), generator=generator)
    return cache, tables, rows


@settings(max_examples=40, deadline=None)
@given(
    contexts=st.lists(st.integers(1, 70), min_size=1, max_size=9),
    block_size=st.sampled_from([1, 3, 8, 16]),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 8, 24, 40]),
    tile_bytes=st.sampled_from([1, 4096, 1 << 22]),
    seed=st.integers(0, 1 << 30),
)
def test_decode_attention_equals_dense_attention(contexts, block_size, num_kv_heads, group, head_dim, tile_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    cache, tables, rows = paged(contexts, block_size, num_kv_heads, head_dim, generator)
    query = torch.randn((len(contexts), num_kv_heads * group, head_dim), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "TILE_BYTES", tile_bytes)
        planner = DecodePlanner(block_size, num_kv_heads, head_dim, torch.float32)
    plan = planner.plan(tables, np.array(contexts))
    out = kernels.decode_attention(query, cache, plan, scale=0.3)
    for seq, own in enumerate(rows):
        expected = dense_attention(query[seq : seq + 1], cache[own, 0], cache[own, 1], 0.3)
        torch.testing.assert_close(out[seq : seq + 1].double(), expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    prefix=st.integers(0, 40),
    num_tokens=st.integers(1, 40),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 8, 24]),
    tile=st.sampled_from([1, 7, 512]),
    seed=st.integers(0, 1 << 30),
)
def test_prefill_attention_is_causal_from_the_bottom_right(
    prefix, num_tokens, num_kv_heads, group, head_dim, tile, seed
):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn((num_tokens, num_kv_heads * group, head_dim), generator=generator)
    kv = torch.randn((prefix + num_tokens, 2, num_kv_heads, head_dim), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.reference, "PREFILL_TILE", tile)
        out = kernels.prefill_attention(query, kv, scale=0.5)
    expected = dense_attention(query, kv[:, 0], kv[:, 1], 0.5)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_plan_covers_every_sequence_once_and_pads_little():
    contexts = np.random.default_rng(0).integers(1, 2000, 100)
    tables = np.zeros((100, 200), np.int32)
    plan = DecodePlanner(16, 2, 64, torch.float32).plan(tables, contexts)
    seen = np.concatenate([np.arange(100)[tile.seqs] for tile in plan.tiles])
    assert sorted(seen.tolist()) == list(range(100))
    assert all(tile.length <= 1.25 * contexts[tile.seqs].min() for tile in plan.tiles)
    assert 16 * len(plan.workspace) >= max(tile.num_seqs * tile.length for tile in plan.tiles)


def test_write_kv_stores_rows_where_the_mapping_says_and_nowhere_else():
    cache = torch.zeros((8, 2, 1, 4))
    kv = torch.randn((3, 2, 1, 4))
    kernels.write_kv(cache, torch.tensor([5, 0, 7]), kv)
    assert torch.equal(cache[[5, 0, 7]], kv)
    assert not cache[[1, 2, 3, 4, 6]].any()


def test_rms_norm_and_silu_mul_compute_their_formulas():
    x, weight = torch.randn((5, 12)), torch.randn(12)
    expected = x * (x.pow(2).mean(1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), expected)
    gate, up = x[:, :6], x[:, 6:]
    torch.testing.assert_close(kernels.silu_mul(x), gate / (1 + (-gate).exp()) * up)


def test_rope_rotates_pairs_half_a_head_apart_in_place():
    heads = torch.randn((3, 2, 8))
    angles = torch.randn((3, 4))
    pairs = torch.complex(heads[..., :4], heads[..., 4:]) * torch.polar(torch.ones(3, 1, 4), angles.unsqueeze(1))
    kernels.rope_(heads, angles.cos(), angles.sin())
    torch.testing.assert_close(torch.complex(heads[..., :4], heads[..., 4:]), pairs)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(InternalError, match=r"rms_norm: .* x \[2, 3\], weight \[4\]"):
        kernels.rms_norm(torch.ones((2, 3)), torch.ones(4), 1e-5)
