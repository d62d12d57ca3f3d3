"""Truth is transformers: the whole engine, driver and worker processes, gives the same tokens and log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from tests.checkpoints import VARIANTS, greedy, make_checkpoint, random_prompts
from zmqexec import Engine, SamplingParams
from zmqexec.model_config import load_model_config

NUM_TOKENS = 64
LENGTHS = [1, 7, 16, 17, 33, 61, 70, 100] * 3
MAX_MODEL_LEN = 176
BLOCK_SIZE = 8

PLAIN = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
WITH_LOGPROBS = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=-1, prompt_logprobs=-1)


class Truth:
    """A checkpoint on disk, 24 prompts, and what transformers generates for them."""

    def __init__(self, path, name):
        self.path = path
        self.model = make_checkpoint(path, max_shard_size="100KB", **VARIANTS[name])
        config = self.model.config
        self.prompts = random_prompts(config.vocab_size, LENGTHS)
        self.expected = greedy(self.model, self.prompts, NUM_TOKENS)
        # Prompts that begin like an earlier one and go on differently, each with a length of its own.
        self.branches = [
            prompt[: len(prompt) // 2] + tail
            for prompt, tail in zip(self.prompts, random_prompts(config.vocab_size, [9, 20] * 12, seed=2), strict=True)
        ]
        self.branches_expected = greedy(self.model, self.branches, NUM_TOKENS)

    def engine(self, tp_size, **settings):
        settings = {"block_size": BLOCK_SIZE, "max_num_seqs": 32, "executor": "multiproc", **settings}
        return Engine(
            str(self.path), tensor_parallel_size=tp_size, num_threads=1, max_model_len=MAX_MODEL_LEN, **settings
        )


@pytest.fixture(scope="module", params=VARIANTS)
def truth(request, tmp_path_factory):
    return Truth(tmp_path_factory.mktemp(request.param), request.param)


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def assert_same_tokens(outputs, expected):
    assert tokens_of(outputs) == [entry.tokens for entry in expected]


def assert_same_logprobs(output, expected):
    """All positions of prompt and output, all of the vocabulary, to 1e-4."""
    positions = output.prompt_logprobs[1:] + output.outputs[0].logprobs
    assert output.prompt_logprobs[0] is None
    vocab = expected.logprobs.shape[1]
    actual = np.array([[position[token].logprob for token in range(vocab)] for position in positions])
    np.testing.assert_allclose(actual, expected.logprobs, atol=1e-4, rtol=0)
    chosen = output.prompt_token_ids[1:] + output.outputs[0].token_ids
    assert [next(iter(position)) for position in positions] == chosen


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_tokens_and_logprobs_are_those_of_transformers(truth, tp_size):
    with truth.engine(tp_size) as engine:
        outputs = engine.generate(truth.prompts, WITH_LOGPROBS, use_tqdm=False)
        assert_same_tokens(outputs, truth.expected)
        for output, expected in zip(outputs, truth.expected, strict=True):
            assert_same_logprobs(output, expected)

        # The same engine has cached the prompts now.
        assert_same_tokens(engine.generate(truth.prompts, PLAIN, use_tqdm=False), truth.expected)
        outputs = engine.generate(truth.branches, PLAIN, use_tqdm=False)
        assert_same_tokens(outputs, truth.branches_expected)
        assert sum(output.num_cached_tokens for output in outputs) > 100


@pytest.mark.parametrize("tp_size", [1, 2])
def test_small_chunks_and_preemptions_change_no_token(truth, tp_size):
    # A cache for four of the longest sequences, and steps of no more tokens than there are sequences.
    cache_bytes = 4 * MAX_MODEL_LEN * load_model_config(truth.path).kv_bytes_per_token(tp_size, dtype_bytes=4)
    small = {"max_num_seqs": 24, "max_num_batched_tokens": 24, "kv_cache_memory_bytes": cache_bytes}
    with truth.engine(tp_size, **small) as engine:
        assert_same_tokens(engine.generate(truth.prompts, PLAIN, use_tqdm=False), truth.expected)
        assert engine.stats.preemptions > 0


def test_inline_gives_the_same_tokens(truth):
    with truth.engine(1, executor="inline") as engine:
        assert_same_tokens(engine.generate(truth.prompts, PLAIN, use_tqdm=False), truth.expected)
