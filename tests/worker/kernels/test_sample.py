"""sample of csrc/cuda against choose.py and philox.py: the same tokens."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqexec.errors import InternalError
from zmqexec.protocol import Sampling
from zmqexec.worker.choose import choose
from zmqexec.worker.kernels.sample import allocate_params, params_of, sample
from zmqexec.worker.philox import uniforms
from zmqexec.worker.sampler import make_filters

INF = float("inf")


def on_device(kernels_impl, logits, params, positions, *, threads=0, padding=0):
    """The kernel's tokens, from rows `padding` floats apart; each row has a slot of its own, in reverse."""
    device, num_rows = kernels_impl.device, len(params)
    wide = torch.full((num_rows, logits.shape[1] + padding), INF)
    wide[:, : logits.shape[1]] = logits
    records = allocate_params(num_rows, torch.device("cpu"))
    for slot, sampling in enumerate(reversed(params)):
        records[slot] = torch.from_numpy(params_of(sampling).view(np.uint8))
    out = torch.full((num_rows + 8,), -7, dtype=torch.int32, device=device)
    sample(
        out[:num_rows],
        wide.to(device)[:, : logits.shape[1]],
        records.to(device),
        torch.arange(num_rows - 1, -1, -1, dtype=torch.int32, device=device),
        torch.tensor(positions, dtype=torch.int32, device=device),
        threads=threads,
        pdl=kernels_impl.pdl,
    )
    assert (out[num_rows:] == -7).all()
    return out[:num_rows].tolist()


def on_cpu(logits, params, positions, nudge=0.0):
    """choose.py's tokens; `nudge` moves the random numbers and top_p relatively, to see how close a call it was."""
    tokens = logits.argmax(1)
    rows = [row for row, sampling in enumerate(params) if sampling.temperature >= 1e-5]
    if rows:
        drawn = [params[row] for row in rows]
        numbers = uniforms(
            np.array([sampling.seed for sampling in drawn], np.uint64),
            np.array([sampling.sample_index for sampling in drawn], np.int64),
            np.array([positions[row] for row in rows], np.int64),
        )
        filters = make_filters(drawn, logits.shape[1])
        filters.top_p.mul_(1 + nudge).clamp_(max=1.0)
        tokens[rows] = choose(logits[rows], filters, torch.from_numpy(numbers * (1 + nudge)))
    return tokens.tolist()


def assert_the_same(kernels_impl, logits, params, positions, **options):
    got = on_device(kernels_impl, logits, params, positions, **options)
    expected = on_cpu(logits, params, positions)
    for row, (token, right) in enumerate(zip(got, expected, strict=True)):
        if token != right:
            part = (logits[row : row + 1], params[row : row + 1], positions[row : row + 1])
            near = [on_cpu(*part, nudge=nudge)[0] for nudge in (-1e-11, 1e-11)]
            assert token in near and near[0] != near[1], (row, params[row], token, right)
    return got


def random_params(rng, count, *, temperatures=(0.05, 0.7, 1.0, 1.5, 4.0, 30.0)):
    return [
        Sampling(
            temperature=float(rng.choice(temperatures)),
            top_k=int(rng.choice([0, 0, 1, 2, 20, 50, 1000, 1500])),
            top_p=float(rng.choice([1.0, 1.0, 0.95, 0.5, 0.9, 1e-9, rng.random() + 1e-3])),
            min_p=float(rng.choice([0.0, 0.0, 0.05, 1.0, 1e-6, rng.random() ** 4])),
            seed=int(rng.integers(0, 1 << 64, dtype=np.uint64)),
            sample_index=int(rng.integers(0, 5)),
        )
        for _ in range(count)
    ]


def peaked(rng, rows, vocab):
    """As a language model's: most tokens far below a few."""
    logits = rng.normal(0, 2.5, (rows, vocab)) + 6 * rng.gumbel(0, 1, (rows, vocab)) * (
        rng.random((rows, vocab)) < 0.01
    )
    return torch.from_numpy(logits.astype(np.float32))


def flat(rng, rows, vocab):
    return torch.from_numpy(rng.normal(0, 0.3, (rows, vocab)).astype(np.float32))


def wide(rng, rows, vocab):
    return torch.from_numpy(rng.normal(0, 40, (rows, vocab)).astype(np.float32))


def tied(rng, rows, vocab):
    return torch.from_numpy(rng.integers(-3, 3, (rows, vocab)).astype(np.float32)) / 2


def masked(rng, rows, vocab):
    logits = peaked(rng, rows, vocab)
    logits[torch.from_numpy(rng.random((rows, vocab)) < 0.9)] = -INF
    logits[:, vocab // 2] = 0.0
    return logits


SHAPES = [peaked, flat, wide, tied, masked]


@pytest.mark.parametrize("make", SHAPES)
@pytest.mark.parametrize("vocab", [50, 1023, 5001])
def test_the_tokens_are_those_of_the_cpu(kernels_impl, make, vocab):
    rng = np.random.default_rng([vocab, SHAPES.index(make)])
    rows = 10 if vocab < 2000 else 5
    params = random_params(rng, rows)
    positions = rng.integers(1, 1 << 31, rows).tolist()
    with kernels_impl.emulated(seed=vocab):
        assert_the_same(kernels_impl, make(rng, rows, vocab), params, positions, padding=int(rng.integers(0, 5)))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    vocab=st.integers(1, 600),
    make=st.sampled_from(SHAPES),
    scale=st.sampled_from([1.0, 1.0, 1e-3, 1e3]),
    temperature=st.one_of(st.floats(1e-5, 100.0), st.sampled_from([1e-5, 1e6, 1e200])),
    top_k=st.integers(-1, 700),
    top_p=st.floats(1e-12, 1.0),
    min_p=st.floats(0.0, 1.0),
    position=st.integers(1, (1 << 31) - 1),
    threads=st.sampled_from([512, 1024]),
)
def test_any_filters_together(
    kernels_impl, seed, vocab, make, scale, temperature, top_k, top_p, min_p, position, threads
):
    rng = np.random.default_rng(seed)
    logits = make(rng, 1, vocab) * scale
    params = [Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)]
    assert_the_same(kernels_impl, logits, params, [position], threads=threads)


@settings(max_examples=30, deadline=None)
@given(
    logits=st.lists(
        st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, -0.0, 1.0, -INF])), min_size=1, max_size=40
    ),
    seed=st.integers(0, (1 << 64) - 1),
    temperature=st.floats(0.1, 10.0),
    top_p=st.sampled_from([1.0, 0.999, 0.7, 0.5, 0.25]),
    greedy=st.booleans(),
)
def test_any_logits(kernels_impl, logits, seed, temperature, top_p, greedy):
    logits = torch.tensor([[*logits, 0.0]])
    params = [Sampling(temperature=0.0 if greedy else temperature, top_p=top_p, seed=seed)]
    assert_the_same(kernels_impl, logits, params, [1])


def test_many_draws_from_one_row(kernels_impl):
    rng = np.random.default_rng(5)
    row = torch.from_numpy(rng.normal(0, 1, (1, 300)).astype(np.float32))
    for filters in ({}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}):
        params = [Sampling(temperature=1.5, seed=seed, **filters) for seed in range(60)]
        got = assert_the_same(kernels_impl, row.repeat(60, 1), params, list(range(1, 61)), threads=512)
        assert len(set(got)) > 15


def test_equal_logits_by_the_thousand(kernels_impl):
    """No list is long enough: the histogram narrows down to one weight, and ids decide."""
    logits = torch.zeros(8, 3000)
    logits[4:, ::2] = -1.0
    logits[7, 2345] = 3.0
    grid = [(0, 1.0), (1200, 1.0), (0, 0.6), (2000, 0.9)]
    params = [Sampling(temperature=1.0, top_k=k, top_p=p, seed=7) for k, p in [*grid, *grid]]
    assert_the_same(kernels_impl, logits, params, list(range(1, 9)))


def test_top_k_past_the_heavy_tokens(kernels_impl):
    """A sure token, and ranks to count among thousands that weigh next to nothing."""
    rng = np.random.default_rng(8)
    logits = torch.from_numpy(rng.normal(0, 1, (6, 4000)).astype(np.float32))
    logits[:, 17] = torch.tensor([20.0, 20.0, 16.0, 16.0, 200.0, 60.0])
    params = [Sampling(temperature=1.0, top_k=k, top_p=p, seed=1) for k, p in product([50, 1100, 3900], [1.0, 0.99999])]
    assert_the_same(kernels_impl, logits, params, list(range(1, 7)))


def test_the_draw_may_fall_among_the_light_tokens(kernels_impl):
    """Tokens below 2^-16 of the largest have 5 % of the mass: the first histogram does not hold it."""
    logits = torch.full((12, 5000), -11.3)
    logits[::2] -= torch.linspace(0, 0.5, 5000)
    logits[:, 99] = 0.0
    seeds = np.arange(1000)
    numbers = uniforms(seeds.astype(np.uint64), np.zeros(1000, np.int64), np.ones(1000, np.int64))
    params = [
        Sampling(temperature=1.0, top_p=top_p, top_k=top_k, seed=seed)
        for seed, (top_p, top_k) in zip(
            seeds[numbers > 0.96].tolist(), [(1.0, 0), (1.0, 0), (0.99, 0), (0.99, 4500)] * 3, strict=False
        )
    ]
    got = assert_the_same(kernels_impl, logits, params, [1] * 12)
    assert len(set(got)) > 6


def test_neighbours_of_a_full_list_do_not_enter_it(kernels_impl):
    """900 tokens just above a bucket's edge, 900 just below: bounds wide enough for rounding let all of them pass."""
    edge = np.log(np.float64(0.75))
    above, below = np.float32(edge + 1.2e-7), np.float32(edge - 1.2e-7)
    logits = torch.full((8, 2000), -5.0)
    ids = torch.from_numpy(np.random.default_rng(1).permutation(2000))
    logits[:, ids[:900]], logits[:, ids[900:1800]], logits[:, ids[1800]] = float(above), float(below), 0.0
    params = [Sampling(temperature=1.0, top_p=p, seed=i) for i, p in enumerate([0.3, 0.49, 0.5, 0.51] * 2)]
    assert_the_same(kernels_impl, logits, params, [1] * 8)


def test_no_temperature_is_too_extreme(kernels_impl):
    rng = np.random.default_rng(6)
    temperatures = [1e-5, 1e-3, 1e4, 1e7, 1e30, 1.7e308]
    params = [Sampling(temperature=t, top_k=k, seed=3) for t, k in product(temperatures, [0, 7])]
    for make in (peaked, tied):
        assert_the_same(kernels_impl, make(rng, len(params), 1100), params, list(range(1, 1 + len(params))))


def test_greedy_takes_the_lowest_of_equal_ids(kernels_impl):
    logits = torch.tensor([[1.0, 5.0, 5.0, -INF], [-0.0, 0.0, -1.0, 0.0], [-INF] * 4, [-5.0, -4.0, -4.0, -6.0]])
    assert on_device(kernels_impl, logits, [Sampling()] * 4, [1] * 4) == [1, 0, 0, 1]
    tied_rows = tied(np.random.default_rng(0), 4, 5003)
    assert_the_same(kernels_impl, tied_rows, [Sampling()] * 4, [1] * 4)
    out = torch.empty(4, dtype=torch.int32, device=kernels_impl.device)
    ones = torch.ones(4, dtype=torch.int32, device=kernels_impl.device)
    sample(out, logits.to(kernels_impl.device), None, None, ones, pdl=kernels_impl.pdl)
    assert out.tolist() == [1, 0, 0, 1]


def test_no_row_makes_it_hang_or_leave_the_vocabulary(kernels_impl):
    """NaN and inf come from a broken model or from padding; they give some token, or a sensible one."""
    nan = torch.nan
    logits = torch.tensor([[nan, 1.0, nan, 2.0], [nan] * 4, [INF, 1.0, INF, 2.0], [-INF] * 4, [3.0, nan, -INF, INF]])
    for temperature in (0.0, 1.0):
        params = [Sampling(temperature=temperature, top_k=2, top_p=0.9)] * 5
        got = on_device(kernels_impl, logits, params, [1] * 5)
        assert got[0] in (1, 3) and got[1:] == [0, 0, 0, 3]
        assert temperature > 0 or got[0] == 3
    assert on_device(kernels_impl, logits, [Sampling(temperature=1.0)] * 5, [0, -1, 0, 0, 0]) == [0] * 5


def test_a_row_does_not_depend_on_the_batch(kernels_impl):
    rng = np.random.default_rng(9)
    logits, params = peaked(rng, 10, 1200), random_params(rng, 10)
    positions = list(range(1, 11))
    together = on_device(kernels_impl, logits, params, positions, threads=512)
    alone = [
        on_device(kernels_impl, logits[i : i + 1], params[i : i + 1], positions[i : i + 1], threads=1024)[0]
        for i in range(10)
    ]
    assert together == alone


def test_the_random_bits_are_philox(kernels_impl):
    rng = np.random.default_rng(2)
    count = 300
    seeds = rng.integers(0, 1 << 64, count, dtype=np.uint64)
    indices, positions = rng.integers(0, 1 << 32, (2, count))
    seeds[:3], indices[:3], positions[:3] = (0, (1 << 64) - 1, 1), (0, (1 << 32) - 1, 0), (0, (1 << 32) - 1, 0)
    out = torch.zeros(count, dtype=torch.int64, device=kernels_impl.device)
    arguments = (
        seeds.view(np.int64),
        indices.astype(np.uint32).view(np.int32),
        positions.astype(np.uint32).view(np.int32),
    )
    tensors = [torch.from_numpy(array).to(kernels_impl.device) for array in arguments]
    kernels_impl.call("random_bits", out, *tensors, count, kernels_impl.stream, kernels_impl.pdl)
    assert np.array_equal(out.cpu().numpy() * 2.0**-53, uniforms(seeds, indices, positions))


def test_wrong_shapes_are_refused(kernels_impl):
    ints = torch.zeros(2, dtype=torch.int32, device=kernels_impl.device)
    with pytest.raises(InternalError, match=r"sample: .* logits \[2, 5\] torch.float64"):
        sample(ints, torch.zeros(2, 5, dtype=torch.float64, device=kernels_impl.device), None, None, ints)
    with pytest.raises(InternalError, match="sample"):
        sample(ints, torch.zeros(2, 5, device=kernels_impl.device), None, ints, ints)
