"""silu_mul of csrc/cuda against the reference, and against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqexec.worker.kernels import reference

# Near zero float16 counts in units of 2**-24; the reference rounds silu(gate) to one before it multiplies.
ATOL = 6 * 2.0**-24
RTOL = {torch.float32: 2**-20, torch.bfloat16: 2 * 2**-7, torch.float16: 2 * 2**-10}


def run(kernels_impl, gate_up):
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.full((rows * inner + 16,), torch.nan, dtype=gate_up.dtype, device=kernels_impl.device)
    before = gate_up.clone()
    kernels_impl.call("silu_mul", out, gate_up, rows, inner, gate_up.dtype, kernels_impl.stream, kernels_impl.pdl)
    assert torch.equal(gate_up, before)
    assert out[rows * inner :].isnan().all()
    return out[: rows * inner].view(rows, inner)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 4),
    inner=st.one_of(st.integers(1, 600), st.sampled_from([2048, 4100])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    offset=st.sampled_from([0, 0, 1]),
    seed=st.integers(0, 1 << 30),
)
def test_any_shape_and_alignment(kernels_impl, rows, inner, dtype, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    flat = 4 * torch.randn(rows * 2 * inner + offset, generator=generator)
    gate_up = flat.to(kernels_impl.device, dtype)[offset:].view(rows, 2 * inner)
    with kernels_impl.emulated(seed=seed % 2 * seed):
        out = run(kernels_impl, gate_up)
    # fp16's least values are further apart than their relative tolerance.
    torch.testing.assert_close(out, reference.silu_mul(gate_up), rtol=RTOL[dtype], atol=ATOL)
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = gate * torch.sigmoid(gate) * up
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), exact, rtol=half_ulp + 2**-20, atol=2**-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gates_far_from_zero(kernels_impl, dtype):
    gates = torch.tensor([-1e4, -200.0, -100.0, -88.0, -0.0, 0.0, 88.0, 100.0, 1e4, torch.inf])
    gate_up = torch.cat([gates, torch.ones(10)]).view(1, 20).to(kernels_impl.device, dtype)
    out = run(kernels_impl, gate_up)
    expected = torch.tensor([0, 0, 0, 0, 0, 0, 88, 100, 1e4, torch.inf]).view(1, 10)
    torch.testing.assert_close(out, expected.to(kernels_impl.device, dtype), rtol=0, atol=1e-30)
