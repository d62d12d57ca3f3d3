"""csrc/cuda/skinny_gemm.cu against float32 products and the reference's activation and rotation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqexec.errors import InternalError
from zmqexec.worker.kernels import reference, skinny_gemm
from zmqexec.worker.kernels.skinny_gemm import Tuning

DTYPES = st.sampled_from([torch.bfloat16, torch.float16])
TOKENS = st.one_of(st.integers(1, 8), st.integers(9, 32))
IN_FEATURES = st.one_of(
    st.integers(1, 20).map(lambda n: 8 * n),
    st.integers(1, 300).map(lambda n: 8 * n),
    st.integers(1, 40).map(lambda n: 64 * n),
)
TUNINGS = st.builds(
    Tuning,
    stages=st.sampled_from([0, 0, 1, 2, 3, 4]),
    x_mode=st.sampled_from([0, 0, 1, 2]),
    blocks=st.one_of(st.integers(1, 3), st.just(0)),
)
SEEDS = st.integers(0, 1 << 30)


class Layer:
    """Random x (rows apart) and weights; the results are near 1 in size."""

    def __init__(self, kernels_impl, m, n, k, dtype, seed, *, with_bias=False, padding=0):
        self.device = kernels_impl.device
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.x = self.random(m, k + padding)[:, :k]
        self.weight = self.random(n, k, scale=k**-0.5)
        self.bias = self.random(n) if with_bias else None

    def random(self, *shape, scale=1.0):
        values = torch.randn(*shape, generator=self.generator) * scale
        return values.to(self.dtype).to(self.device)

    def expected(self, x=None):
        """The projection in float32, on the CPU."""
        x = (self.x if x is None else x).cpu()
        product = x.float() @ self.weight.cpu().float().T
        return product if self.bias is None else product + self.bias.cpu().float()


def poisoned(layer, rows, cols, padding=0, dtype=None):
    """A view whose rows are `padding` apart, in memory that holds NaN."""
    memory = torch.full((rows + 2, cols + padding), torch.nan, dtype=dtype or layer.dtype, device=layer.device)
    return memory, memory[1 : rows + 1, :cols]


def assert_only_written(memory, view):
    view.fill_(torch.nan)
    assert memory.isnan().all()


def fitting(tuning, m, k):
    """Some of what may be asked for exceeds the shared memory."""
    if m * k > 30_000:
        tuning = dataclasses.replace(tuning, x_mode=min(tuning.x_mode, 0), stages=min(tuning.stages, 2))
    return dataclasses.replace(tuning, stages=min(tuning.stages, 2)) if m > 8 else tuning


def assert_close(out, expected, dtype, ulps=2):
    """`ulps` of 1, or of the value where that is more."""
    eps = ulps * torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu().float(), expected.float(), rtol=eps, atol=eps)


@settings(max_examples=40, deadline=None)
@given(
    m=TOKENS,
    n=st.integers(1, 200),
    k=IN_FEATURES,
    dtype=DTYPES,
    out_float=st.booleans(),
    with_bias=st.booleans(),
    paddings=st.tuples(st.sampled_from([0, 8, 72]), st.sampled_from([0, 1, 5])),
    tuning=TUNINGS,
    seed=SEEDS,
)
def test_linear(kernels_impl, m, n, k, dtype, out_float, with_bias, paddings, tuning, seed):
    layer = Layer(kernels_impl, m, n, k, dtype, seed, with_bias=with_bias, padding=paddings[0])
    memory, out = poisoned(layer, m, n, paddings[1], torch.float32 if out_float else None)
    with kernels_impl.emulated(seed=seed % 3):
        returned = skinny_gemm.linear(layer.x, layer.weight, layer.bias, out=out, tuning=fitting(tuning, m, k))
    assert returned is out
    # Where float32 is stored the order of summation remains.
    ulps = 2 if not out_float else 1e-4 / torch.finfo(dtype).eps
    assert_close(out, layer.expected(), dtype, ulps)
    assert_only_written(memory, out)


@settings(max_examples=40, deadline=None)
@given(
    m=TOKENS,
    n=st.integers(1, 100),
    k=IN_FEATURES,
    dtype=DTYPES,
    with_bias=st.booleans(),
    padding=st.sampled_from([0, 3]),
    tuning=TUNINGS,
    seed=SEEDS,
)
def test_linear_residual(kernels_impl, m, n, k, dtype, with_bias, padding, tuning, seed):
    layer = Layer(kernels_impl, m, n, k, dtype, seed, with_bias=with_bias)
    memory, residual = poisoned(layer, m, n, padding)
    residual.copy_(layer.random(m, n))
    expected = residual.cpu().float() + layer.expected()
    with kernels_impl.emulated(seed=seed % 3):
        skinny_gemm.linear_residual_(residual, layer.x, layer.weight, layer.bias, tuning=fitting(tuning, m, k))
    assert_close(residual, expected, dtype)
    assert_only_written(memory, residual)


@settings(max_examples=40, deadline=None)
@given(
    m=TOKENS,
    inner=st.integers(1, 30).map(lambda n: 4 * n),
    k=IN_FEATURES,
    dtype=DTYPES,
    with_bias=st.booleans(),
    padding=st.sampled_from([0, 3]),
    tuning=TUNINGS,
    seed=SEEDS,
)
def test_linear_silu_mul(kernels_impl, m, inner, k, dtype, with_bias, padding, tuning, seed):
    layer = Layer(kernels_impl, m, 2 * inner, k, dtype, seed, with_bias=with_bias)
    memory, out = poisoned(layer, m, inner, padding)
    with kernels_impl.emulated(seed=seed % 3):
        skinny_gemm.linear_silu_mul(layer.x, layer.weight, layer.bias, out=out, tuning=fitting(tuning, m, k))
    assert_close(out, reference.silu_mul(layer.expected().to(dtype)), dtype, ulps=8)
    assert_only_written(memory, out)


@settings(max_examples=25, deadline=None)
@given(
    m=TOKENS,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([8, 16, 24, 64, 80, 128]),
    block_size=st.sampled_from([1, 3, 16]),
    k=IN_FEATURES,
    dtype=DTYPES,
    with_bias=st.booleans(),
    tuning=TUNINGS,
    seed=SEEDS,
)
def test_qkv_rope_write(kernels_impl, m, kv_heads, group, head_dim, block_size, k, dtype, with_bias, tuning, seed):
    heads = kv_heads * group
    n = (heads + 2 * kv_heads) * head_dim
    layer = Layer(kernels_impl, m, n, k, dtype, seed, with_bias=with_bias)
    generator, device = layer.generator, layer.device
    num_blocks = -(-m // block_size) + 2
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:m]
    slots[torch.rand(m, generator=generator) < 0.2] = -1
    angles = torch.randn(50, head_dim // 2, generator=generator) * 3
    positions = torch.randint(0, 50, (m,), generator=generator)
    cache = torch.full((num_blocks, 2, kv_heads, block_size, head_dim), torch.nan, dtype=dtype, device=device)
    memory, out = poisoned(layer, m, heads * head_dim, padding=3)
    with kernels_impl.emulated(seed=seed % 3):
        skinny_gemm.qkv_rope_write(
            layer.x,
            layer.weight,
            layer.bias,
            cache,
            slots.int().to(device),
            positions.int().to(device),
            angles.cos().to(device),
            angles.sin().to(device),
            num_heads=heads,
            out=out.view(m, heads, head_dim),
            tuning=fitting(tuning, m, k),
        )

    expected = layer.expected().to(dtype).view(m, heads + 2 * kv_heads, head_dim)
    reference.rope_(expected[:, : heads + kv_heads], angles[positions].cos(), angles[positions].sin())
    assert_close(out, expected[:, :heads].flatten(1), dtype, ulps=4)
    assert_only_written(memory, out)
    lines = cache.cpu().permute(0, 3, 1, 2, 4).flatten(0, 1)  # [slots, 2, kv_heads, head_dim]
    cached = slots >= 0
    assert_close(lines[slots[cached]], expected[cached, heads:].unflatten(1, (2, kv_heads)), dtype, ulps=4)
    untouched = torch.ones(len(lines), dtype=torch.bool)
    untouched[slots[cached]] = False
    assert lines[untouched].isnan().all()


@pytest.mark.parametrize("k", [64, 520, 2048])
def test_a_token_has_the_same_bits_in_any_company_and_on_any_grid(kernels_impl, k):
    layer = Layer(kernels_impl, 32, 72, k, torch.bfloat16, k)

    def run(rows, **tuning):
        return skinny_gemm.linear(layer.x[rows], layer.weight, tuning=Tuning(**tuning))

    whole = run(slice(0, 32), blocks=2)
    for first, last in [(0, 1), (7, 8), (5, 7), (8, 16), (2, 11), (13, 29), (0, 31)]:
        for tuning in ({}, {"blocks": 1, "stages": 1, "x_mode": 1}, {"blocks": 3, "stages": 2, "x_mode": 2}):
            assert torch.equal(run(slice(first, last), **tuning), whole[first:last])


@pytest.mark.parametrize("m", [1, 2, 4, 8])
@pytest.mark.parametrize(("n", "k"), [(12288, 4096), (4096, 11008), (22016, 4096), (57344, 8192), (3072, 4096)])
def test_neighbours_in_a_decode_step_find_room_on_one_sm(kernels_impl, m, n, k):
    num_sms, *_, per_sm, _ = kernels_impl.module.device_info(0)

    def plan(n, k):
        stages, _, shared_bytes = kernels_impl.module.skinny_gemm_plan(m, n, k, num_sms, 0, 0)
        assert stages >= 2
        return shared_bytes

    small = plan(4096, k)  # the projection back to the hidden size
    assert plan(n, k) + small + 2 * 1024 <= per_sm


def test_garbage_in_one_row_stays_there(kernels_impl):
    layer = Layer(kernels_impl, 6, 40, 512, torch.float16, 1)
    clean = skinny_gemm.linear(layer.x, layer.weight)
    layer.x[3] = torch.nan
    dirty = skinny_gemm.linear(layer.x, layer.weight)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(dirty[others], clean[others]) and dirty[3].isnan().all()


def test_no_tokens_are_no_work(kernels_impl):
    layer = Layer(kernels_impl, 0, 40, 512, torch.bfloat16, 1)
    assert skinny_gemm.linear(layer.x, layer.weight).shape == (0, 40)


def test_what_does_not_fit_is_an_error(kernels_impl):
    layer = Layer(kernels_impl, 4, 40, 512, torch.bfloat16, 1)
    assert not skinny_gemm.supported(33, 40, 512, torch.bfloat16)
    assert not skinny_gemm.supported(1, 40, 513, torch.bfloat16)
    assert not skinny_gemm.supported(1, 40, 512, torch.float32)
    with pytest.raises(InternalError, match=r"linear: .* x \[4, 508\]"):
        skinny_gemm.linear(layer.x[:, :508], layer.weight[:, :508])
    with pytest.raises(InternalError, match="linear_silu_mul"):
        skinny_gemm.linear_silu_mul(layer.x, layer.weight[:36])
    with pytest.raises(ValueError, match="16-aligned"):
        skinny_gemm.linear(layer.x[:, 4:508], layer.weight.flatten()[: 40 * 504].view(40, 504))
    with pytest.raises(RuntimeError, match="shared memory"):
        wide = Layer(kernels_impl, 8, 40, 20_000, torch.bfloat16, 1)
        skinny_gemm.linear(wide.x, wide.weight, tuning=Tuning(x_mode=1))
