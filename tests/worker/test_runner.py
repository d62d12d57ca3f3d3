"""The runner computes what transformers computes, however the work is cut and shared out."""

from __future__ import annotations

import numpy as np
import pytest

from tests.checkpoints import VARIANTS, greedy, make_checkpoint, random_prompts
from tests.worker.step_driver import StepDriver, ThreadCollectives, make_runner
from zmqexec.protocol import Sampling

NUM_TOKENS = 24


class Truth:
    """A checkpoint on disk and what transformers generates from it."""

    def __init__(self, path, name):
        self.path = path
        self.model = make_checkpoint(path, **VARIANTS[name])
        self.prompts = random_prompts(self.model.config.vocab_size, [1, 7, 8, 9, 30, 61, 70, 100])
        self.expected = greedy(self.model, self.prompts, NUM_TOKENS)


@pytest.fixture(scope="module", params=VARIANTS)
def truth(request, tmp_path_factory):
    return Truth(tmp_path_factory.mktemp(request.param), request.param)


def runners_of(truth, tp_size, **config):
    if tp_size == 1:
        return [make_runner(truth.path, **config)]
    return [make_runner(truth.path, member, **config) for member in ThreadCollectives.group(tp_size)]


def assert_logprobs_match(driver, slot, prompt_len, expected):
    """`expected` [num_tokens - 1, vocab]: transformers' log-probabilities of every position."""
    entries = driver.prompt_logprobs[slot] + driver.logprobs[slot]
    vocab = expected.shape[1]
    assert all(entry.width == vocab + 1 for entry in entries)
    values = np.concatenate([np.frombuffer(entry.values, "<f4").reshape(-1, vocab + 1) for entry in entries])
    ids = np.concatenate([np.frombuffer(entry.token_ids, "<i4").reshape(-1, vocab + 1) for entry in entries])
    ranks = np.concatenate([np.frombuffer(entry.ranks, "<i4") for entry in entries])
    assert (ids[:, 1:] == np.arange(vocab)).all()
    assert ids[:, 0].tolist() == driver.tokens[slot][1:]
    np.testing.assert_allclose(values[:, 1:], expected, atol=1e-4)
    np.testing.assert_array_equal(values[:, 0], np.take_along_axis(values[:, 1:], ids[:, :1], 1)[:, 0])
    np.testing.assert_array_equal(ranks, (values[:, 1:] > values[:, :1]).sum(1) + 1)
    assert (ranks[prompt_len - 1 :] == 1).all()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_greedy_tokens_and_logprobs_are_those_of_transformers(truth, tp_size):
    driver = StepDriver(runners_of(truth, tp_size))
    for slot, prompt in enumerate(truth.prompts):
        driver.admit(slot, prompt, Sampling(logprobs=-1, prompt_logprobs=-1))
    outputs = driver.generate(NUM_TOKENS)
    for slot, expected in enumerate(truth.expected):
        assert outputs[slot] == expected.tokens
        assert_logprobs_match(driver, slot, len(truth.prompts[slot]), expected.logprobs)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_plain_greedy_in_small_chunks_beside_running_decodes_gives_the_same_tokens(truth, tp_size):
    driver = StepDriver(runners_of(truth, tp_size))
    for slot, prompt in enumerate(truth.prompts):
        driver.admit(slot, prompt)
    outputs = driver.generate(NUM_TOKENS, chunk=7, budget=16)
    assert [outputs[slot] for slot in range(len(truth.prompts))] == [expected.tokens for expected in truth.expected]


def test_a_sequence_rebuilt_after_a_preemption_goes_on_with_the_same_tokens(truth):
    driver = StepDriver(runners_of(truth, 1))
    for slot, prompt in enumerate(truth.prompts):
        driver.admit(slot, prompt)
    first = driver.generate(NUM_TOKENS // 2)
    for slot, prompt in enumerate(truth.prompts):
        driver.release(slot)
        driver.admit(slot, prompt + first[slot], num_prompt=len(prompt))
    second = driver.generate(NUM_TOKENS - NUM_TOKENS // 2, chunk=11)
    for slot, expected in enumerate(truth.expected):
        assert first[slot] + second[slot] == expected.tokens


@pytest.mark.parametrize("chunk", [1000, 5])
def test_a_shared_prefix_gives_the_tokens_of_the_whole_prompt(truth, chunk):
    if truth.model.config.rope_parameters["rope_type"] == "dynamic":
        pytest.skip("cached blocks of a prompt beyond the model's own length fit no other prompt length")
    prompt = truth.prompts[-1]
    driver = StepDriver(runners_of(truth, 1))
    driver.admit(0, prompt[:50])
    driver.generate(1)
    driver.admit_with_prefix(1, prompt, donor=0, num_shared_blocks=6)
    assert driver.generate(NUM_TOKENS, chunk=chunk)[1] == truth.expected[-1].tokens


def test_half_precision_logprobs_stay_close_to_float32(truth):
    for dtype, tolerance in (("bfloat16", 2.0), ("float16", 0.25)):
        driver = StepDriver([make_runner(truth.path, dtype=dtype)])
        prompt = truth.prompts[4]
        driver.admit(0, prompt, Sampling(prompt_logprobs=-1))
        driver.generate(1)
        (entry,) = driver.prompt_logprobs[0]
        values = np.frombuffer(entry.values, "<f4").reshape(len(prompt) - 1, -1)[:, 1:]
        expected = np.exp(truth.expected[4].logprobs[: len(prompt) - 1])
        assert np.abs(np.exp(values) - expected).mean() < tolerance / expected.shape[1]
        assert not np.isnan(values).any()


def test_ranks_that_are_left_without_mlp_rows_or_vocabulary_take_part(tmp_path):
    model = make_checkpoint(tmp_path, intermediate_size=5, vocab_size=5, mlp_bias=True)
    prompts = random_prompts(5, [3, 12])
    driver = StepDriver([make_runner(tmp_path, member) for member in ThreadCollectives.group(4)])
    for slot, prompt in enumerate(prompts):
        driver.admit(slot, prompt)
    outputs = driver.generate(NUM_TOKENS)
    assert [outputs[slot] for slot in range(2)] == [expected.tokens for expected in greedy(model, prompts, NUM_TOKENS)]


def test_a_sampled_sequence_gets_the_same_tokens_alone_in_a_batch_and_across_ranks(truth):
    params = [Sampling(temperature=0.9, top_p=0.95, seed=slot, frequency_penalty=0.3) for slot in range(4)]
    prompts = truth.prompts[2:6]

    def generate(slots, tp_size):
        driver = StepDriver(runners_of(truth, tp_size))
        for slot in slots:
            driver.admit(slot, prompts[slot], params[slot])
        return driver.generate(NUM_TOKENS, chunk=20)

    together = generate(range(4), 1)
    assert together == generate(range(4), 2)
    assert together[2] == generate([2], 1)[2]
    assert len({tuple(tokens) for tokens in together.values()}) == 4
