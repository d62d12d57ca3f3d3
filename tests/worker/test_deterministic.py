"""On the CPU a deterministic engine gives a request the same bits in any company, for it computes each token alone."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import VARIANTS, make_checkpoint, random_prompts
from tests.worker.step_driver import StepDriver, ThreadCollectives, make_runner
from zmqexec.protocol import Sampling
from zmqexec.worker import choose as choosing
from zmqexec.worker.logprobs import LogprobsBuilder
from zmqexec.worker.models.llama import LlamaModel

NUM_TOKENS = 10
SAMPLING = Sampling(temperature=0.8, seed=12, logprobs=-1, prompt_logprobs=-1)


@pytest.fixture(scope="module", params=["gqa-tied", "dynamic-ntk"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(path, **VARIANTS[request.param])
    return path


PROMPT, *OTHERS = random_prompts(128, [90, 5, 33, 70], seed=5)


def driver_of(folder, tp_size, **config):
    if tp_size == 1:
        return StepDriver([make_runner(folder, **config)])
    return StepDriver([make_runner(folder, member, **config) for member in ThreadCollectives.group(tp_size)])


def outcome(driver, slot, logprobs=()):
    blocks, offsets = driver.cache_rows(slot)
    rows = blocks * 8 + offsets
    cache = [layer[rows] for runner in driver.runners for layer in runner._cache.layers]
    values = [
        b"".join(entry.values for entry in each)
        for each in (driver.prompt_logprobs[slot], [*logprobs, *driver.logprobs[slot]])
    ]
    return (
        driver.tokens[slot][len(PROMPT) :],
        [layer.contiguous().view(torch.uint8).numpy().tobytes() for layer in cache],
        values,
    )


def alone(folder, tp_size, **config):
    driver = driver_of(folder, tp_size, **config)
    driver.admit(0, PROMPT, SAMPLING)
    driver.generate(NUM_TOKENS)
    return outcome(driver, 0)


def together(folder, tp_size, **config):
    driver = driver_of(folder, tp_size, **config)
    for slot, prompt in enumerate(OTHERS):
        driver.admit(slot, prompt, Sampling(temperature=1.1, seed=slot) if slot else None)
    driver.admit(9, PROMPT, SAMPLING)
    driver.generate(NUM_TOKENS, chunk=13, budget=30)
    return outcome(driver, 9)


def preempted(folder, tp_size, **config):
    driver = driver_of(folder, tp_size, **config)
    driver.admit(0, PROMPT, SAMPLING)
    first = driver.generate(NUM_TOKENS // 2)[0]
    logprobs = driver.logprobs[0]
    driver.release(0)
    driver.admit(1, OTHERS[1])
    driver.admit(3, PROMPT + first, SAMPLING, num_prompt=len(PROMPT))
    driver.generate(NUM_TOKENS - NUM_TOKENS // 2)
    return outcome(driver, 3, logprobs)


@pytest.mark.parametrize(("tp_size", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16"), (1, "float16")])
def test_a_request_has_the_same_bits_in_any_company(folder, tp_size, dtype):
    options = {"deterministic": True, "dtype": dtype}
    expected = alone(folder, tp_size, **options)
    assert len(expected[0]) == NUM_TOKENS
    assert together(folder, tp_size, **options) == expected
    assert preempted(folder, tp_size, **options) == expected


def test_every_call_of_model_and_sampler_is_of_one_token(folder, monkeypatch):
    """What the promise rests on, where this CPU's libraries would have kept it by chance."""
    shapes = set()
    forward, logits = LlamaModel.forward, LlamaModel.logits
    choose, add = choosing._choose, LogprobsBuilder.add

    def seen_forward(self, rows, cache, plan):
        hidden = forward(self, rows, cache, plan)
        shapes.add(("forward", len(hidden), len(rows.prefills)))
        return hidden

    def seen_logits(self, hidden):
        shapes.add(("logits", len(hidden)))
        return logits(self, hidden)

    def seen_choose(logits, filters, uniforms):
        shapes.add(("choose", len(logits)))
        return choose(logits, filters, uniforms)

    def seen_add(self, logits, chosen):
        shapes.add(("logprobs", len(logits)))
        add(self, logits, chosen)

    monkeypatch.setattr(LlamaModel, "forward", seen_forward)
    monkeypatch.setattr(LlamaModel, "logits", seen_logits)
    monkeypatch.setattr(choosing, "_choose", seen_choose)
    monkeypatch.setattr(LogprobsBuilder, "add", seen_add)
    together(folder, 1, deterministic=True)
    assert shapes == {("forward", 1, 0), ("logits", 1), ("choose", 1), ("logprobs", 1)}


def test_a_prefix_from_the_cache_has_the_bits_of_one_computed_anew(folder):
    if "dynamic" in folder.name:
        pytest.skip("prompts beyond the model's own length share no cache")
    driver = driver_of(folder, 1, deterministic=True)
    driver.admit(0, PROMPT[:60])
    driver.generate(2, chunk=7)
    driver.admit_with_prefix(1, PROMPT, 0, 7, SAMPLING)
    driver.generate(NUM_TOKENS)
    tokens, cache, (_, logprobs) = outcome(driver, 1)
    expected = alone(folder, 1, deterministic=True)
    assert (tokens, cache, logprobs) == (expected[0], expected[1], expected[2][1])


def test_its_tokens_are_those_of_an_engine_that_computes_many_at_once(folder):
    """As far as rounding lets them; the weights leave room for it."""
    greedy = Sampling(logprobs=1)
    outputs = []
    for deterministic in (True, False):
        driver = driver_of(folder, 1, deterministic=deterministic)
        for slot, prompt in enumerate([PROMPT, *OTHERS]):
            driver.admit(slot, prompt, greedy)
        outputs.append(driver.generate(NUM_TOKENS))
    assert outputs[0] == outputs[1]
