"""Chunks that are attended together gather a bounded number of cached tokens, and no more than they must."""

from __future__ import annotations

import random

import pytest

from zmqexec.worker.gpu.attention import WORTH_A_GROUP, groups_of


@pytest.mark.parametrize(
    ("context_lens", "expected"),
    [
        ([], []),
        ([10], [range(1)]),
        ([11], [range(1)]),
        ([5, 5, 1], [range(2), range(2, 3)]),
        ([11, 1, 9, 1], [range(1), range(1, 3), range(3, 4)]),
    ],
)
@pytest.mark.parametrize("start", [0, 1])
def test_a_group_takes_what_fits_and_a_longer_context_is_alone(context_lens, expected, start):
    assert groups_of([(start, stop) for stop in context_lens], 10) == expected


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([(16, 40), (0, WORTH_A_GROUP)], [range(1), range(1, 2)]),
        ([(16, 40), (0, WORTH_A_GROUP - 1)], [range(2)]),
        ([(0, WORTH_A_GROUP), (16, 40), (32, 50)], [range(1), range(1, 3)]),
        ([(16, 40), (0, WORTH_A_GROUP // 2), (0, WORTH_A_GROUP // 2), (8, 9)], [range(1), range(1, 3), range(3, 4)]),
        ([(0, 9), (16, 40), (0, WORTH_A_GROUP), (0, 3)], [range(2), range(2, 4)]),
    ],
)
def test_whole_prompts_worth_it_are_a_group_of_their_own(chunks, expected):
    assert groups_of(chunks, 1 << 20) == expected


def test_groups_hold_every_chunk_once_and_in_order():
    rng = random.Random(0)
    for _ in range(200):
        chunks = [(rng.choice([0, 0, 7]), rng.randint(8, 2000)) for _ in range(rng.randrange(12))]
        groups = groups_of(chunks, 2000)
        assert [index for group in groups for index in group] == list(range(len(chunks)))
        assert all(sum(chunks[index][1] for index in group) <= 2000 for group in groups)
