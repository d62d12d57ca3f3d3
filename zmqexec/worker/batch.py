"""The state of every running sequence, by slot, and the rows that a step computes.

Runs in: worker.

A `StepInput` carries only what changed since the last one; everything else is here, in arrays that are allocated once
and that torch and numpy see through the same memory. A sampled token is stored here before anybody else hears of it:
the next step's decode row reads it from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from zmqexec.errors import InternalError
from zmqexec.protocol import Admission, Sampling, StepInput

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

NO_CHUNKS: IntArray = np.empty((0, 2), np.int64)
NO_BLOCKS: Int32Array = np.empty((0, 3), np.int32)


@dataclass(frozen=True)
class Prefill:
    """A row that computes known tokens: positions [start, stop) of `slot`, rows [row, row + stop - start) of the step.

    context_rows  [stop]  int64 cache rows of tokens [0, stop); None where the chunk is the whole context
    """

    slot: int
    start: int
    stop: int
    row: int
    context_rows: torch.Tensor | None


@dataclass(frozen=True)
class Rows:
    """What one step computes. Tokens of the prefills come first, in order, then one for each decode.

    token_ids     [num_tokens]  int64
    positions     [num_tokens]  int64
    num_prompt    [num_tokens]  int64, prompt length of the token's sequence
    slot_mapping  [num_tokens]  int64, the cache row that each token's keys and values go to
    prefills      in the step's order
    decode_slots  [num_decodes]  ascending
    sample_slots  [num_samples]  slots that sample a token, in row order
    sample_rows   [num_samples]  the tokens whose hidden state decides it
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    num_prompt: torch.Tensor
    slot_mapping: torch.Tensor
    prefills: list[Prefill]
    decode_slots: IntArray
    sample_slots: IntArray
    sample_rows: IntArray

    @property
    def num_prefill_tokens(self) -> int:
        """How many of the tokens belong to prefills."""
        return len(self.token_ids) - len(self.decode_slots)

    def one_by_one(self) -> Iterator[Rows]:
        """Each token as a decode step of its own, in an order in which it finds the tokens before it in the cache."""
        slots = [prefill.slot for prefill in self.prefills for _ in range(prefill.start, prefill.stop)]
        for row, slot in enumerate([*slots, *self.decode_slots.tolist()]):
            one = slice(row, row + 1)
            yield Rows(
                token_ids=self.token_ids[one],
                positions=self.positions[one],
                num_prompt=self.num_prompt[one],
                slot_mapping=self.slot_mapping[one],
                prefills=[],
                decode_slots=np.array([slot]),
                sample_slots=np.array([slot]),
                sample_rows=np.zeros(1, np.int64),
            )


class Taken(NamedTuple):
    """What a step says, as `Batch.take_in` took it in.

    chunks      [num_prefills, 2]  (slot, count)
    decodes     [num_decodes]      slots, ascending; the last step's array itself where the same ones decode again
    new_blocks  [n, 3]             int32, (slot, index, block): the block became the index-th of the slot's table
    """

    chunks: IntArray
    decodes: IntArray
    new_blocks: Int32Array


class Batch:
    """Slots [0, max_num_seqs).

    token_ids     [slots, max_model_len + 1]  int32; [0, num_known) are known
    num_known     prompt and sampled tokens
    num_computed  tokens whose keys and values are cached; num_computed < num_known between steps
    num_prompt    the first num_prompt tokens are the prompt
    block_tables  [slots, max_blocks]  int32; [0, num_blocks) are set
    sampling      None: plain greedy
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, num_cache_blocks: int) -> None:
        self._block_size = block_size
        self._num_cache_blocks = num_cache_blocks
        self._max_model_len = max_model_len
        # numpy's zeros take no memory until they are written, however large max_model_len is.
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.num_known = np.zeros(max_num_seqs, np.int64)
        self.num_computed = np.zeros(max_num_seqs, np.int64)
        self.num_prompt = np.zeros(max_num_seqs, np.int64)
        self.block_tables = np.zeros((max_num_seqs, -(-(max_model_len + 1) // block_size)), np.int32)
        self.num_blocks = np.zeros(max_num_seqs, np.int64)
        self.sampling: list[Sampling | None] = [None] * max_num_seqs
        self._bitmap = b""
        self._bitmap_slots: IntArray = np.empty(0, np.int64)

    def begin(self, step: StepInput) -> Rows:
        """Take in what changed and lay out the step's rows. `InternalError` where the step contradicts the state."""
        taken = self.take_in(step)
        return self.rows(taken.chunks, taken.decodes)

    def take_in(self, step: StepInput) -> Taken:
        """Take in what changed."""
        for admission in step.admitted:
            self._admit(admission)
        new_blocks = NO_BLOCKS
        if step.new_blocks:
            new_blocks = self._append_blocks(_pairs(step.new_blocks, "new_blocks", self.block_tables.size))
        decodes = self.decode_slots(step.decodes)
        if not step.prefills:
            self._check_decodes(decodes)
            return Taken(NO_CHUNKS, decodes, new_blocks)
        chunks = _pairs(step.prefills, "prefills", len(self.num_known)).astype(np.int64)
        self._check(chunks, decodes)
        return Taken(chunks, decodes, new_blocks)

    def decode_slots(self, bitmap: bytes) -> IntArray:
        """The slots of a step's bitmap, ascending: the last step's array itself where the same ones decode again."""
        if bitmap != self._bitmap:
            num_slots = len(self.num_known)
            if int.from_bytes(bitmap, "little") >> num_slots:
                raise InternalError(f"a step decodes slots that are not in [0, {num_slots})")
            bits = np.unpackbits(np.frombuffer(bitmap[: num_slots // 8 + 1], np.uint8), bitorder="little")
            self._bitmap, self._bitmap_slots = bitmap, np.flatnonzero(bits)
        return self._bitmap_slots

    def _check_decodes(self, decodes: IntArray) -> None:
        """`_check` of a step without chunks, in a third of the time."""
        known = self.num_known[decodes]
        ok = (self.num_computed[decodes] + 1 == known) & (known <= self._max_model_len)
        ok &= known <= self.num_blocks[decodes] * self._block_size
        if not ok.all():
            self._check(NO_CHUNKS, decodes)  # says what is wrong

    def finish(self, rows: Rows, sampled: IntArray) -> None:
        """Record that `rows` are computed, and append the token sampled by each of `rows.sample_slots`."""
        for prefill in rows.prefills:
            self.num_computed[prefill.slot] = prefill.stop
        self.num_computed[rows.decode_slots] += 1
        slots = rows.sample_slots
        self.token_ids[slots, self.num_known[slots]] = sampled
        self.num_known[slots] += 1

    def _admit(self, admission: Admission) -> None:
        slot = admission.slot
        self._check_slot(slot)
        tokens = _int32(admission.token_ids, "token_ids")
        blocks = _int32(admission.block_table, "block_table")
        if not 0 <= admission.num_computed < len(tokens) <= self._max_model_len:
            raise InternalError(
                f"slot {slot}: {admission.num_computed} computed of {len(tokens)} tokens, "
                f"in a model of {self._max_model_len}"
            )
        if not 0 < admission.num_prompt <= len(tokens) or len(blocks) > self.block_tables.shape[1]:
            raise InternalError(
                f"slot {slot}: {admission.num_prompt} of {len(tokens)} tokens are the prompt, in {len(blocks)} blocks; "
                f"a sequence has at most {self.block_tables.shape[1]}"
            )
        self.token_ids[slot, : len(tokens)] = tokens
        self.num_known[slot] = len(tokens)
        self.num_computed[slot] = admission.num_computed
        self.num_prompt[slot] = admission.num_prompt
        self.num_blocks[slot] = 0
        self.sampling[slot] = admission.sampling
        for block in blocks.tolist():
            self._append_block(slot, block)

    def _append_blocks(self, pairs: Int32Array) -> Int32Array:
        """Append (slot, block) pairs to the block tables; (slot, index, block) of each."""
        slots, blocks = pairs[:, 0], pairs[:, 1]
        most_slot, most_block = pairs.view(np.uint32).max(axis=0).tolist()  # a negative number is a very large one
        if most_slot < len(self.num_known) and most_block < self._num_cache_blocks and np.bincount(slots).max() == 1:
            index = self.num_blocks[slots]
            if index.max() < self.block_tables.shape[1]:
                self.block_tables[slots, index] = blocks
                self.num_blocks[slots] = index + 1
                appended = np.empty((len(pairs), 3), np.int32)
                appended[:, 0], appended[:, 1], appended[:, 2] = slots, index, blocks
                return appended
        # Several for one slot, or one that cannot be.
        places = [(slot, self._append_block(slot, block), block) for slot, block in pairs.tolist()]
        return np.array(places, np.int32)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < len(self.num_known):
            raise InternalError(f"slot {slot} is not in [0, {len(self.num_known)})")

    def _append_block(self, slot: int, block: int) -> int:
        """The block's index in the slot's table."""
        self._check_slot(slot)
        count = int(self.num_blocks[slot])
        if not 0 <= block < self._num_cache_blocks or count >= self.block_tables.shape[1]:
            raise InternalError(
                f"slot {slot}: block {block} as number {count}; the cache has {self._num_cache_blocks} blocks "
                f"and a sequence at most {self.block_tables.shape[1]}"
            )
        self.block_tables[slot, count] = block
        self.num_blocks[slot] = count + 1
        return count

    def _check(self, chunks: IntArray, decodes: IntArray) -> None:
        """A chunk has known tokens, a decode has one, and all of them have a block and a place in the model."""
        slots = np.concatenate([chunks[:, 0], decodes])
        if len(slots) != len(np.unique(slots)) or (slots >= len(self.num_known)).any() or (slots < 0).any():
            raise InternalError(f"a step names slots {slots.tolist()}: they must be distinct and in range")
        stops = self.num_computed[slots] + np.concatenate([chunks[:, 1], np.ones(len(decodes), np.int64)])
        known = self.num_known[slots]
        ok = (stops <= known) & (stops > self.num_computed[slots]) & (known <= self._max_model_len)
        ok &= stops <= self.num_blocks[slots] * self._block_size
        ok[len(chunks) :] &= stops[len(chunks) :] == known[len(chunks) :]
        if not ok.all():
            slot = int(slots[ok.argmin()])
            raise InternalError(
                f"slot {slot} cannot compute up to token {int(stops[ok.argmin()])}: "
                f"{self.num_computed[slot]} computed, {self.num_known[slot]} known, {self.num_blocks[slot]} blocks"
            )

    def rows(self, chunks: IntArray, decodes: IntArray) -> Rows:
        """The rows of a step that `take_in` took in."""
        slots = np.concatenate([chunks[:, 0], decodes])
        counts = np.concatenate([chunks[:, 1], np.ones(len(decodes), np.int64)])
        starts = self.num_computed[slots]
        first_rows = np.cumsum(counts) - counts
        token_slots = np.repeat(slots, counts)
        positions = np.arange(int(counts.sum())) - np.repeat(first_rows - starts, counts)
        samples = starts + counts == self.num_known[slots]
        prefills = [
            Prefill(slot, start, start + count, row, self._cache_rows(slot, start + count) if start else None)
            for slot, start, count, row in zip(
                *(array[: len(chunks)].tolist() for array in (slots, starts, counts, first_rows)), strict=True
            )
        ]
        blocks = self.block_tables[token_slots, positions // self._block_size].astype(np.int64)
        return Rows(
            token_ids=torch.from_numpy(self.token_ids[token_slots, positions].astype(np.int64)),
            positions=torch.from_numpy(positions),
            num_prompt=torch.from_numpy(self.num_prompt[token_slots]),
            slot_mapping=torch.from_numpy(blocks * self._block_size + positions % self._block_size),
            prefills=prefills,
            decode_slots=decodes,
            sample_slots=slots[samples],
            sample_rows=(first_rows + counts - 1)[samples],
        )

    def _cache_rows(self, slot: int, stop: int) -> torch.Tensor:
        positions = np.arange(stop)
        blocks = self.block_tables[slot, positions // self._block_size].astype(np.int64)
        return torch.from_numpy(blocks * self._block_size + positions % self._block_size)


def _int32(packed: bytes, name: str) -> npt.NDArray[np.int32]:
    if len(packed) % 4:
        raise InternalError(f"{name} has {len(packed)} bytes, which are no int32s")
    return np.frombuffer(packed, "<i4")


def _pairs(packed: bytes, name: str, most: int) -> npt.NDArray[np.int32]:
    if len(packed) % 8 or len(packed) > 8 * most:
        raise InternalError(f"{name} has {len(packed)} bytes: it takes 8 for a pair, and at most {most} pairs")
    return np.frombuffer(packed, "<i4").reshape(-1, 2)
