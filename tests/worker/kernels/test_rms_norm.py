"""rms_norm of csrc/cuda against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqexec.worker.kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULPS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def assert_close(out, expected):
    eps = ULPS[out.dtype] * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=eps, atol=1e-6)


def run(kernels_impl, *, rows, cols, dtype, padding=0, offset=0, with_residual=True, seed=0):
    """The kernel and the reference over rows `padding` apart, all arrays `offset` elements from an aligned address."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape, fill=None):
        count = torch.Size(shape).numel()
        flat = torch.randn(count + offset + 8, generator=generator) if fill is None else torch.full((count + 64,), fill)
        flat = flat.to(dtype).to(kernels_impl.device)
        return flat, flat[offset : offset + count].view(shape)

    _, wide = tensor(rows, cols + padding)
    x = wide[:, :cols]
    _, weight = tensor(cols)
    residual_memory, residual = tensor(rows, cols)
    out_memory, out = tensor(rows, cols, fill=torch.nan)
    x_before, residual_before, memory_before = wide.clone(), residual.clone(), residual_memory.clone()
    total = residual + x if with_residual else x.clone()

    kernels_impl.call(
        "rms_norm",
        *(out, residual if with_residual else None, x, weight, rows, cols, cols + padding, 1e-5, dtype),
        *(kernels_impl.stream, kernels_impl.pdl),
    )

    assert_close(out, reference.rms_norm(total, weight, 1e-5))
    assert torch.equal(residual, total if with_residual else residual_before)
    assert torch.equal(wide, x_before)
    outside = torch.ones_like(out_memory, dtype=torch.bool)
    outside[offset : offset + rows * cols] = False
    assert out_memory[outside].isnan().all()
    assert torch.equal(residual_memory[offset + rows * cols :], memory_before[offset + rows * cols :])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 5),
    cols=st.one_of(st.integers(1, 300), st.integers(1, 40).map(lambda n: 8 * n)),
    dtype=st.sampled_from(DTYPES),
    padding=st.sampled_from([0, 8, 3]),
    offset=st.sampled_from([0, 0, 1]),
    with_residual=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_any_shape_and_alignment(kernels_impl, rows, cols, dtype, padding, offset, with_residual, seed):
    shape = {"rows": rows, "cols": cols, "dtype": dtype, "padding": padding, "offset": offset}
    with kernels_impl.emulated(seed=seed % 2 * seed):
        run(kernels_impl, **shape, with_residual=with_residual, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [4096, 8192, 16384, 16392, 40000])
def test_rows_longer_than_a_thread_holds(kernels_impl, cols, dtype):
    run(kernels_impl, rows=2, cols=cols, dtype=dtype)


def test_may_write_over_its_input(kernels_impl):
    for cols in (64, 65, 20000):
        x = torch.randn(3, cols).to(kernels_impl.device)
        weight = torch.ones(cols, device=kernels_impl.device)
        expected = reference.rms_norm(x.clone(), weight, 1e-6)
        kernels_impl.call(
            "rms_norm",
            *(x, None, x, weight, 3, cols, cols, 1e-6, torch.float32, kernels_impl.stream, kernels_impl.pdl),
        )
        assert_close(x, expected)


def test_equal_rows_give_equal_bits(kernels_impl):
    x = torch.randn(1, 5120).to(kernels_impl.device, torch.bfloat16).repeat(7, 1)
    weight = torch.randn(5120).to(kernels_impl.device, torch.bfloat16)
    out = torch.full_like(x, torch.nan)
    kernels_impl.call(
        "rms_norm",
        *(out, None, x, weight, 7, 5120, 5120, 1e-6, torch.bfloat16, kernels_impl.stream, kernels_impl.pdl),
    )
    assert (out == out[0]).all()


def test_a_wrong_argument_is_named(kernels_impl):
    with pytest.raises(ValueError, match=r"rms_norm: takes 11 arguments, got 1; call it as rms_norm\(out, "):
        kernels_impl.call("rms_norm", 1)
    with pytest.raises(ValueError, match="where an int from 0 to 2 belongs"):
        kernels_impl.call("rms_norm", 0, 0, 0, 0, 1, 1, 1, 1e-6, 7, 0, False)
