"""The instructions that kernels are made of: the hardware and its emulator meet the same expectations."""

from __future__ import annotations

import math

import pytest
import torch

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("valid_rows", [0, 5, 16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copies_ldmatrix_and_mma_multiply_matrices(kernels_impl, dtype, b_transposed, valid_rows, seed):
    a, b = (torch.randn(16, 16).to(kernels_impl.device, dtype) for _ in range(2))
    c = torch.full((16, 16), torch.nan, device=kernels_impl.device)
    given = b.T.contiguous() if b_transposed else b
    with kernels_impl.emulated(seed=seed):
        kernels_impl.call(
            "primitive_matrix_product",
            *(c, a, given, b_transposed, valid_rows, dtype, kernels_impl.stream, kernels_impl.pdl),
        )
    expected = a.double() @ b.double()
    expected[valid_rows:] = 0
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 8, 16, 32])
@pytest.mark.parametrize("operand", [0, 1, 3, 8, 17, 31])
def test_exchanges_within_a_warp(kernels_impl, operand, width):
    values = [(i * 2654435761) % 61 - 9 for i in range(32)]
    given = torch.tensor(values, dtype=torch.int32, device=kernels_impl.device)
    out = torch.full((9, 32), -7777, dtype=torch.int32, device=kernels_impl.device)
    kernels_impl.call("primitive_exchange", out, given, operand, width, kernels_impl.stream)

    rows = [[] for _ in range(9)]
    greater = [value > operand for value in values]
    ballot = sum(1 << lane for lane in range(32) if greater[lane])
    for lane, value in enumerate(values):
        first = lane // width * width
        rows[0].append(values[first + operand % width])
        rows[1].append(values[lane - operand] if lane - operand >= first else value)
        rows[2].append(values[lane + operand] if lane + operand < first + width else value)
        rows[3].append(values[lane ^ operand] if lane ^ operand < first + width else value)
        rows[4].append(ballot - (ballot >> 31 << 32))
        rows[5].append(int(any(greater)))
        rows[6].append(int(all(greater)))
        rows[7].append(values[lane ^ 1] if lane < 16 else values[31])
        unsigned = value % 2**32
        leading = 32 - unsigned.bit_length()
        lowest = (unsigned & -unsigned).bit_length()
        word = (unsigned * 0x9E3779B9 >> 32) + leading + lowest + unsigned.bit_count()
        rows[8].append((word + 2**31) % 2**32 - 2**31)
    assert out.tolist() == rows


@pytest.mark.parametrize(("blocks", "resident", "seed"), [(1, 1, 0), (37, 1, 5), (37, 8, 6)])
def test_the_last_block_to_arrive_sees_what_the_others_wrote(kernels_impl, blocks, resident, seed):
    def zeros(count, dtype):
        return torch.zeros(count, dtype=dtype, device=kernels_impl.device)

    out, partial = zeros(1, torch.float32), zeros(blocks, torch.float32)
    ticket, counts = zeros(1, torch.int32), zeros(3, torch.int32)
    with kernels_impl.emulated(seed=seed, resident_blocks=resident):
        kernels_impl.call("primitive_last_arriver", out, partial, ticket, counts, blocks, kernels_impl.stream)
    assert out.item() == blocks * (blocks + 1) / 2
    assert ticket.item() == 0
    assert counts.tolist() == [64 * blocks, 64 * blocks - 1, -1]


@pytest.mark.parametrize("dtype", HALVES)
def test_conversions_round_to_nearest_even(kernels_impl, dtype):
    # Every exponent, with mantissas at, around and halfway between the values that 16 bits can hold.
    exponents = torch.arange(256, dtype=torch.int64).view(-1, 1) << 23
    kept = torch.tensor([0, 1, 2, 5, 1021, 1022, 1023], dtype=torch.int64)
    parts = [(kept[:, None] << 13) + torch.tensor([0, 1, 4095, 4096, 4097, 8191])]
    parts += [((kept[:, None] & 127) << 16) + torch.tensor([0, 1, 32767, 32768, 32769, 65535])]
    bits = (exponents + torch.cat([part.flatten() for part in parts])).flatten()
    bits = torch.cat([bits, torch.randint(0, 2**31, (20000,))])
    bits = torch.cat([bits, bits - 2**31]).to(torch.int32)
    given = bits.view(torch.float32).to(kernels_impl.device)
    count = len(given)
    narrow = torch.empty(count, dtype=dtype, device=kernels_impl.device)
    wide = torch.empty(count, device=kernels_impl.device)
    pairs = torch.empty(count, 2, dtype=dtype, device=kernels_impl.device)
    kernels_impl.call("primitive_conversion", narrow, wide, pairs, given, count, dtype, kernels_impl.stream)

    numbers = ~given.isnan()
    assert torch.equal(narrow[numbers].view(torch.int16), given[numbers].to(dtype).view(torch.int16))
    assert torch.equal(wide[numbers], given[numbers].to(dtype).float())
    assert torch.equal(pairs[numbers], torch.stack([given, -given], dim=1)[numbers].to(dtype))
    for converted in (narrow, wide, pairs[:, 0], pairs[:, 1]):
        assert converted[~numbers].isnan().all()


def test_every_half_is_widened_exactly(kernels_impl):
    for dtype in HALVES:
        halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        given = halves.float().to(kernels_impl.device)
        given = given[~given.isnan()]
        count = len(given)
        narrow = torch.empty(count, dtype=dtype, device=kernels_impl.device)
        wide = torch.empty(count, device=kernels_impl.device)
        pairs = torch.empty(count, 2, dtype=dtype, device=kernels_impl.device)
        kernels_impl.call("primitive_conversion", narrow, wide, pairs, given, count, dtype, kernels_impl.stream)
        assert torch.equal(wide.view(torch.int32), given.view(torch.int32))


def test_fast_functions_are_within_their_stated_error(kernels_impl):
    given = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([math.inf, -math.inf, 0.0, -300.0, -140.0])])
    given = given.to(kernels_impl.device)
    out = torch.empty(4, len(given), device=kernels_impl.device)
    kernels_impl.call("primitive_functions", out, given, len(given), kernels_impl.stream)
    exact = given.double()
    power = exact.exp2()
    torch.testing.assert_close(out[0].double(), power, rtol=2**-21, atol=2**-126)
    torch.testing.assert_close(out[1].double(), exact.tanh(), rtol=2**-10.5, atol=1e-30)
    torch.testing.assert_close(out[2].double(), exact.exp(), rtol=2**-18, atol=2**-126)
    torch.testing.assert_close(out[3].double(), exact.rsqrt(), rtol=2**-21, atol=0, equal_nan=True)
