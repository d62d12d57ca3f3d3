"""The state behind a step: what a slot remembers, what rows it gives, and which steps contradict it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzzing import run_steps, steps_of
from zmqexec.errors import InternalError
from zmqexec.protocol import Admission, StepInput, pack
from zmqexec.worker.batch import Batch

BLOCK = 4


def make_batch():
    return Batch(max_num_seqs=3, max_model_len=20, block_size=BLOCK, num_cache_blocks=10)


def admission(slot, tokens, blocks, num_computed=0):
    return Admission(slot, pack(tokens), len(tokens), num_computed, pack(blocks))


def step(prefills=(), decodes=(), new_blocks=(), admitted=()):
    bitmap = sum(1 << slot for slot in decodes)
    return StepInput(0, 0, bitmap.to_bytes(2, "little"), pack(prefills), pack(new_blocks), list(admitted))


def test_chunks_then_decodes_walk_through_the_blocks():
    batch = make_batch()
    rows = batch.begin(step([1, 3], admitted=[admission(1, [10, 11, 12, 13, 14], [7, 2])]))
    assert rows.token_ids.tolist() == [10, 11, 12]
    assert rows.slot_mapping.tolist() == [28, 29, 30]
    assert rows.prefills[0].context_rows is None
    assert len(rows.sample_slots) == 0
    batch.finish(rows, np.empty(0, np.int64))

    rows = batch.begin(step([1, 2]))
    assert rows.positions.tolist() == [3, 4]
    assert rows.slot_mapping.tolist() == [31, 8]
    assert rows.prefills[0].context_rows.tolist() == [28, 29, 30, 31, 8]
    assert (rows.sample_slots.tolist(), rows.sample_rows.tolist()) == ([1], [1])
    batch.finish(rows, np.array([99]))

    rows = batch.begin(step(decodes=[1]))
    assert (rows.token_ids.tolist(), rows.positions.tolist(), rows.slot_mapping.tolist()) == ([99], [5], [9])


def test_prefills_come_in_the_order_given_and_decodes_by_slot():
    batch = make_batch()
    admitted = [admission(slot, [slot, slot], [slot]) for slot in range(3)]
    rows = batch.begin(step([2, 2, 0, 2, 1, 2], admitted=admitted))
    assert rows.token_ids.tolist() == [2, 2, 0, 0, 1, 1]
    assert rows.sample_slots.tolist() == [2, 0, 1]
    assert rows.sample_rows.tolist() == [1, 3, 5]
    batch.finish(rows, np.array([12, 10, 11]))
    assert batch.begin(step(decodes=[2, 0])).token_ids.tolist() == [10, 12]


def test_an_admission_forgets_what_the_slot_held():
    batch = make_batch()
    batch.finish(batch.begin(step([0, 5], admitted=[admission(0, [1, 2, 3, 4, 5], [0, 1])])), np.array([6]))
    rows = batch.begin(step([0, 1], admitted=[admission(0, [8, 9], [5], num_computed=1)]))
    assert (rows.token_ids.tolist(), rows.slot_mapping.tolist()) == ([9], [21])
    assert rows.prefills[0].context_rows.tolist() == [20, 21]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=8))
def test_new_blocks_are_appended_in_order_and_named_by_their_places(pairs):
    batch = make_batch()
    tables = [[5], [], [6, 7]]
    for slot, table in enumerate(tables):
        batch.take_in(step(admitted=[admission(slot, [1], table)]))
    for slot, block in pairs:
        tables[slot].append(block)
    flat = [number for pair in pairs for number in pair]
    if max(map(len, tables)) > 6:
        with pytest.raises(InternalError, match="a sequence at most 6"):
            batch.take_in(step(new_blocks=flat))
        return
    places = batch.take_in(step(new_blocks=flat)).new_blocks
    assert [(slot, block) for slot, _, block in places.tolist()] == pairs
    assert all(tables[slot][index] == block for slot, index, block in places.tolist())
    assert len({(slot, index) for slot, index, _ in places.tolist()}) == len(pairs)
    assert [batch.block_tables[slot, :count].tolist() for slot, count in enumerate(batch.num_blocks)] == tables


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (step([0, 6]), "cannot compute up to token 6"),
        (step([0, 0]), "cannot compute"),
        (step(decodes=[0]), "cannot compute up to token 1"),
        (step([0, 1, 0, 1]), "must be distinct"),
        (step([7, 1]), "in range"),
        (step([1, 1]), "0 computed, 0 known"),
        (step(new_blocks=[0, 10]), "the cache has 10 blocks"),
        (step(admitted=[admission(3, [1], [1])]), r"slot 3 is not in \[0, 3\)"),
        (step(admitted=[admission(1, [1] * 21, [1])]), "0 computed of 21 tokens, in a model of 20"),
        (step(admitted=[admission(1, [1, 2], [1], num_computed=2)]), "2 computed of 2"),
        (step([1, 5], admitted=[admission(1, [1, 2, 3, 4, 5], [1])]), "5 known, 1 blocks"),
        (step([0, 1, 1]), "prefills has 12 bytes"),
        (step([0, 1] * 4), "at most 3 pairs"),
        (step(decodes=[3]), r"decodes slots that are not in \[0, 3\)"),
        (StepInput(0, 0, decodes=bytes(1 << 20) + b"\1"), r"decodes slots that are not in \[0, 3\)"),
        (StepInput(0, 0, prefills=b"abc"), "prefills has 3 bytes"),
        (StepInput(0, 0, new_blocks=b"abcd"), "new_blocks has 4 bytes"),
        (step(new_blocks=[3, 1]), r"slot 3 is not in \[0, 3\)"),
        (step(new_blocks=[1, 2], admitted=[admission(1, [1], [1] * 6)]), "block 2 as number 6.* a sequence at most 6"),
        (step(new_blocks=[-1, 1]), r"slot -1 is not in \[0, 3\)"),
        (step(admitted=[Admission(1, b"abcde", 1, 0, b"")]), "token_ids has 5 bytes"),
        (step(admitted=[Admission(1, pack([1]), 1, 0, b"abc")]), "block_table has 3 bytes"),
        (step(admitted=[Admission(1, pack([1, 2]), 3, 0, pack([1]))]), "3 of 2 tokens are the prompt"),
        (step(admitted=[Admission(1, pack([1, 2]), 2**64 - 1, 0, pack([1]))]), "of 2 tokens are the prompt"),
        (step(admitted=[admission(1, [1, 2], [1] * 7)]), "in 7 blocks; a sequence has at most 6"),
    ],
)
def test_a_step_that_contradicts_the_state_is_our_bug(bad, message):
    batch = make_batch()
    batch.begin(step(admitted=[admission(0, [1, 2, 3, 4, 5], [0, 1])]))
    with pytest.raises(InternalError, match=message):
        batch.begin(bad)


NUMBERS = st.integers(-2, 25) | st.integers(-(2**63), 2**64 - 1)
PACKED = st.lists(st.integers(-2, 25) | st.integers(-(2**31), 2**31 - 1), max_size=24).map(pack) | st.binary(max_size=9)
ADMISSIONS = st.builds(Admission, NUMBERS, PACKED, NUMBERS, NUMBERS, PACKED)
STEPS = st.builds(
    StepInput, st.just(0), st.just(0), st.binary(max_size=2), PACKED, PACKED, st.lists(ADMISSIONS, max_size=3)
)


@given(st.lists(STEPS, max_size=3))
def test_a_step_of_any_content_gives_rows_or_is_our_bug(steps):
    run_steps(steps)


@given(st.binary(max_size=300))
def test_steps_that_are_nearly_right_give_rows_or_are_our_bug(data):
    run_steps(list(steps_of(data)))
