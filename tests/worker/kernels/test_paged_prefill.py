"""csrc/cuda/prefill_attention_sm90a.cu against float32, with NaN wherever nothing may be read or written."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqexec.errors import InternalError
from zmqexec.worker.kernels import native
from zmqexec.worker.kernels.paged_prefill import items_of, prefill_attention, supported

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest expected value: softmax weights and the result are rounded to the dtype."""


@pytest.fixture(autouse=True)
def needs_hopper(kernels_impl):
    if native.capability(kernels_impl.device) != 90:
        pytest.skip("needs compute capability 9.0")


@dataclass
class Prefills:
    """Chunks of random tokens over a cache in which every token outside their contexts is NaN.

    chunks  (prefix_len, query_len)
    before  tokens of the batch in front of the chunks and behind them, which are nobody's: their rows are NaN, too
    """

    chunks: list[tuple[int, int]]
    num_kv_heads: int = 1
    group: int = 1
    head_dim: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    before: int = 0
    sharpness: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        num_chunks, num_heads = len(self.chunks), self.num_kv_heads * self.group
        counts = [-(-sum(chunk) // self.block_size) for chunk in self.chunks]
        numbers = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        shape = (2, self.num_kv_heads, self.block_size, self.head_dim)
        cache = torch.full((len(numbers), *shape), torch.nan)
        self.block_tables = torch.full((num_chunks + 2, max(counts) + 2), -(1 << 20), dtype=torch.int32)
        self.slots = torch.randperm(num_chunks + 2, generator=generator)[:num_chunks].to(torch.int32)
        for slot, count, chunk in zip(self.slots.tolist(), counts, self.chunks, strict=True):
            for index in range(count):
                number = self.block_tables[slot, index] = numbers.pop()
                tokens = min(self.block_size, sum(chunk) - index * self.block_size)
                cache[number, :, :, :tokens] = torch.randn(shape, generator=generator)[:, :, :tokens]
        query_lens = [query_len for _, query_len in self.chunks]
        self.cu_query = torch.tensor([self.before, *query_lens]).cumsum(0).to(torch.int32)
        self.context_lens = torch.tensor([sum(chunk) for chunk in self.chunks], dtype=torch.int32)
        num_tokens = sum(query_lens) + 2 * self.before
        packed = torch.randn((num_tokens, num_heads + 2 * self.num_kv_heads, self.head_dim), generator=generator)
        packed[:, num_heads:] = torch.nan
        packed[: self.before] = packed[num_tokens - self.before :] = torch.nan
        self.cache = cache.to(self.dtype)
        self.query = (packed * self.sharpness).to(self.dtype)[:, :num_heads]
        self.scale = self.head_dim**-0.5

    def expected(self) -> torch.Tensor:
        """Token by token as it is defined, in float32; NaN in rows of no chunk."""
        out = torch.full(self.query.shape, torch.nan)
        starts = self.cu_query.tolist()
        for slot, (begin, end), (prefix_len, query_len) in zip(
            self.slots.tolist(), pairwise(starts), self.chunks, strict=True
        ):
            tokens = torch.arange(prefix_len + query_len)
            blocks = self.block_tables[slot].long()[tokens // self.block_size]
            kv = self.cache[blocks, :, :, tokens % self.block_size].float()
            kv = kv.repeat_interleave(self.group, dim=2)
            logits = torch.einsum("qhd,khd->hqk", self.query[begin:end].float(), kv[:, 0]) * self.scale
            hidden = tokens > (prefix_len + torch.arange(query_len)).unsqueeze(1)
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            out[begin:end] = torch.einsum("hqk,khd->qhd", weights, kv[:, 1])
        return out

    def run(self, kernels_impl, *, padding: int = 0, takes_turns: bool = True, blocks: int = 0) -> torch.Tensor:
        """The rows of all tokens; what lies between them must be untouched."""
        to = functools.partial(torch.Tensor.to, device=kernels_impl.device)
        width = self.query.shape[1] * self.head_dim
        # A view of the packed tensor stays one.
        packed = to(self.query._base if self.query._base is not None else self.query)
        query = packed.as_strided(self.query.shape, self.query.stride(), self.query.storage_offset())
        memory = torch.full((len(query) + 2, width + padding), torch.nan, dtype=self.dtype, device=query.device)
        out = memory[1:-1, :width].unflatten(1, query.shape[1:])
        prefill_attention(
            out,
            query,
            to(self.cache),
            to(self.block_tables),
            to(self.slots),
            to(self.cu_query),
            to(self.context_lens),
            to(torch.from_numpy(items_of([query_len for _, query_len in self.chunks], self.context_lens.tolist()))),
            self.scale,
            takes_turns=takes_turns,
            blocks=blocks,
            pdl=kernels_impl.pdl,
        )
        result = out.cpu().clone()
        out.fill_(torch.nan)
        assert memory.isnan().all()
        return result

    def check(self, kernels_impl, **options) -> None:
        out, expected = self.run(kernels_impl, **options).float(), self.expected()
        assert torch.equal(out.isnan(), expected.isnan())
        for begin, end in pairwise(self.cu_query.tolist()):
            if begin < end:
                atol = TOLERANCE[self.dtype] * float(expected[begin:end].abs().max())
                torch.testing.assert_close(out[begin:end], expected[begin:end], atol=atol, rtol=0)


@st.composite
def prefills(draw):
    edges = st.sampled_from([1, 63, 64, 65, 127, 128, 129])
    query_lens = draw(st.lists(st.one_of(edges, st.integers(1, 150)), min_size=1, max_size=4))
    while sum(query_lens) > 300:
        query_lens.pop()
    prefix_lens = st.one_of(st.just(0), st.sampled_from([1, 64, 127, 128, 129, 256]), st.integers(1, 400))
    group = draw(st.sampled_from([1, 1, 2, 3, 4]))
    return Prefills(
        chunks=[(draw(prefix_lens), query_len) for query_len in query_lens],
        num_kv_heads=draw(st.integers(1, 2)) if group <= 2 else 1,
        group=group,
        head_dim=draw(st.sampled_from([128, 128, 64])),
        block_size=draw(st.sampled_from([16, 16, 8, 32, 64, 128, 256])),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        before=draw(st.sampled_from([0, 0, 1, 5])),
        sharpness=draw(st.sampled_from([1.0, 8.0])),
        seed=draw(st.integers(0, 1 << 30)),
    )


@settings(max_examples=25, deadline=None)
@given(
    batch=prefills(),
    padding=st.sampled_from([0, 8, 72]),
    takes_turns=st.booleans(),
    blocks=st.sampled_from([0, 1, 2, 5]),
    order=st.sampled_from([0, 1, 2]),
)
def test_any_chunks(kernels_impl, batch, padding, takes_turns, blocks, order):
    with kernels_impl.emulated(seed=order, resident_blocks=order + 1):
        batch.check(kernels_impl, padding=padding, takes_turns=takes_turns, blocks=blocks)


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_size_of_blocks(kernels_impl, block_size, head_dim):
    Prefills([(257, 70), (0, 130)], block_size=block_size, head_dim=head_dim).check(kernels_impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("context", [1, 15, 16, 17, 127, 128, 129, 255, 257])
def test_contexts_around_the_edges_of_tiles(kernels_impl, context, dtype):
    with kernels_impl.emulated(seed=context):
        Prefills([(0, context)], dtype=dtype).check(kernels_impl)
        Prefills([(context - 1, 1)], dtype=dtype).check(kernels_impl)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("takes_turns", [False, True])
def test_a_long_context_goes_through_the_rings_many_times(kernels_impl, takes_turns, order):
    with kernels_impl.emulated(seed=order):
        batch = Prefills([(900, 130), (0, 20)], block_size=64, seed=order)
        batch.check(kernels_impl, takes_turns=takes_turns, blocks=1)


def test_a_token_that_sees_one_key_gets_its_value(kernels_impl):
    batch = Prefills([(0, 3)], head_dim=64)
    number = batch.block_tables[batch.slots[0], 0]
    assert torch.equal(batch.run(kernels_impl)[0, 0], batch.cache[number, 1, 0, 0])


def test_a_chunk_has_the_same_bits_among_others_and_in_other_blocks(kernels_impl):
    chunks = [(5, 100), (200, 60), (0, 129)]
    together = Prefills(chunks, group=2, block_size=32)
    whole = together.run(kernels_impl)
    for index in range(3):
        begin, end = together.cu_query[index : index + 2].tolist()
        alone = Prefills([chunks[index]], group=2, block_size=32, seed=index + 1)
        alone.query = together.query[begin:end]
        theirs, ours = (batch.block_tables[batch.slots[i]] for batch, i in ((together, index), (alone, 0)))
        count = -(-sum(chunks[index]) // 32)
        alone.cache[ours[:count].long()] = together.cache[theirs[:count].long()]
        assert torch.equal(alone.run(kernels_impl), whole[begin:end])


def test_no_chunk_of_tokens_writes_nothing(kernels_impl):
    batch = Prefills([(0, 5), (3, 2)])
    batch.cu_query.zero_()
    assert batch.run(kernels_impl).isnan().all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"head_dim": 80}, "[4, 1, 80]"),
        ({"block_size": 48}, "[4, 2, 1, 48, 128]"),
        ({"dtype": torch.float32}, "torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(kernels_impl, change, named):
    batch = Prefills([(0, 4)], **change)
    assert not supported(batch.head_dim, batch.block_size, batch.dtype, kernels_impl.device)
    with pytest.raises(InternalError) as refused:
        batch.run(kernels_impl)
    assert named in str(refused.value)


def test_unaligned_addresses_are_refused(kernels_impl):
    batch = Prefills([(0, 4)])
    batch.query = torch.zeros(4 * 128 + 1, dtype=torch.bfloat16)[1:].view(4, 1, 128)
    with pytest.raises(ValueError, match="addresses are 16-aligned"):
        batch.run(kernels_impl)


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 700)), max_size=8))
def test_items_are_all_of_the_tokens_the_longest_first(chunks):
    query_lens, context_lens = [count for _, count in chunks], [prefix + count for prefix, count in chunks]
    items = items_of(query_lens, context_lens).tolist()
    every = {(chunk, first) for chunk, count in enumerate(query_lens) for first in range(0, count, 128)}
    assert len(items) == len(every) and {(chunk, first) for chunk, first in items} == every
    keys = [chunks[chunk][0] + min(first + 128, query_lens[chunk]) for chunk, first in items]
    assert keys == sorted(keys, reverse=True)
