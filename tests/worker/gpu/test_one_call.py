"""A greedy decode step that is one call of the extension gives the same tokens as one whose parts Python calls."""

from __future__ import annotations

import ctypes
import random
from types import SimpleNamespace

import pytest
import torch

from tests.checkpoints import make_checkpoint, random_prompts
from tests.worker.gpu.emulation import NUM_BLOCKS, EmulatedDevice, make_gpu_runner
from tests.worker.step_driver import StepDriver
from zmqexec.protocol import Admission, Sampling, StepInput, pack, unpack
from zmqexec.worker.gpu.graphs import DecodeGraphs

BLOCK_SIZE = 16
NUM_SLOTS = 6
VOCAB = 96
SIZES = [1, 2, 4, NUM_SLOTS]
SAMPLED_WORD = 10
"""Of `decode_step`'s fixed words, the address of what a step sampled."""


class GraphDevice(EmulatedDevice):
    """Its graphs launch their work anew: by `replay`, and where `decode_step` would launch them.

    launched  the number of rows that each graph was captured for which `decode_step` launched
    """

    def __init__(self):
        super().__init__()
        self._emulated = self.native
        self.native = SimpleNamespace(**{**vars(self._emulated), "decode_step": self._decode_step})
        self._replays = []
        self.launched = []

    def capture(self, launch, pool):
        replay = torch.inference_mode()(launch)
        self._replays.append(replay)
        return SimpleNamespace(handle=len(self._replays), replay=replay), replay()

    def _decode_step(self, fixed, decodes, new_blocks, rows_known, staged, graph, tokens, event):
        copied = self._emulated.decode_step(fixed, decodes, new_blocks, rows_known, staged, 0, 0, event)
        if copied >= 0 and graph:
            self.launched.append(len(self._replays[graph - 1]()))
            sampled = (ctypes.c_int64 * (SAMPLED_WORD + 1)).from_address(fixed)[SAMPLED_WORD]
            count = int.from_bytes(decodes, "little").bit_count()
            self._emulated.copy_async(tokens, sampled, 4 * count, event, 0)
        return copied


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    make_checkpoint(path, hidden_size=128, vocab_size=VOCAB, **heads)
    return path


def make_runner(folder, device, **config):
    runner = make_gpu_runner(folder, device=device, max_num_seqs=NUM_SLOTS, **config)
    if isinstance(device, GraphDevice):
        runner._greedy_graphs = DecodeGraphs(device, runner._decode_greedily, SIZES)
    return runner


def outputs_of(folder, device, seed):
    """What sequences sample that come, grow over a block's end and go; the later ones are of all kinds."""
    rng = random.Random(seed)
    driver = StepDriver([make_runner(folder, device)], BLOCK_SIZE, NUM_BLOCKS)
    outputs = []
    for prompt in random_prompts(VOCAB, [1, 7, 16, 17, 14, 15, 33]):
        free = [slot for slot in range(NUM_SLOTS) if slot not in driver.tokens]
        if not free or (driver.tokens and rng.random() < 0.4):
            free.append(rng.choice(list(driver.tokens)))
            driver.release(free[-1])
        others = [Sampling(temperature=1.0, seed=3), Sampling(logprobs=1)] if len(outputs) > 3 else []
        sampling = rng.choice([None, *others])
        driver.admit(rng.choice(free), prompt, sampling)
        outputs.append(driver.generate(rng.randrange(1, 6)))
    return outputs


@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_are_the_same_whoever_else_comes_and_goes(folder, seed):
    device = GraphDevice()
    assert outputs_of(folder, device, seed) == outputs_of(folder, EmulatedDevice(), seed)
    assert len(device.launched) > 5


def test_a_step_takes_the_smallest_graph_that_holds_it_and_results_outlive_the_next_launch(folder):
    def tokens_of(device):
        runner = make_runner(folder, device)
        prompts = random_prompts(VOCAB, [3, 5, 4])
        admissions = [
            Admission(2 * slot, pack(prompt), len(prompt), 0, pack([slot])) for slot, prompt in enumerate(prompts)
        ]
        prefills = pack(number for slot, prompt in enumerate(prompts) for number in (2 * slot, len(prompt)))
        pending = [runner.submit(StepInput(1, 0, prefills=prefills, admitted=admissions))]
        tokens = []
        for number, decodes in enumerate([b"\x15", b"\x15", b"\x04", b"\x11", b"\x15"], 1):
            pending.append(runner.submit(StepInput(1, number, decodes=decodes)))
            tokens.append(unpack(pending.pop(0).result().token_ids))
        return [*tokens, unpack(pending.pop().result().token_ids)]

    device = GraphDevice()
    assert tokens_of(device) == tokens_of(EmulatedDevice())
    assert device.launched == [4, 4, 1, 2, 4]


@pytest.mark.gpu
def test_on_a_gpu_the_call_launches_what_a_replay_does(folder):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    from zmqexec.worker.gpu.device import CudaDevice

    def tokens_of(is_one_call):
        runner = make_runner(folder, CudaDevice(0), dtype="bfloat16")
        steps, native, graphs = runner._decode_steps, runner._decode_steps._native, []
        steps._native = lambda *arguments: graphs.append(arguments[5]) or native(*arguments)
        if not is_one_call:
            runner._greedy_graphs.handle = lambda num_rows: 0
        driver = StepDriver([runner], BLOCK_SIZE, NUM_BLOCKS)
        for slot, prompt in enumerate(random_prompts(VOCAB, [1, 7, 16, 15])):
            driver.admit(slot, prompt)
        tokens = driver.generate(40)
        assert len(graphs) == 39 and all(map(bool, graphs)) == is_one_call and len(set(graphs)) == 1
        return tokens

    assert tokens_of(True) == tokens_of(False)
