"""A driver of the smallest kind for runner tests: one sequence per slot, blocks handed out in a scrambled order."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zmqexec.config import EngineConfig
from zmqexec.protocol import Admission, LoadModel, Logprobs, Sampling, StepInput, StepOutput, pack, unpack
from zmqexec.worker.collectives import Collectives, LocalCollectives
from zmqexec.worker.runner import ModelRunner

NUM_BLOCKS = 512


def make_runner(
    model_dir: Path,
    collectives: Collectives | None = None,
    *,
    max_model_len: int = 256,
    dtype: str = "float32",
    num_blocks: int = NUM_BLOCKS,
    **config: Any,
) -> ModelRunner:
    """A loaded runner with its cache allocated; every cache row that was never written is NaN."""
    collectives = collectives or LocalCollectives()
    settings = {"block_size": 8, "max_num_seqs": 32, **config, "tensor_parallel_size": collectives.tp_size}
    load = LoadModel(
        epoch=1,
        config=EngineConfig(**settings),
        model_dir=str(model_dir),
        dtype=dtype,
        max_model_len=max_model_len,
        num_threads=1,
    )
    runner = ModelRunner(load, collectives)
    runner.load()
    runner.init_cache(num_blocks)
    for layer in runner._cache.layers:
        layer.fill_(torch.nan)
    return runner


class StepDriver:
    """Admits sequences and runs steps on one runner, or on the runners of all ranks at once."""

    def __init__(self, runners: list[ModelRunner], block_size: int = 8, num_blocks: int = NUM_BLOCKS) -> None:
        self.runners = runners
        self._block_size = block_size
        self._free = list(range(num_blocks))
        random.Random(0).shuffle(self._free)
        self._step_id = 0
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self._admitted: dict[int, int] = {}  # tokens that prefills compute, as the scheduler has it
        self._blocks: dict[int, list[int]] = {}
        self._admissions: list[Admission] = []
        self.logprobs: dict[int, list[Logprobs]] = {}
        self.prompt_logprobs: dict[int, list[Logprobs]] = {}

    def admit(
        self, slot: int, tokens: list[int], sampling: Sampling | None = None, *, num_prompt: int | None = None
    ) -> None:
        """Put a sequence into `slot` with the next step."""
        blocks = [self._free.pop() for _ in range(-(-len(tokens) // self._block_size))]
        self.tokens[slot], self._blocks[slot], self.computed[slot] = list(tokens), blocks, 0
        self._admitted[slot] = len(tokens)
        self.logprobs[slot], self.prompt_logprobs[slot] = [], []
        self._admissions.append(
            Admission(
                slot=slot,
                token_ids=pack(tokens),
                num_prompt=len(tokens) if num_prompt is None else num_prompt,
                num_computed=0,
                block_table=pack(blocks),
                sampling=sampling,
            )
        )

    def admit_with_prefix(
        self, slot: int, tokens: list[int], donor: int, num_shared_blocks: int, sampling: Sampling | None = None
    ) -> None:
        """As `admit`, with the first blocks of `donor`'s cache."""
        shared = self._blocks[donor][:num_shared_blocks]
        own = [self._free.pop() for _ in range(-(-len(tokens) // self._block_size) - num_shared_blocks)]
        self.tokens[slot], self._blocks[slot] = list(tokens), shared + own
        self.computed[slot] = num_shared_blocks * self._block_size
        self._admitted[slot] = len(tokens)
        self.logprobs[slot], self.prompt_logprobs[slot] = [], []
        self._admissions.append(
            Admission(slot, pack(tokens), len(tokens), self.computed[slot], pack(shared + own), sampling)
        )

    def cache_rows(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The block of each computed token of `slot`, and its place in the block."""
        positions = torch.arange(self.computed[slot])
        return torch.tensor(self._blocks[slot])[positions // self._block_size], positions % self._block_size

    def release(self, slot: int) -> None:
        """Give the slot's blocks back; the runner is not told."""
        self._free.extend(self._blocks.pop(slot))
        del self.tokens[slot], self.computed[slot]

    def step(self, prefills: dict[int, int], decodes: list[int]) -> StepOutput:
        """Run one step on every rank; all must return the same tokens, which are appended to their sequences."""
        new_blocks = []
        for slot in decodes:
            if self.computed[slot] // self._block_size == len(self._blocks[slot]):
                self._blocks[slot].append(self._free.pop())
                new_blocks += [slot, self._blocks[slot][-1]]
        bitmap = np.zeros(max(decodes, default=-1) + 1, np.uint8)
        bitmap[decodes] = 1
        step = StepInput(
            epoch=1,
            step_id=self._step_id,
            decodes=np.packbits(bitmap, bitorder="little").tobytes(),
            prefills=pack(number for item in prefills.items() for number in item),
            new_blocks=pack(new_blocks),
            admitted=self._admissions,
        )
        self._admissions = []
        self._step_id += 1
        output = self._run(step)
        self._take(output, prefills, sorted(decodes))
        return output

    def generate(self, num_tokens: int, chunk: int = 1 << 20, budget: int = 1 << 20) -> dict[int, list[int]]:
        """Run all sequences until each has `num_tokens` of output; returns the output by slot.

        chunk   tokens of one prefill per step
        budget  tokens of all prefills per step
        """
        starts = {slot: len(tokens) for slot, tokens in self.tokens.items()}
        while True:
            waiting = [slot for slot, tokens in self.tokens.items() if len(tokens) < starts[slot] + num_tokens]
            if not waiting:
                return {slot: tokens[starts[slot] :] for slot, tokens in self.tokens.items()}
            prefills, decodes, left = {}, [], budget
            for slot in waiting:
                missing = len(self.tokens[slot]) - self.computed[slot]
                if missing == 1 and len(self.tokens[slot]) > self._admitted[slot]:
                    decodes.append(slot)
                elif left:
                    prefills[slot] = min(missing, chunk, left)
                    left -= prefills[slot]
            self.step(prefills, decodes)

    def _run(self, step: StepInput) -> StepOutput:
        if len(self.runners) == 1:
            return self.runners[0].run(step)
        outputs: list[StepOutput | BaseException | None] = [None] * len(self.runners)

        def run(rank: int) -> None:
            try:
                outputs[rank] = self.runners[rank].run(step)
            except BaseException as error:
                outputs[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self.runners))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for output in outputs:
            if not isinstance(output, StepOutput):
                raise output or TimeoutError("a rank did not finish its step")
            assert output.token_ids == outputs[0].token_ids
        return outputs[0]

    def _take(self, output: StepOutput, prefills: dict[int, int], decodes: list[int]) -> None:
        sampling = []
        for slot, count in prefills.items():
            self.computed[slot] += count
            if self.computed[slot] == len(self.tokens[slot]):
                sampling.append(slot)
        for slot in decodes:
            self.computed[slot] += 1
            sampling.append(slot)
        sampled = unpack(output.token_ids)
        assert len(sampled) == len(sampling)
        for slot, token in zip(sampling, sampled, strict=True):
            self.tokens[slot].append(token)
        for entry in output.logprobs:
            self.logprobs[sampling[entry.row]].append(entry)
        for entry in output.prompt_logprobs:
            self.prompt_logprobs[list(prefills)[entry.row]].append(entry)


class ThreadCollectives:
    """Ranks that are threads of one process: the sum and the gather are taken in rank order."""

    def __init__(self, rank: int, tp_size: int, shared: dict[str, Any]) -> None:
        self.rank = rank
        self.tp_size = tp_size
        self._shared = shared

    @classmethod
    def group(cls, tp_size: int) -> list[ThreadCollectives]:
        shared = {"barrier": threading.Barrier(tp_size, timeout=30), "parts": [None] * tp_size}
        return [cls(rank, tp_size, shared) for rank in range(tp_size)]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._shared["parts"][self.rank] = tensor
        self._shared["barrier"].wait()
        gathered = torch.stack(self._shared["parts"])
        self._shared["barrier"].wait()
        return gathered

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.all_gather(tensor).sum(0)

    def close(self) -> None:
        self._shared["barrier"].abort()
