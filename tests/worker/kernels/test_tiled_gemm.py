"""csrc/cuda/tiled_gemm_sm90a.cu against float32 products and the reference's activation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.kernels.test_skinny_gemm import DTYPES, SEEDS, Layer, assert_close, assert_only_written, poisoned
from zmqexec.errors import InternalError
from zmqexec.worker.kernels import native, reference, tiled_gemm
from zmqexec.worker.kernels.tiled_gemm import ROWS, SPLITS, Tile, choose_tile

TOKENS = st.one_of(st.integers(1, 64), st.integers(65, 128))
OUT_FEATURES = st.integers(1, 30).map(lambda n: 16 * n)
IN_FEATURES = st.one_of(st.integers(1, 20).map(lambda n: 8 * n), st.integers(1, 16).map(lambda n: 64 * n))
TILES = st.one_of(
    st.none(),
    st.builds(Tile, rows=st.sampled_from(ROWS), splits=st.sampled_from(SPLITS), stages=st.sampled_from([0, 2, 3])),
)
PADDINGS = st.tuples(st.sampled_from([0, 8, 72]), st.sampled_from([0, 8]))


@pytest.fixture(autouse=True)
def needs_hopper(kernels_impl):
    if native.capability(kernels_impl.device) != 90:
        pytest.skip("needs compute capability 9.0")


@settings(max_examples=40, deadline=None)
@given(
    m=TOKENS,
    n=OUT_FEATURES,
    k=IN_FEATURES,
    dtype=DTYPES,
    with_bias=st.booleans(),
    paddings=PADDINGS,
    tile=TILES,
    seed=SEEDS,
)
def test_linear(kernels_impl, m, n, k, dtype, with_bias, paddings, tile, seed):
    layer = Layer(kernels_impl, m, n, k, dtype, seed, with_bias=with_bias, padding=paddings[0])
    memory, out = poisoned(layer, m, n, paddings[1])
    with kernels_impl.emulated(seed=seed % 3):
        assert tiled_gemm.linear(layer.x, layer.weight, layer.bias, out=out, tile=tile) is out
    assert_close(out, layer.expected(), dtype)
    assert_only_written(memory, out)


@settings(max_examples=30, deadline=None)
@given(
    m=TOKENS,
    n=OUT_FEATURES,
    k=IN_FEATURES,
    dtype=DTYPES,
    with_bias=st.booleans(),
    padding=st.sampled_from([0, 8]),
    tile=TILES,
    seed=SEEDS,
)
def test_linear_residual(kernels_impl, m, n, k, dtype, with_bias, padding, tile, seed):
    layer = Layer(kernels_impl, m, n, k, dtype, seed, with_bias=with_bias)
    memory, residual = poisoned(layer, m, n, padding)
    residual.copy_(layer.random(m, n))
    expected = residual.cpu().float() + layer.expected()
    with kernels_impl.emulated(seed=seed % 3):
        tiled_gemm.linear_residual_(residual, layer.x, layer.weight, layer.bias, tile=tile)
    assert_close(residual, expected, dtype)
    assert_only_written(memory, residual)


@settings(max_examples=30, deadline=None)
@given(
    m=TOKENS,
    inner=st.integers(1, 30).map(lambda n: 8 * n),
    k=IN_FEATURES,
    dtype=DTYPES,
    with_bias=st.booleans(),
    padding=st.sampled_from([0, 8]),
    tile=TILES,
    seed=SEEDS,
)
def test_linear_silu_mul(kernels_impl, m, inner, k, dtype, with_bias, padding, tile, seed):
    layer = Layer(kernels_impl, m, 2 * inner, k, dtype, seed, with_bias=with_bias)
    memory, out = poisoned(layer, m, inner, padding)
    with kernels_impl.emulated(seed=seed % 3):
        tiled_gemm.linear_silu_mul(layer.x, layer.weight, layer.bias, out=out, tile=tile)
    assert_close(out, reference.silu_mul(layer.expected().to(dtype)), dtype, ulps=8)
    assert_only_written(memory, out)


@settings(max_examples=15, deadline=None)
@given(m=TOKENS, others=TOKENS, n=OUT_FEATURES, k=IN_FEATURES, tile=TILES.filter(bool), seed=SEEDS)
def test_a_token_depends_on_no_other(kernels_impl, m, others, n, k, tile, seed):
    layer = Layer(kernels_impl, m, n, k, torch.bfloat16, seed)
    alone = tiled_gemm.linear(layer.x, layer.weight, tile=tile)
    among = torch.cat([layer.x, layer.random(others, k) * 100])[: tiled_gemm.MAX_TOKENS]
    assert torch.equal(tiled_gemm.linear(among, layer.weight, tile=tile)[:m], alone)


def test_no_tokens(kernels_impl):
    layer = Layer(kernels_impl, 0, 32, 64, torch.bfloat16, 0)
    assert tiled_gemm.linear(layer.x, layer.weight).shape == (0, 32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"m": 129}, "[129, 64]"),
        ({"n": 24}, "[24, 64]"),
        ({"k": 60}, "[32, 60]"),
        ({"dtype": torch.float32}, "torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(kernels_impl, change, named):
    layer = Layer(kernels_impl, **({"m": 2, "n": 32, "k": 64, "dtype": torch.bfloat16, "seed": 0} | change))
    with pytest.raises(InternalError) as refused:
        tiled_gemm.linear(layer.x, layer.weight)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("out_features", "tile"),
    [
        (12288, Tile(96)),
        (4096, Tile(64, 2)),
        (22016, Tile(176)),
        (6144, Tile(96, 2)),
        (11008, Tile(96)),
        (8192, Tile(64)),
    ],
)
def test_tiles_that_were_measured_as_the_fastest_are_chosen(out_features, tile):
    assert choose_tile(out_features, num_sms=132) == tile


@given(n=st.integers(1, 4000).map(lambda n: 16 * n), num_sms=st.integers(1, 200))
def test_a_chosen_tile_is_one_that_there_is(n, num_sms):
    tile = choose_tile(n, num_sms)
    assert tile.rows in ROWS and tile.splits in SPLITS


def test_a_tile_that_there_is_not_is_refused(kernels_impl):
    layer = Layer(kernels_impl, 2, 32, 64, torch.bfloat16, 0)
    for tile, text in [
        (Tile(100), "rows is 64, 96"),
        (Tile(64, 3), "splits is 1, 2"),
        (Tile(64, 1, 17), "stages is 0"),
    ]:
        with pytest.raises(ValueError, match=text):
            tiled_gemm.linear(layer.x, layer.weight, tile=tile)
