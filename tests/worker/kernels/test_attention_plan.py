"""What attention_plan of csrc/cuda promises paged_attention: every tile done once, and splits that know each other."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.kernels.attention_plans import read_plan
from zmqexec.worker.kernels.paged_attention import AttentionWorkspace


def make_plan(kernels_impl, contexts, query_lens, *, num_kv_heads, group, num_blocks, window=0, fixed=0, min_tiles=8):
    num_rows = len(contexts)
    workspace = AttentionWorkspace(
        kernels_impl.device,
        max_rows=num_rows,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        max_context_len=max([1, *contexts]),
        max_query_len=max([1, *query_lens]),
        window=window,
        fixed_split_tokens=fixed,
        min_split_tiles=min_tiles,
        num_blocks=num_blocks,
        module=kernels_impl.module,
    )
    for buffer in workspace._buffers:
        buffer.fill_(0xFF)
    starts = torch.tensor([7, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    slots = torch.arange(num_rows, dtype=torch.int32) + 100
    lens = torch.tensor(contexts, dtype=torch.int32)
    workspace.plan(*(tensor.to(kernels_impl.device) for tensor in (lens, slots, starts)), pdl=kernels_impl.pdl)
    plan, tickets, partials = (buffer.cpu().numpy() for buffer in workspace._buffers)
    rows, parts = read_plan(plan.view(np.int32), num_blocks, num_kv_heads, group)
    partial_bytes = 4 * min(16, group * max([1, *query_lens])) * 132
    return rows, parts, tickets.view(np.int32), partials.nbytes // partial_bytes


def check_plan(contexts, query_lens, rows, parts, tickets, num_partials, *, num_kv_heads, group, window, fixed):
    alive = [i for i, context in enumerate(contexts) if context > 0 and query_lens[i] > 0]
    assert [row["slot"] for row in rows] == [100 + i for i in alive]
    starts = np.cumsum([7, *query_lens])
    by_item = defaultdict(list)
    for block_parts in parts:
        for part in block_parts:
            by_item[part.row, part.item].append(part)
    num_items = 0
    taken_tickets, partials = set(), set()
    for number, (i, row) in enumerate(zip(alive, rows, strict=True)):
        oldest = max(0, contexts[i] - query_lens[i] + 1 - window) // 16 if window else 0
        first_tile = oldest // (fixed // 16) * (fixed // 16) if fixed else oldest
        assert (row["first_tile"], row["num_tiles"]) == (first_tile, -(-contexts[i] // 16) - first_tile)
        assert (row["context_len"], row["query_len"], row["query_start"]) == (contexts[i], query_lens[i], starts[i])
        for item in range(num_kv_heads * -(-query_lens[i] * group // 16)):
            num_items += 1
            own = by_item[number, item]
            assert [part.begin for part in own] == [0, *(part.end for part in own[:-1])]
            assert own[-1].end == row["num_tiles"]
            if len(own) == 1 and own[0].count is None:
                continue
            assert [part.number for part in own] == list(range(len(own)))
            assert {part.count for part in own} == {len(own)}
            assert len({part.ticket for part in own}) == 1
            assert own[0].ticket not in taken_tickets
            assert tickets[own[0].ticket] == 0
            taken_tickets.add(own[0].ticket)
            for part in own:
                assert part.partial not in partials
                assert 0 <= part.partial < num_partials
                partials.add(part.partial)
    assert len(by_item) == num_items


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_tile_is_done_once(kernels_impl, data):
    draw = data.draw
    longest = draw(st.sampled_from([40, 300, 5000, 60_000]))
    num_rows = draw(st.sampled_from([1, 2, 5, 30, 256, 700, 1024]))
    generator = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    query_lens = [1] * num_rows if draw(st.booleans()) else generator.integers(0, 12, num_rows).tolist()
    contexts = generator.integers(0, longest + 1, num_rows)
    if draw(st.booleans()):
        contexts[:] = longest
    contexts[generator.random(num_rows) < draw(st.sampled_from([0, 0.1, 0.9]))] = 0
    contexts = [0 if c == 0 else max(int(c), n) for c, n in zip(contexts, query_lens, strict=True)]
    shape = {
        "num_kv_heads": draw(st.sampled_from([1, 2, 8] if num_rows < 200 else [1])),
        "group": draw(st.sampled_from([1, 4, 20])),
    }
    shape |= {
        "window": draw(st.sampled_from([0, 0, 50, 4096])),
        "fixed": draw(st.sampled_from([0, 0, 0, 64] if longest < 5000 else [0, 2048])),
    }
    num_blocks, min_tiles = draw(st.sampled_from([1, 3, 132, 264, 1000])), draw(st.sampled_from([4, 8]))
    plan = make_plan(kernels_impl, contexts, query_lens, **shape, num_blocks=num_blocks, min_tiles=min_tiles)
    check_plan(contexts, query_lens, *plan, **shape)


@pytest.mark.parametrize(
    "batch, context, num_kv_heads, group, most_over_mean",
    [
        (64, 4096, 8, 4, 1.05),
        (64, 4096, 32, 1, 1.05),
        (64, 1024, 32, 1, 1.1),
        (256, 1024, 8, 4, 1.1),
        (8, 4096, 8, 4, 1.1),
        (1, 32768, 8, 4, 1.1),
        (1, 4096, 32, 1, 1.1),
        (64, 4096, 1, 8, 1.1),
        (1, 1000, 32, 1, 1.1),
        (1, 1024, 8, 4, 1.0),
    ],
)
def test_blocks_get_equal_shares(kernels_impl, batch, context, num_kv_heads, group, most_over_mean):
    shape = {"num_kv_heads": num_kv_heads, "group": group}
    contexts, query_lens = [context] * batch, [1] * batch
    _, parts, *_ = plan = make_plan(kernels_impl, contexts, query_lens, **shape, num_blocks=264)
    check_plan(contexts, query_lens, *plan, **shape, window=0, fixed=0)
    shares = [sum(part.end - part.begin for part in block_parts) for block_parts in parts]
    total = batch * num_kv_heads * -(-context // 16)
    assert sum(shares) == total
    least_possible = max(total / 264, 8)
    assert max(shares) <= most_over_mean * least_possible + 1


@pytest.mark.parametrize("context", [1, 5, 16, 100, 300])
def test_short_contexts_are_not_split(kernels_impl, context):
    _, parts, *_ = make_plan(kernels_impl, [context], [1], num_kv_heads=32, group=1, num_blocks=264)
    assert max(len(block_parts) for block_parts in parts) == 1
    assert all(part.count is None for block_parts in parts for part in block_parts)


def test_a_wrong_argument_is_named(kernels_impl):
    call = [0] * 14
    with pytest.raises(ValueError, match="num_kv_heads, group, num_blocks must be positive"):
        kernels_impl.module.attention_plan(*call[:13], False)
