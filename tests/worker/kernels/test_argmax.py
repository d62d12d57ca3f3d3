"""argmax of csrc/cuda: ties, NaN, strides."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def run(kernels_impl, logits, *, first_id=0, with_values=True):
    rows, cols = logits.shape
    ids = torch.full((rows + 2,), -5, dtype=torch.int32, device=kernels_impl.device)
    values = torch.full((rows + 2,), torch.nan, device=kernels_impl.device)
    kernels_impl.call(
        "argmax",
        *(ids, values if with_values else None, logits, rows, cols, logits.stride(0), first_id),
        *(kernels_impl.stream, kernels_impl.pdl),
    )
    assert ids[rows:].eq(-5).all() and values[rows if with_values else 0 :].isnan().all()
    return ids[:rows].tolist(), values[:rows].tolist()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 4),
    cols=st.one_of(st.integers(1, 200), st.integers(1, 20_000)),
    padding=st.sampled_from([0, 4, 3]),
    levels=st.sampled_from([2, 10, 1 << 20]),
    nans=st.sampled_from([0.0, 0.1, 0.95]),
    infinities=st.sampled_from([0.0, 0.1]),
    first_id=st.sampled_from([0, 1000]),
    with_values=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_the_lowest_id_of_the_greatest(
    kernels_impl, rows, cols, padding, levels, nans, infinities, first_id, with_values, seed
):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(-levels, levels, (rows, cols + padding), generator=generator).float()
    wide[torch.rand(wide.shape, generator=generator) < infinities] = -torch.inf
    wide[torch.rand(wide.shape, generator=generator) < nans] = torch.nan
    wide[:, cols:] = torch.inf
    logits = wide.to(kernels_impl.device)[:, :cols]
    with kernels_impl.emulated(seed=seed % 2 * seed):
        ids, values = run(kernels_impl, logits, first_id=first_id, with_values=with_values)
    # Plain torch's argmax lets NaN win.
    numbers = logits.nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf)
    greatest = numbers.amax(1)
    only_nan = logits.isnan().all(1)
    found = (logits == greatest[:, None]).int().argmax(1)
    assert ids == (first_id + torch.where(only_nan, 0, found)).tolist()
    if with_values:
        assert values == greatest.tolist()


def test_a_row_without_any_number_gives_column_zero(kernels_impl):
    logits = torch.full((1, 1000), torch.nan, device=kernels_impl.device)
    assert run(kernels_impl, logits) == ([0], [-math.inf])


def test_minus_zero_and_zero_are_equal(kernels_impl):
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0]], device=kernels_impl.device)
    assert run(kernels_impl, logits)[0] == [1]
