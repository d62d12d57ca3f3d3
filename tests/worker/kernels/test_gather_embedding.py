"""gather_embedding of csrc/cuda: a shard's rows, and zeros for the ids of other shards."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 6),
    hidden=st.one_of(st.integers(1, 300), st.sampled_from([2048, 5120])),
    first=st.sampled_from([0, 7, 2**31 - 10]),
    count=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    offset=st.sampled_from([0, 0, 1]),
    seed=st.integers(0, 1 << 30),
)
def test_rows_of_the_shard_or_zeros(kernels_impl, rows, hidden, first, count, dtype, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(count * hidden + offset, generator=generator).to(kernels_impl.device, dtype)
    table = flat[offset:].view(count, hidden)
    ids = torch.randint(max(first - 4, -3), min(first + count + 4, 2**31), (rows,), generator=generator)
    out = torch.full((rows * hidden + 16,), torch.nan, dtype=dtype, device=kernels_impl.device)
    with kernels_impl.emulated(seed=seed % 2 * seed):
        kernels_impl.call(
            "gather_embedding",
            *(out, table, ids.to(kernels_impl.device, torch.int32), rows, hidden, first, count, dtype),
            *(kernels_impl.stream, kernels_impl.pdl),
        )
    expected = torch.zeros(rows, hidden, dtype=dtype)
    for row, token in enumerate(ids.tolist()):
        if first <= token < first + count:
            expected[row] = table[token - first].cpu()
    assert torch.equal(out[: rows * hidden].cpu().view(rows, hidden), expected)
    assert out[rows * hidden :].isnan().all()
