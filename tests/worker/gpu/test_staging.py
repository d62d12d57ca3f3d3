"""A step that only decodes is taken in by the extension exactly as by `Batch` and `write_step`."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.gpu.emulation import EmulatedDevice
from zmqexec.errors import InternalError
from zmqexec.protocol import StepInput, pack
from zmqexec.worker.batch import Batch
from zmqexec.worker.gpu.staging import Buffer, DecodeSteps
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


def check(device, batch, step):
    before, expected = copy.deepcopy(batch), copy.deepcopy(batch)
    buffer = Buffer(step_ints(NUM_SLOTS, NUM_SLOTS) + 1, device)
    buffer.ints[:] = -7
    count = DecodeSteps(batch, NUM_CACHE_BLOCKS, BLOCK_SIZE, device.native).stage(step, buffer)
    ints = by_python(expected, step)
    assert buffer.ints[-1] == -7
    if ints is None:
        assert count == -1
        expected = before
    else:
        assert buffer.ints[:count].tolist() == ints.tolist()
    for name in ("num_known", "num_computed", "num_blocks"):
        assert getattr(batch, name).tolist() == getattr(expected, name).tolist()
    assert tables_of(batch) == tables_of(expected)
    return count


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
    assert (check(device, ready(num_known), step) >= 0) == is_taken


def test_bytes_that_are_no_pairs_or_too_many_are_left_to_python(device):
    for new_blocks in (b"1234567", pack([1, 2] * (NUM_SLOTS + 1))):
        batch = ready(5)
        buffer = Buffer(step_ints(NUM_SLOTS, NUM_SLOTS), device)
        steps = DecodeSteps(batch, NUM_CACHE_BLOCKS, BLOCK_SIZE, device.native)
        assert steps.stage(StepInput(1, 1, decodes=bitmap_of([1]), new_blocks=new_blocks), buffer) == -1
        assert batch.num_known.tolist() == [5] * NUM_SLOTS
