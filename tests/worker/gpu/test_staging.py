"""The extension takes in a step that only decodes exactly as `Batch` and `write_step` do, and the device learns of it
what it does not know already."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.gpu.emulation import EmulatedDevice
from zmqexec.errors import InternalError
from zmqexec.protocol import StepInput, pack
from zmqexec.worker.batch import Batch
from zmqexec.worker.gpu.staging import DecodeSteps, Results, Staging
from zmqexec.worker.kernels.decode_state import step_ints, write_step

NUM_SLOTS, MAX_MODEL_LEN, BLOCK_SIZE, NUM_CACHE_BLOCKS = 11, 40, 4, 30


@pytest.fixture(scope="module")
def device():
    return EmulatedDevice()


@st.composite
def batches(draw):
    """Slots most of which may decode next: some lack a block, some are full, some have more than one token to go."""
    batch = Batch(NUM_SLOTS, MAX_MODEL_LEN, BLOCK_SIZE, NUM_CACHE_BLOCKS)
    for slot in range(NUM_SLOTS):
        batch.num_known[slot] = draw(st.integers(0, MAX_MODEL_LEN + 1))
        batch.num_computed[slot] = max(0, batch.num_known[slot] - draw(st.sampled_from([1, 1, 1, 1, 2, 0])))
        enough = -(-batch.num_known[slot] // BLOCK_SIZE)
        batch.num_blocks[slot] = min(batch.block_tables.shape[1], max(0, enough + draw(st.sampled_from([0, 0, 1, -1]))))
        batch.block_tables[slot, : batch.num_blocks[slot]] = draw(st.integers(0, NUM_CACHE_BLOCKS - 1))
    return batch


def may_decode(batch, slots):
    """Those of the slots that can decode, when each has one more block."""
    room = batch.num_known[slots] <= (batch.num_blocks[slots] + 1) * BLOCK_SIZE
    return slots[(batch.num_computed[slots] + 1 == batch.num_known[slots]) & room]


def bitmap_of(slots):
    bits = np.zeros(-(-NUM_SLOTS // 8) * 8, np.uint8)
    bits[slots] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def by_python(batch, step):
    """The step buffer, or None where the step contradicts the state."""
    try:
        taken = batch.take_in(step)
    except InternalError:
        return None
    rows = batch.rows(taken.chunks, taken.decodes)
    buffer = np.zeros(step_ints(NUM_SLOTS, NUM_SLOTS), np.int32)
    count = write_step(buffer, NUM_SLOTS, taken.decodes, taken.new_blocks)
    batch.finish(rows, np.zeros(len(taken.decodes), np.int64))
    return buffer[:count]


@given(batches(), st.data())
@settings(deadline=None, max_examples=300)
def test_a_step_is_taken_in_as_in_python_or_changes_nothing(device, batch, data):
    slots = np.array(data.draw(st.lists(st.integers(0, NUM_SLOTS - 1), unique=True)), np.int64)
    if data.draw(st.booleans()):
        slots = may_decode(batch, slots)
    named = st.sampled_from(slots.tolist()) if len(slots) and data.draw(st.booleans()) else st.integers(-1, NUM_SLOTS)
    blocks = st.tuples(named, st.integers(0, NUM_CACHE_BLOCKS) if data.draw(st.booleans()) else st.just(3))
    pairs = data.draw(st.lists(blocks, max_size=NUM_SLOTS))
    step = StepInput(1, 1, decodes=bitmap_of(slots), new_blocks=pack(number for pair in pairs for number in pair))
    check(device, batch, step)


class Sender:
    """Decode steps of `batch`, with the device's ends of their copies."""

    def __init__(self, device, batch, run_ahead=1):
        self.target = torch.full((step_ints(NUM_SLOTS, NUM_SLOTS),), -7, dtype=torch.int32)
        self.source = torch.full((NUM_SLOTS,), -7, dtype=torch.int32)
        self.staging = Staging(self.target, run_ahead, device)
        results = Results(self.source, run_ahead, device)
        self.steps = DecodeSteps(batch, NUM_CACHE_BLOCKS, BLOCK_SIZE, self.staging, results, run_ahead, device)


def check(device, batch, step):
    before, expected = copy.deepcopy(batch), copy.deepcopy(batch)
    sender = Sender(device, batch)
    is_taken = sender.steps.begin(step, 0) is not None
    ints = by_python(expected, step)
    assert is_taken == (ints is not None)
    if ints is None:
        expected, ints = before, np.empty(0, np.int32)
    assert sender.target.tolist() == [*ints, *[-7] * (len(sender.target) - len(ints))]
    for name in ("num_known", "num_computed", "num_blocks"):
        assert getattr(batch, name).tolist() == getattr(expected, name).tolist()
    assert tables_of(batch) == tables_of(expected)
    return is_taken


def tables_of(batch):
    """Entries past num_blocks are not read."""
    return [row[:count].tolist() for row, count in zip(batch.block_tables, batch.num_blocks, strict=True)]


def ready(num_known):
    batch = Batch(NUM_SLOTS, MAX_MODEL_LEN, BLOCK_SIZE, NUM_CACHE_BLOCKS)
    batch.num_known[:], batch.num_computed[:] = num_known, num_known - 1
    batch.num_blocks[:] = -(-num_known // BLOCK_SIZE)
    return batch


@pytest.mark.parametrize(
    ("num_known", "decodes", "new_blocks", "is_taken"),
    [
        (5, bitmap_of([0, 10]), [], True),
        (8, bitmap_of([0, 10]), [0, 1, 10, 2], True),
        (8, b"", [0, 1, 0, 2], True),
        (8, b"", [], True),
        (MAX_MODEL_LEN, bitmap_of([3]), [], True),
        (MAX_MODEL_LEN + 1, bitmap_of([3]), [], False),
        (5, b"\x00\x08", [], False),
        (5, b"\x01" + bytes(40) + b"\x01", [], False),
        (5, b"\x01" + bytes(40), [], True),
        (5, bitmap_of([1]), [1, NUM_CACHE_BLOCKS], False),
        (5, bitmap_of([1]), [1, -1], False),
        (5, bitmap_of([1]), [NUM_SLOTS, 1], False),
        (5, bitmap_of([1]), [-1, 1], False),
        (5, bitmap_of([1]), [2] * 2 * NUM_SLOTS, False),
    ],
)
def test_edges(device, num_known, decodes, new_blocks, is_taken):
    step = StepInput(1, 1, decodes=decodes, new_blocks=pack(new_blocks))
    assert check(device, ready(num_known), step) == is_taken


def test_bytes_that_are_no_pairs_or_too_many_are_left_to_python(device):
    for new_blocks in (b"1234567", pack([1, 2] * (NUM_SLOTS + 1))):
        batch = ready(5)
        sender = Sender(device, batch)
        assert sender.steps.begin(StepInput(1, 1, decodes=bitmap_of([1]), new_blocks=new_blocks), 0) is None
        assert batch.num_known.tolist() == [5] * NUM_SLOTS and set(sender.target.tolist()) == {-7}


SLOT_SETS = st.sampled_from([[], [0], [0, 3, 10], [3, 10], list(range(NUM_SLOTS))])


@given(st.lists(st.tuples(st.sampled_from(["decode", "refuse", "python"]), SLOT_SETS), max_size=30), st.integers(0, 2))
@settings(deadline=None, max_examples=300)
def test_the_device_knows_the_rows_of_every_step_and_each_new_block_once(device, steps, run_ahead):
    """Whatever came before: a step with blocks, one that was refused, one that Python sent."""
    batch = ready(1)
    sender = Sender(device, batch, run_ahead)
    for kind, slots in steps:
        known_before = batch.num_known.copy()
        if kind == "python":
            buffer = sender.staging.take()
            sender.staging.send(buffer, write_step(buffer.ints, NUM_SLOTS, slots, [(0, 0, 1)] * 3))
            continue
        full = [slot for slot in slots if batch.num_known[slot] > batch.num_blocks[slot] * BLOCK_SIZE]
        blocks = [(slot, 1 + slot) for slot in full] + [(NUM_SLOTS, 0)] * (kind == "refuse")
        places = [(slot, int(batch.num_blocks[slot]), 1 + slot) for slot in full]
        if any(batch.num_known[slot] > MAX_MODEL_LEN for slot in slots):
            return
        step = StepInput(1, 1, decodes=bitmap_of(slots), new_blocks=pack(number for pair in blocks for number in pair))
        copied_before = sender.target.clone()
        assert (sender.steps.begin(step, 0) is None) == (kind == "refuse")
        if kind == "refuse":
            assert torch.equal(sender.target, copied_before) and np.array_equal(batch.num_known, known_before)
            continue
        expected = np.empty(len(sender.target), np.int32)
        count = write_step(expected, NUM_SLOTS, slots, places)
        assert sender.target[:count].tolist() == expected[:count].tolist()


def test_a_step_with_just_the_same_slots_is_not_copied_again(device):
    sender = Sender(device, ready(1))
    step = StepInput(1, 1, decodes=bitmap_of([2, 5]))
    assert sender.steps.begin(step, 0)
    sender.target.fill_(-7)
    assert sender.steps.begin(step, 0) and set(sender.target.tolist()) == {-7}
    other = StepInput(1, 1, decodes=bitmap_of([2]))
    assert sender.steps.begin(other, 0) and sender.target[:4].tolist() == [1, 0, 2, -1]


def step_of_two(number):
    """The `number`-th step of slots 2 and 5, from their first token on."""
    blocks = [2, 1, 5, 1] if number and number % BLOCK_SIZE == 0 else []
    return StepInput(1, 1, decodes=bitmap_of([2, 5]), new_blocks=pack(blocks))


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_a_token_of_each_slot_is_fetched_and_kept_while_the_step_may_be_outstanding(device, run_ahead):
    """All but the graph, which an emulation does not have."""
    sender = Sender(device, ready(1), run_ahead)
    native = sender.steps._native
    sender.steps._native = lambda *arguments: native(*arguments[:5], 0, *arguments[6:])
    outstanding = []
    for number in range(3 * run_ahead + 4):
        sender.source[:] = torch.arange(NUM_SLOTS) + 100 * number
        fetched = sender.steps.begin(step_of_two(number), 1)
        outstanding = [*outstanding, (number, fetched)][-run_ahead - 1 :]
        for past, held in outstanding:
            held.event.synchronize()
            assert held.ints[:2].tolist() == [100 * past, 100 * past + 1] and held.ints[2:].tolist() == [0] * 9
    assert sender.steps.begin(StepInput(1, 1, decodes=bitmap_of([2]), new_blocks=b"1"), 1) is None


def test_an_emulation_refuses_graphs_before_it_changes_anything(device):
    batch = ready(1)
    sender = Sender(device, batch)
    with pytest.raises(ValueError, match="no graphs"):
        sender.steps.begin(StepInput(1, 1, decodes=bitmap_of([2])), 1)
    assert batch.num_known.tolist() == [1] * NUM_SLOTS and set(sender.target.tolist()) == {-7}
