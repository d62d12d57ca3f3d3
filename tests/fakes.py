"""A model and a worker that need no tensors: what the scheduler's decisions are checked against."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from zmqexec.protocol import StepInput, StepOutput, pack, unpack

VOCAB_SIZE = 50


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: any function of the whole sequence will do."""
    return zlib.crc32(pack(tokens)) % VOCAB_SIZE


def generate(prompt: Sequence[int], max_tokens: int, stop_tokens: Sequence[int] = ()) -> list[int]:
    """The output that any schedule must lead to."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_tokens:
            break
    return tokens[len(prompt) :]


class FakeWorker:
    """Executes steps on a KV cache whose entry for a position is the whole sequence up to it.

    A block given to two sequences, reused too early, or shared with another prefix shows at once: the entry that
    attention would read is not the one of its own sequence.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._entries: list[list[tuple[int, ...] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._tokens: dict[int, list[int]] = {}
        self._computed: dict[int, int] = {}
        self._tables: dict[int, list[int]] = {}

    def run(self, step: StepInput) -> StepOutput:
        for admission in step.admitted:
            self._tokens[admission.slot] = unpack(admission.token_ids)
            self._computed[admission.slot] = admission.num_computed
            self._tables[admission.slot] = unpack(admission.block_table)
        new_blocks = unpack(step.new_blocks)
        for slot, block in zip(new_blocks[::2], new_blocks[1::2], strict=True):
            self._tables[slot].append(block)
        prefills = unpack(step.prefills)
        bitmap = int.from_bytes(step.decodes, "little")
        rows = list(zip(prefills[::2], prefills[1::2], strict=True))
        rows += [(slot, 1) for slot in range(bitmap.bit_length()) if bitmap >> slot & 1]
        for slot, count in rows:
            self._write(slot, count)
        sampled = []
        for slot, _ in rows:
            self._attend(slot)
            if self._computed[slot] == len(self._tokens[slot]):
                sampled.append(next_token(self._tokens[slot]))
                self._tokens[slot].append(sampled[-1])
        return StepOutput(step.epoch, step.step_id, pack(sampled))

    def _write(self, slot: int, count: int) -> None:
        tokens, start = self._tokens[slot], self._computed[slot]
        assert start + count <= len(tokens), "a row computes tokens that do not exist yet"
        for position in range(start, start + count):
            block = self._tables[slot][position // self._block_size]
            self._entries[block][position % self._block_size] = tuple(tokens[: position + 1])
        self._computed[slot] += count

    def _attend(self, slot: int) -> None:
        for position in range(self._computed[slot]):
            block = self._tables[slot][position // self._block_size]
            entry = self._entries[block][position % self._block_size]
            assert entry == tuple(self._tokens[slot][: position + 1]), f"slot {slot} reads foreign KV at {position}"
