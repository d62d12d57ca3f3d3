"""Chunks that are attended together gather a bounded number of cached tokens."""

from __future__ import annotations

import random

import pytest

from zmqexec.worker.gpu.attention import groups_of


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
def test_a_group_takes_what_fits_and_a_longer_context_is_alone(context_lens, expected):
    assert groups_of(context_lens, 10) == expected


def test_groups_hold_every_chunk_once_and_in_order():
    rng = random.Random(0)
    for _ in range(200):
        lens = [rng.randint(1, 40) for _ in range(rng.randrange(12))]
        groups = groups_of(lens, 50)
        assert [index for group in groups for index in group] == list(range(len(lens)))
        assert all(sum(lens[index] for index in group) <= 50 for group in groups)
