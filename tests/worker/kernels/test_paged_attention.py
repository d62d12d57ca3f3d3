"""attention_plan and paged_attention of csrc/cuda against the reference, with NaN wherever nothing may be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqexec.errors import InternalError
from zmqexec.worker.kernels import reference
from zmqexec.worker.kernels.paged_attention import MANY_ITEMS, AttentionWorkspace, Launch, choose_launch

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest expected value: softmax weights and the result are rounded to the dtype."""


@dataclass
class Batch:
    """A step's rows over a cache in which every token outside their (windows of) contexts is NaN."""

    contexts: list[int]
    query_lens: list[int]
    num_kv_heads: int = 2
    group: int = 1
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    seed: int = 0
    sharpness: float = 1.0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        num_rows, num_heads = len(self.contexts), self.num_kv_heads * self.group
        counts = [-(-context // self.block_size) for context in self.contexts]
        numbers = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        cache = torch.full((len(numbers), 2, self.num_kv_heads, self.block_size, self.head_dim), torch.nan)
        tables = torch.full((num_rows + 2, max(counts, default=0) + 2), -(1 << 20), dtype=torch.int32)
        slots = torch.randperm(num_rows + 2, generator=generator)[:num_rows].to(torch.int32)
        for row, (context, query_len) in enumerate(zip(self.contexts, self.query_lens, strict=True)):
            oldest = max(0, context - query_len + 1 - self.window) if self.window else 0
            for index in range(oldest // self.block_size, counts[row]):
                number = tables[slots[row], index] = numbers.pop()
                # A block holds older tokens than the window's, but nothing newer than the context.
                tokens = min(self.block_size, context - index * self.block_size)
                shape = (2, self.num_kv_heads, tokens, self.head_dim)
                cache[number, :, :, :tokens] = torch.randn(shape, generator=generator)
        num_tokens = sum(self.query_lens)
        packed = torch.randn((num_tokens, num_heads * self.head_dim + 24), generator=generator) * self.sharpness
        starts = torch.tensor([0, *self.query_lens]).cumsum(0)
        self.tensors = {
            "query": packed.to(self.dtype)[:, : num_heads * self.head_dim].unflatten(1, (num_heads, self.head_dim)),
            "cache": cache.to(self.dtype),
            "block_tables": tables,
            "row_slots": slots,
            "context_lens": torch.tensor(self.contexts, dtype=torch.int32),
            "query_starts": starts.to(torch.int32),
        }
        if self.alibi:
            self.tensors["alibi_slopes"] = 2.0 ** -torch.linspace(1, 8, num_heads)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def expected(self) -> torch.Tensor:
        options = {"scale": self.scale, "window": self.window, "softcap": self.softcap}
        return reference.paged_attention(**self.tensors, **options)

    def run(self, kernels_impl, *, num_blocks=5, fixed_split_tokens=0, min_split_tiles=4, variant=0, layers=1):
        """`layers` times with one plan: what all gave, equal to the bit. The padded rows must be untouched."""
        tensors = {name: tensor.to(kernels_impl.device) for name, tensor in self.tensors.items()}
        workspace = AttentionWorkspace(
            kernels_impl.device,
            max_rows=len(self.contexts),
            num_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_context_len=max([1, *self.contexts]),
            max_query_len=max([1, *self.query_lens]),
            window=self.window,
            fixed_split_tokens=fixed_split_tokens,
            min_split_tiles=min_split_tiles,
            variant=variant,
            num_blocks=num_blocks,
            module=kernels_impl.module,
        )
        for buffer in workspace._buffers:
            buffer.fill_(0xFF)
        one_each = all(query_len == 1 for query_len in self.query_lens)
        starts = None if one_each else tensors["query_starts"]
        workspace.plan(tensors["context_lens"], tensors.get("row_slots"), starts, pdl=kernels_impl.pdl)
        outs = []
        for _ in range(layers):
            out = torch.full(tensors["query"].shape, torch.nan, dtype=self.dtype, device=kernels_impl.device)
            workspace.attend(
                out,
                tensors["query"],
                tensors["cache"],
                tensors["block_tables"],
                scale=self.scale,
                softcap=self.softcap,
                alibi_slopes=tensors.get("alibi_slopes"),
                pdl=kernels_impl.pdl,
            )
            outs.append(out.cpu())
            assert torch.equal(outs[0].view(torch.int16), outs[-1].view(torch.int16))
        for row, (begin, end) in enumerate(self.token_ranges()):
            assert outs[0][begin:end].isnan().all() == (self.contexts[row] == 0), f"row {row}"
        return outs[0]

    def token_ranges(self) -> list[tuple[int, int]]:
        starts = self.tensors["query_starts"].tolist()
        return [(a, b) for a, b in pairwise(starts) if a < b]

    def check(self, kernels_impl, **options) -> None:
        out, expected = self.run(kernels_impl, **options).float(), self.expected()
        for row, (begin, end) in enumerate(self.token_ranges()):
            if self.contexts[row] > 0:
                atol = TOLERANCE[self.dtype] * float(expected[begin:end].abs().max())
                torch.testing.assert_close(out[begin:end], expected[begin:end], atol=atol, rtol=0)


@st.composite
def batches(draw):
    query_lens = draw(st.one_of(st.just([1] * 8), st.lists(st.integers(1, 9), min_size=8, max_size=8)))
    edges = st.sampled_from([1, 15, 16, 17, 31, 32, 33, 48, 64, 65, 96])
    lens = st.one_of(edges, st.integers(1, 200), st.integers(200, 900), st.just(0))
    prefixes = draw(st.lists(lens, min_size=1, max_size=4))
    query_lens = query_lens[: len(prefixes)]
    contexts = [0 if prefix == 0 else max(prefix, n) for prefix, n in zip(prefixes, query_lens, strict=True)]
    return Batch(
        contexts=contexts,
        query_lens=query_lens,
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 1, 2, 3, 4, 8, 16, 20])),
        head_dim=draw(st.sampled_from([64, 64, 80, 96, 128, 256])),
        block_size=draw(st.sampled_from([16, 16, 32, 48])),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        window=draw(st.sampled_from([0, 0, 1, 16, 33, 100])),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0])),
        alibi=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 30)),
        sharpness=draw(st.sampled_from([1.0, 8.0])),
    )


@settings(max_examples=30, deadline=None)
@given(
    batch=batches(),
    num_blocks=st.integers(1, 9),
    fixed_split_tokens=st.sampled_from([0, 0, 64, 128]),
    min_split_tiles=st.sampled_from([4, 8]),
    order=st.sampled_from([0, 1, 2]),
)
def test_any_batch(kernels_impl, batch, num_blocks, fixed_split_tokens, min_split_tiles, order):
    with kernels_impl.emulated(seed=order, resident_blocks=order + 1):
        batch.check(
            kernels_impl,
            num_blocks=num_blocks,
            fixed_split_tokens=fixed_split_tokens,
            min_split_tiles=min_split_tiles,
            layers=1 + (order == 2),
        )


@pytest.mark.parametrize("head_dim, variant", [(64, 0), (80, 0), (96, 0), (128, 0), (128, 1), (128, 2), (256, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kernel(kernels_impl, head_dim, variant, dtype):
    batch = Batch([300, 17], [1, 1], head_dim=head_dim, group=4, dtype=dtype)
    batch.check(kernels_impl, variant=variant)
    with pytest.raises(ValueError, match="no kernel for this head_dim"):
        kernels_impl.module.attention_grid(head_dim, 3)


@pytest.mark.parametrize("num_rows", [MANY_ITEMS // 8 - 1, MANY_ITEMS // 8])
def test_the_launch_of_few_and_of_many_rows(kernels_impl, num_rows):
    contexts = [1 + 37 * row % 50 for row in range(num_rows)]
    launch = choose_launch(128, num_rows, 8, kernels_impl.module)
    assert launch == (Launch(2, 1, 16) if num_rows < MANY_ITEMS // 8 else Launch(0, 3, 24))
    batch = Batch(contexts, [1] * num_rows, head_dim=128, num_kv_heads=8, group=1)
    batch.check(kernels_impl, variant=launch.variant, num_blocks=4 * launch.blocks_per_sm)


def test_rows_of_very_different_lengths(kernels_impl):
    contexts = [1, 1500, 16, 0, 17, 333, 0, 64, 2, 700, 48, 31, 32, 0]
    for num_blocks in (1, 7, 40):
        batch = Batch(contexts, [1] * len(contexts), num_kv_heads=1, group=4, seed=num_blocks)
        batch.check(kernels_impl, num_blocks=num_blocks, layers=2)


@pytest.mark.parametrize("context", [1, 15, 16, 17, 319, 320, 321, 384, 512, 513])
def test_one_sequence_over_many_blocks(kernels_impl, context):
    batch = Batch([context], [1], num_kv_heads=2, seed=context)
    with kernels_impl.emulated(seed=context, resident_blocks=4):
        batch.check(kernels_impl, num_blocks=16, min_split_tiles=8, layers=2)


def test_without_row_slots_row_i_is_slot_i(kernels_impl):
    batch = Batch([40, 0, 300], [1, 1, 1])
    batch.tensors["block_tables"] = batch.tensors["block_tables"][batch.tensors.pop("row_slots")]
    batch.check(kernels_impl)


def test_a_step_without_tokens_does_nothing(kernels_impl):
    Batch([0, 0], [1, 1]).check(kernels_impl)


def test_with_fixed_splits_a_row_does_not_depend_on_the_others(kernels_impl):
    """To the bit: alone, among others, in another order, over more blocks."""
    options = {"group": 4, "num_kv_heads": 1, "window": 500, "dtype": torch.bfloat16}
    contexts, query_lens = [700, 64, 129, 5, 330], [1, 3, 1, 1, 2]
    together = Batch(contexts, query_lens, **options)
    whole = together.run(kernels_impl, num_blocks=3, fixed_split_tokens=128)
    ranges = together.token_ranges()
    for rows, num_blocks in (([0], 1), ([4, 0], 9), ([1, 3, 2], 2), ([2, 0, 4, 1, 3], 5)):
        part = Batch([contexts[row] for row in rows], [query_lens[row] for row in rows], **options)
        tokens = torch.cat([torch.arange(*ranges[row]) for row in rows])
        part.tensors["query"] = together.tensors["query"][tokens]
        part.tensors["cache"] = together.tensors["cache"]
        part.tensors["block_tables"] = together.tensors["block_tables"]
        part.tensors["row_slots"] = together.tensors["row_slots"][rows]
        out = part.run(kernels_impl, num_blocks=num_blocks, fixed_split_tokens=128)
        assert torch.equal(out, whole[tokens])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 3, 4, 16])
def test_with_fixed_splits_tokens_of_one_row_have_the_bits_of_rows_of_their_own(kernels_impl, group, dtype):
    """Also where a token sees nothing of the row's last split, and where those behind it have by far larger values."""
    query_len = max(2, 16 // group)
    options = {"group": group, "num_kv_heads": 2, "dtype": dtype, "sharpness": 3.0}
    together = Batch([130, 300, 16], [query_len, query_len, 2], **options)
    together.tensors["cache"][:, 1, :, 1::3] *= 1024
    whole = together.run(kernels_impl, num_blocks=3, fixed_split_tokens=64)
    contexts, slots = [], []
    for row, (context, count) in enumerate(zip(together.contexts, together.query_lens, strict=True)):
        contexts += range(context - count + 1, context + 1)
        slots += [together.tensors["row_slots"][row]] * count
    single = Batch(contexts, [1] * len(contexts), **options)
    for name in ("query", "cache", "block_tables"):
        single.tensors[name] = together.tensors[name]
    single.tensors["row_slots"] = torch.stack(slots)
    assert torch.equal(single.run(kernels_impl, num_blocks=7, fixed_split_tokens=64), whole)


def test_without_fixed_splits_a_row_does_depend_on_the_others(kernels_impl):
    lone = Batch([700], [1], dtype=torch.float16)
    together = Batch([700, 700, 700], [1, 1, 1], dtype=torch.float16)
    for name in ("query", "cache", "block_tables"):
        tensor = lone.tensors[name]
        together.tensors[name] = tensor.expand(3, -1, -1).clone() if name == "query" else tensor
    together.tensors["row_slots"] = lone.tensors["row_slots"].expand(3).clone()
    whole = together.run(kernels_impl, num_blocks=8)
    assert not torch.equal(lone.run(kernels_impl, num_blocks=8)[0], whole[0])


def test_wrong_arguments_are_named(kernels_impl):
    shape = {"max_rows": 4, "num_kv_heads": 2, "head_dim": 64, "max_context_len": 64, "num_blocks": 2}
    with pytest.raises(InternalError, match="no paged attention for 3 heads, 2 KV heads of 64"):
        AttentionWorkspace(kernels_impl.device, num_heads=3, module=kernels_impl.module, **shape)
    workspace = AttentionWorkspace(kernels_impl.device, num_heads=4, module=kernels_impl.module, **shape)
    with pytest.raises(InternalError, match="5 rows does not fit a workspace of 4"):
        workspace.plan(torch.zeros(5, dtype=torch.int32, device=kernels_impl.device))
    with pytest.raises(InternalError, match=r"out \[1, 4, 64\], query \[1, 4, 64\], cache \[3, 2, 2, 8, 64\]"):
        heads = torch.zeros((1, 4, 64), dtype=torch.bfloat16)
        tables = torch.zeros((1, 1), dtype=torch.int32)
        workspace.attend(heads, heads, torch.zeros((3, 2, 2, 8, 64), dtype=torch.bfloat16), tables, scale=1.0)
