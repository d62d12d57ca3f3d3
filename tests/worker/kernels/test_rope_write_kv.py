"""rope_write_kv of csrc/cuda against plain torch: rotation, the paged cache, and rows that must stay as they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqexec.worker.kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 2**-21, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def run(kernels_impl, *, tokens, heads, kv_heads, head_dim, block_size, dtype, padded, own_q, keep_k, seed):
    generator = torch.Generator().manual_seed(seed)
    device = kernels_impl.device
    max_position, num_blocks = 40, tokens + 3
    angles = torch.rand(max_position, head_dim // 2, generator=generator) * 100
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(device, dtype)
    positions = torch.randint(0, max_position, (tokens,), generator=generator, dtype=torch.int32)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:tokens].to(torch.int32)
    is_padded = torch.rand(tokens, generator=generator) < padded
    slots[is_padded] = -1
    positions[is_padded] = -(2**31)
    cache = torch.full((num_blocks, 2, kv_heads, block_size, head_dim), torch.nan, dtype=dtype, device=device)
    q_out = torch.full((tokens, heads, head_dim), torch.nan, dtype=dtype, device=device)
    before = qkv.clone()

    with kernels_impl.emulated(seed=seed % 2 * seed):
        kernels_impl.call(
            "rope_write_kv",
            *(q_out if own_q else None, qkv, cache, slots.to(device), positions.to(device), cos, sin),
            *(tokens, heads, kv_heads, head_dim, block_size, keep_k, dtype, kernels_impl.stream, kernels_impl.pdl),
        )

    real = (~is_padded).nonzero().flatten().to(device)
    expected = before.clone()
    turned = before[real][:, : heads + kv_heads].contiguous()
    rows = positions.to(device)[real].long()
    reference.rope_(turned, cos[rows], sin[rows])
    # Near a zero of the rotation the error is that of the pair's size.
    close = {"rtol": ULP[dtype], "atol": 8 * ULP[torch.float32], "equal_nan": True}
    if own_q:
        q_expected = torch.full_like(q_out, torch.nan)
        q_expected[real] = turned[:, :heads]
        torch.testing.assert_close(q_out, q_expected, **close)
    else:
        assert q_out.isnan().all()
        expected[real, :heads] = turned[:, :heads]
    if keep_k:
        expected[real, heads : heads + kv_heads] = turned[:, heads:]
    torch.testing.assert_close(qkv, expected, **close)
    untouched = before.new_ones(before.shape, dtype=torch.bool)
    if not own_q:
        untouched[real, :heads] = False
    if keep_k:
        untouched[real, heads : heads + kv_heads] = False
    assert torch.equal(qkv[untouched], before[untouched])

    cache_expected = torch.full_like(cache, torch.nan)
    for row, index in enumerate(real.tolist()):
        block, offset = divmod(int(slots[index]), block_size)
        cache_expected[block, 0, :, offset] = turned[row, heads:]
        cache_expected[block, 1, :, offset] = before[index, heads + kv_heads :]
    torch.testing.assert_close(cache, cache_expected, **close)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6, 8, 16, 24, 64, 80, 128]),
    block_size=st.sampled_from([1, 3, 16]),
    dtype=st.sampled_from(DTYPES),
    padded=st.sampled_from([0.0, 0.4]),
    own_q=st.booleans(),
    keep_k=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_any_shape(kernels_impl, group, kv_heads, **shape):
    run(kernels_impl, heads=group * kv_heads, kv_heads=kv_heads, **shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_models_shape(kernels_impl, dtype):
    shape = {"tokens": 3, "heads": 64, "kv_heads": 8, "head_dim": 128, "block_size": 16}
    run(kernels_impl, **shape, dtype=dtype, padded=0.0, own_q=True, keep_k=False, seed=7)


@pytest.mark.parametrize("tokens", [255, 256, 300])
def test_few_and_many_tokens(kernels_impl, tokens):
    shape = {"tokens": tokens, "heads": 40, "kv_heads": 8, "head_dim": 80, "block_size": 16, "dtype": torch.bfloat16}
    run(kernels_impl, **shape, padded=0.1, own_q=False, keep_k=True, seed=3)
