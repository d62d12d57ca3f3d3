"""begin_decode and finish_decode of csrc/cuda against a few lines of numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqexec.errors import InternalError
from zmqexec.worker.kernels.decode_state import (
    MOST_ROWS,
    DecodeRows,
    SlotState,
    begin_decode,
    finish_decode,
    step_ints,
    write_step,
)

POISON = -123456789
GUARD = 16


class Guarded:
    """int32 tensors inside poisoned memory, so that a write past their ends shows."""

    def __init__(self, device):
        self.device = device
        self.memories = []

    def tensor(self, *shape, values=None):
        count = int(np.prod(shape))
        memory = torch.full((count + 2 * GUARD,), POISON, dtype=torch.int32, device=self.device)
        inside = memory[GUARD : GUARD + count].view(shape)
        if values is not None:
            inside.copy_(torch.from_numpy(values))
        self.memories.append((memory, count))
        return inside

    def check(self):
        for memory, count in self.memories:
            assert (memory[:GUARD] == POISON).all() and (memory[GUARD + count :] == POISON).all()


class Host:
    """The same state in numpy, and what the kernels should do to it."""

    def __init__(self, rng, num_slots, max_model_len, block_size):
        self.block_size = block_size
        max_blocks = -(-(max_model_len + 1) // block_size)
        self.token_ids = rng.integers(0, 1000, (num_slots, max_model_len + 1), np.int32)
        self.num_known = rng.integers(1, max_model_len + 1, num_slots).astype(np.int32)
        self.block_tables = rng.integers(0, 500, (num_slots, max_blocks), np.int32)

    def begin(self, slots, updates, rows):
        for slot, index, block in updates:
            self.block_tables[slot, index] = block
        num_real = len(slots)
        position = self.num_known[slots] - 1
        blocks = self.block_tables[slots, position // self.block_size]
        expected = {
            "input_ids": (self.token_ids[slots, position], 0),
            "positions": (position, 0),
            "context_lens": (position + 1, 0),
            "slot_mapping": (blocks * self.block_size + position % self.block_size, -1),
            "row_slots": (slots, 0),
        }
        return {name: np.concatenate([real, np.full(rows - num_real, pad)]) for name, (real, pad) in expected.items()}

    def finish(self, slots, tokens):
        self.token_ids[slots, self.num_known[slots]] = tokens
        self.num_known[slots] += 1


def on_device(kernels_impl, host, guarded):
    arrays = (host.token_ids, host.num_known, host.block_tables)
    return SlotState(*(guarded.tensor(*array.shape, values=array) for array in arrays), host.block_size)


def equal(tensor, array):
    return np.array_equal(tensor.cpu().numpy(), array)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    num_slots=st.integers(1, 70),
    max_model_len=st.integers(1, 80),
    block_size=st.sampled_from([1, 7, 16]),
    num_rows=st.integers(0, 70),
    padding=st.integers(0, 40),
    spare_rows=st.integers(0, 3),
    num_updates=st.integers(0, 150),
    steps=st.integers(1, 3),
)
def test_a_step_is_what_numpy_does(
    kernels_impl, seed, num_slots, max_model_len, block_size, num_rows, padding, spare_rows, num_updates, steps
):
    rng = np.random.default_rng(seed)
    host, guarded = Host(rng, num_slots, max_model_len, block_size), Guarded(kernels_impl.device)
    state = on_device(kernels_impl, host, guarded)
    num_rows = min(num_rows, num_slots)
    rows = num_rows + padding
    max_rows = rows + spare_rows
    num_updates = min(num_updates, host.block_tables.size)
    decode = DecodeRows(*(guarded.tensor(rows) for _ in range(5)))
    step, out = guarded.tensor(step_ints(max_rows, num_updates)), guarded.tensor(rows)
    buffer = np.full(step.numel(), POISON, np.int32)
    with kernels_impl.emulated(seed=seed % 2 * seed):
        for _ in range(steps):
            able = rng.permutation(np.flatnonzero(host.num_known <= max_model_len))
            slots = able[:num_rows]
            entries = rng.permutation(host.block_tables.size)[:num_updates]
            updates = np.stack([*np.unravel_index(entries, host.block_tables.shape), rng.integers(0, 500, num_updates)])
            count = write_step(buffer, max_rows, slots, updates.T)
            assert count == buffer.size
            step.copy_(torch.from_numpy(buffer))
            begin_decode(step, max_rows, state, decode, pdl=kernels_impl.pdl)
            for name, expected in host.begin(slots, updates.T, rows).items():
                assert equal(getattr(decode, name), expected), name
            assert equal(state.block_tables, host.block_tables)

            tokens = rng.integers(0, 1000, rows).astype(np.int32)
            finish_decode(torch.from_numpy(tokens).to(kernels_impl.device), decode, state, out, pdl=kernels_impl.pdl)
            host.finish(slots, tokens[: len(slots)])
            assert equal(out, np.concatenate([tokens[: len(slots)], np.full(rows - len(slots), -1)]))
            assert equal(state.token_ids, host.token_ids) and equal(state.num_known, host.num_known)
    guarded.check()


@pytest.mark.parametrize("seed", range(4))
def test_the_most_rows_read_their_own_updates(kernels_impl, seed):
    rng = np.random.default_rng(seed)
    host, guarded = Host(rng, MOST_ROWS, 31, 16), Guarded(kernels_impl.device)
    state = on_device(kernels_impl, host, guarded)
    slots = rng.permutation(MOST_ROWS)
    updates = np.stack([slots, (host.num_known[slots] - 1) // 16, rng.integers(500, 1000, MOST_ROWS)]).T
    updates = np.concatenate([updates, np.stack([slots, (host.num_known[slots] - 1) // 16 ^ 1, slots]).T])
    updates = updates[updates[:, 1] < host.block_tables.shape[1]]
    buffer = np.empty(step_ints(MOST_ROWS, len(updates)), np.int32)
    write_step(buffer, MOST_ROWS, slots, updates)
    decode = DecodeRows(*(guarded.tensor(MOST_ROWS) for _ in range(5)))
    with kernels_impl.emulated(seed=seed):
        begin_decode(torch.from_numpy(buffer).to(kernels_impl.device), MOST_ROWS, state, decode, pdl=kernels_impl.pdl)
    for name, expected in host.begin(slots, updates, MOST_ROWS).items():
        assert equal(getattr(decode, name), expected), name
    guarded.check()


def test_a_graph_of_fewer_rows_leaves_the_rest_alone(kernels_impl):
    host, guarded = Host(np.random.default_rng(0), 8, 20, 4), Guarded(kernels_impl.device)
    state = on_device(kernels_impl, host, guarded)
    buffer = np.empty(step_ints(8, 0), np.int32)
    write_step(buffer, 8, [5, 2], [])
    shared = DecodeRows(*(guarded.tensor(8) for _ in range(5)))
    begin_decode(torch.from_numpy(buffer).to(kernels_impl.device), 8, state, shared.first(4), pdl=kernels_impl.pdl)
    assert shared.row_slots.tolist() == [5, 2, 0, 0] + 4 * [POISON]
    guarded.check()


def test_what_cannot_be_is_padding(kernels_impl):
    """A step or a state that contradicts itself writes nowhere but to the rows."""
    host, guarded = Host(np.random.default_rng(1), 4, 20, 4), Guarded(kernels_impl.device)
    host.num_known[:] = [0, 22, -5, 7]
    state = on_device(kernels_impl, host, guarded)
    step = torch.tensor(
        [7, 6, 0, 1, 2, 3, 4, -1, -2, *(4, 0, 9), *(-1, 0, 9), *(0, 6, 9), *(0, -1, 9), *(1 << 30, 0, 9)]
    )
    step = torch.cat([step, torch.tensor([3, 1, 77])]).to(kernels_impl.device, torch.int32)
    decode = DecodeRows(*(guarded.tensor(7) for _ in range(5)))
    begin_decode(step, 7, state, decode, pdl=kernels_impl.pdl)
    assert decode.context_lens.tolist() == [0, 0, 0, 7, 0, 0, 0]
    assert decode.slot_mapping.tolist() == [-1, -1, -1, 77 * 4 + 2, -1, -1, -1]
    assert decode.row_slots.tolist() == [0, 0, 0, 3, 0, 0, 0]
    host.block_tables[3, 1] = 77
    assert equal(state.block_tables, host.block_tables)

    full = torch.tensor([0, 0, 0, 21, 0, 0, 0], dtype=torch.int32, device=kernels_impl.device)
    decode.context_lens.copy_(full)
    out = guarded.tensor(7)
    finish_decode(full + 5, decode, state, out, pdl=kernels_impl.pdl)
    assert out.tolist() == [-1, -1, -1, 26, -1, -1, -1]
    assert equal(state.token_ids, host.token_ids) and equal(state.num_known, host.num_known)
    guarded.check()


def test_a_step_that_does_not_fit_is_refused():
    buffer = np.empty(step_ints(2, 1), np.int32)
    with pytest.raises(InternalError, match="3 rows and 0 updates do not fit"):
        write_step(buffer, 2, [0, 1, 2], [])
    with pytest.raises(InternalError, match="1 rows and 2 updates do not fit"):
        write_step(buffer, 2, [0], [(0, 0, 1), (0, 1, 2)])


def test_wrong_types_are_refused():
    with pytest.raises(InternalError, match=r"SlotState: .*num_known \[3\] torch.int64"):
        int32 = torch.zeros(3, 4, dtype=torch.int32)
        SlotState(int32, torch.zeros(3, dtype=torch.int64), int32, 16)
