"""Every field of SamplingParams does what it says, through worker processes; without the field the test would fail."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from zmqexec import CompletionOutput, Engine, Logprob, RequestOutput, SamplingParams

EOS, END = 1, 2
FOUR, TWO = 25, 23
SUM = "12+30="
"""The demo model answers this with the tokens FOUR, TWO, EOS, each with a probability above 0.99."""

OPEN_ENDED = "The driver"
LONG = {"max_tokens": 40, "ignore_eos": True}

TESTED: set[str] = set()
Test = TypeVar("Test")


def covers(*fields: str) -> Callable[[Test], Test]:
    """Notes what a test covers, for the last test of this file."""
    TESTED.update(fields)
    return lambda test: test


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(kv_cache_memory_bytes=32 << 20, max_model_len=256, seed=1, num_threads=1) as engine:
        yield engine


def request(engine: Engine, prompt: Any = SUM, **params: Any) -> RequestOutput:
    (output,) = engine.generate(prompt, SamplingParams(**{"temperature": 0.0, **params}), use_tqdm=False)
    return output


def sample(engine: Engine, prompt: Any = SUM, **params: Any) -> CompletionOutput:
    return request(engine, prompt, **params).outputs[0]


def ranks(output: CompletionOutput) -> list[int]:
    """Of the chosen tokens."""
    assert output.logprobs is not None
    return [position[token].rank for position, token in zip(output.logprobs, output.token_ids, strict=True)]


def weights(position: dict[int, Logprob], temperature: float) -> dict[int, float]:
    """The probabilities at a temperature, from log-probabilities of the whole vocabulary."""
    raised = {token: math.exp(entry.logprob / temperature) for token, entry in position.items()}
    total = sum(raised.values())
    return {token: value / total for token, value in raised.items()}


# ── how a token is chosen ───────────────────────────────────────────────────────────────────────────────────────────


@covers("n")
def test_n_samples_are_numbered_different_and_the_first_is_the_only_one_of_n_1(engine: Engine) -> None:
    params: dict[str, Any] = {"temperature": 1.5, "seed": 3, **LONG}
    outputs = request(engine, OPEN_ENDED, n=3, **params).outputs
    assert [output.index for output in outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in outputs}) == 3
    assert outputs[0].token_ids == sample(engine, OPEN_ENDED, **params).token_ids


@covers("temperature")
def test_temperature_0_takes_the_likeliest_and_a_high_one_nearly_any_token(engine: Engine) -> None:
    assert set(ranks(sample(engine, OPEN_ENDED, logprobs=0, **LONG))) == {1}
    hot = sample(engine, OPEN_ENDED, temperature=1000.0, seed=0, logprobs=0, **LONG)
    assert sum(rank > 100 for rank in ranks(hot)) > 20


@covers("top_k")
def test_top_k_keeps_the_k_likeliest(engine: Engine) -> None:
    params: dict[str, Any] = {"temperature": 50.0, "seed": 0, "logprobs": 0, **LONG}
    assert max(ranks(sample(engine, OPEN_ENDED, top_k=5, **params))) in range(3, 6)
    for everything in (0, -1):
        assert max(ranks(sample(engine, OPEN_ENDED, top_k=everything, **params))) > 100


@covers("top_p")
def test_top_p_keeps_the_smallest_set_that_reaches_it(engine: Engine) -> None:
    params: dict[str, Any] = {"temperature": 4.0, "seed": 0, "logprobs": -1, **LONG}

    def outside(output: CompletionOutput) -> int:
        count = 0
        for position, token in zip(output.logprobs or (), output.token_ids, strict=True):
            likelihood = weights(position, 4.0)
            likelier = sum(value for value in likelihood.values() if value > likelihood[token])
            count += likelier >= 0.5 + 1e-6
        return count

    kept = sample(engine, OPEN_ENDED, top_p=0.5, **params)
    assert outside(kept) == 0 and max(ranks(kept)) > 1
    assert outside(sample(engine, OPEN_ENDED, **params)) > 5


@covers("min_p")
def test_min_p_drops_what_is_less_likely_than_that_share_of_the_likeliest(engine: Engine) -> None:
    params: dict[str, Any] = {"temperature": 4.0, "seed": 0, "logprobs": -1, **LONG}

    def least_share(output: CompletionOutput) -> float:
        shares = []
        for position, token in zip(output.logprobs or (), output.token_ids, strict=True):
            likelihood = weights(position, 4.0)
            shares.append(likelihood[token] / max(likelihood.values()))
        return min(shares)

    assert 0.2 - 1e-6 <= least_share(sample(engine, OPEN_ENDED, min_p=0.2, **params)) < 1.0
    assert least_share(sample(engine, OPEN_ENDED, **params)) < 0.1


@covers("seed")
def test_a_seed_fixes_the_samples_and_without_one_they_differ(engine: Engine) -> None:
    def tokens(seed: int | None) -> list[int]:
        return sample(engine, OPEN_ENDED, temperature=1.5, seed=seed, **LONG).token_ids

    assert tokens(7) == tokens(7)
    assert tokens(2**64 - 1) == tokens(-1) != tokens(7)
    assert tokens(None) != tokens(None)


SEEDED = [
    (OPEN_ENDED, SamplingParams(temperature=1.2, seed=11, max_tokens=30, ignore_eos=True)),
    (SUM, SamplingParams(temperature=2.0, top_p=0.9, seed=12, max_tokens=30, ignore_eos=True, n=2)),
    ([5, 6, 7], SamplingParams(temperature=1.5, top_k=20, seed=13, max_tokens=30, presence_penalty=0.5)),
    ("count: 5 6 7", SamplingParams(temperature=3.0, min_p=0.02, seed=14, max_tokens=30, min_tokens=20)),
]


def test_a_seeded_request_gives_the_same_tokens_alone_in_a_batch_and_on_two_ranks(engine: Engine) -> None:
    def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
        return [[completion.token_ids for completion in output.outputs] for output in outputs]

    prompts, params = [prompt for prompt, _ in SEEDED], [params for _, params in SEEDED]
    alone = tokens([engine.generate([p], own, use_tqdm=False)[0] for p, own in SEEDED])
    others = ["sort: 9 1 =", OPEN_ENDED, [3] * 50]
    crowd = [SamplingParams(temperature=1.0, max_tokens=25)] * len(others)
    assert tokens(engine.generate([*others, *prompts], [*crowd, *params], use_tqdm=False))[len(others) :] == alone
    with Engine(kv_cache_memory_bytes=32 << 20, max_model_len=256, tensor_parallel_size=2, num_threads=1) as two_ranks:
        assert tokens(two_ranks.generate(prompts, params, use_tqdm=False)) == alone


@covers("presence_penalty", "frequency_penalty")
@pytest.mark.parametrize(("presence", "frequency"), [(2.0, 0.0), (0.0, 2.0), (-2.0, -2.0), (1.0, 0.5)])
def test_presence_and_frequency_penalties_lower_tokens_of_the_output(
    engine: Engine, presence: float, frequency: float
) -> None:
    # The likeliest tokens are held close together, so that a penalty decides between them.
    bias = {token: 90.0 + 0.1 * token for token in range(22, 32)}
    params: dict[str, Any] = {"logprobs": -1, "logit_bias": bias, "max_tokens": 60, "ignore_eos": True}
    output = sample(engine, presence_penalty=presence, frequency_penalty=frequency, **params)
    seen: list[int] = []
    for position, token in zip(output.logprobs or (), output.token_ids, strict=True):
        adjusted = {
            other: entry.logprob + bias.get(other, 0.0) - presence * (other in seen) - frequency * seen.count(other)
            for other, entry in position.items()
        }
        assert adjusted[token] == pytest.approx(max(adjusted.values()), abs=1e-4)
        seen.append(token)
    assert output.token_ids != sample(engine, **params).token_ids


@covers("repetition_penalty")
def test_a_repetition_penalty_keeps_tokens_of_prompt_and_output_away(engine: Engine) -> None:
    result = request(engine, repetition_penalty=1e6, max_tokens=12, ignore_eos=True)
    tokens = result.prompt_token_ids + result.outputs[0].token_ids
    assert len(set(tokens)) == len(set(result.prompt_token_ids)) + 12
    assert len(set(sample(engine, max_tokens=12, ignore_eos=True).token_ids)) < 12


@covers("logit_bias")
def test_logit_bias_forces_and_forbids_tokens(engine: Engine) -> None:
    assert sample(engine, logit_bias={9: 100.0}, max_tokens=3).token_ids == [9, 9, 9]
    assert FOUR not in sample(engine, logit_bias={FOUR: -100.0}, max_tokens=3).token_ids


# ── when it ends ────────────────────────────────────────────────────────────────────────────────────────────────────


@covers("max_tokens")
def test_max_tokens_ends_the_output_and_none_means_the_models_length(engine: Engine) -> None:
    output = sample(engine, max_tokens=2)
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([FOUR, TWO], "length", None)
    whole = request(engine, max_tokens=None, ignore_eos=True)
    assert len(whole.prompt_token_ids) + len(whole.outputs[0].token_ids) == 256
    assert whole.outputs[0].finish_reason == "length"


@covers("min_tokens")
@pytest.mark.parametrize("ending", [{}, {"stop": "2"}, {"stop_token_ids": [TWO]}])
def test_min_tokens_holds_off_every_kind_of_end(engine: Engine, ending: dict[str, Any]) -> None:
    assert len(sample(engine, max_tokens=30, **ending).token_ids) <= 3
    output = sample(engine, min_tokens=9, max_tokens=30, **ending)
    assert 9 < len(output.token_ids) <= 30
    assert EOS not in output.token_ids[:9] and END not in output.token_ids[:9]


@covers("stop")
def test_the_output_ends_before_a_stop_string_even_one_that_spans_tokens(engine: Engine) -> None:
    for stop in ("2", ["x", "2"]):
        output = sample(engine, stop=stop)
        assert (output.text, output.finish_reason, output.stop_reason) == ("4", "stop", "2")
    spanning = sample(engine, "count: 17 18 19", stop=" 21 2", max_tokens=32)
    assert (spanning.text, spanning.stop_reason) == (" 20", " 21 2")


@covers("stop_token_ids")
def test_the_output_ends_with_a_stop_token(engine: Engine) -> None:
    output = sample(engine, stop_token_ids=[TWO])
    assert (output.token_ids, output.text) == ([FOUR, TWO], "4")
    assert (output.finish_reason, output.stop_reason) == ("stop", TWO)


@covers("include_stop_str_in_output")
def test_the_stop_string_or_token_stays_in_the_text_if_asked_for(engine: Engine) -> None:
    assert sample(engine, stop="2", include_stop_str_in_output=True).text == "42"
    assert sample(engine, stop_token_ids=[TWO], include_stop_str_in_output=True).text == "42"


@covers("ignore_eos")
def test_the_models_end_token_ends_the_output_unless_ignored(engine: Engine) -> None:
    output = sample(engine, max_tokens=10)
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([FOUR, TWO, EOS], "stop", None)
    ignored = sample(engine, max_tokens=10, ignore_eos=True)
    assert len(ignored.token_ids) == 10 and ignored.finish_reason == "length"
    assert ignored.token_ids[:3] == [FOUR, TWO, EOS]


# ── what is reported ────────────────────────────────────────────────────────────────────────────────────────────────


@covers("logprobs")
@pytest.mark.parametrize("count", [0, 4, -1])
def test_logprobs_of_the_chosen_and_the_likeliest_tokens(engine: Engine, count: int) -> None:
    output = sample(engine, OPEN_ENDED, temperature=3.0, seed=0, logprobs=count, max_tokens=12, ignore_eos=True)
    assert output.logprobs is not None and len(output.logprobs) == 12
    for position, token in zip(output.logprobs, output.token_ids, strict=True):
        assert next(iter(position)) == token
        wanted = range(1, (512 if count == -1 else count) + 1)
        assert {entry.rank for entry in position.values()} == {*wanted, position[token].rank}
        by_rank = sorted(position.values(), key=lambda entry: entry.rank)
        assert all(a.logprob >= b.logprob for a, b in itertools.pairwise(by_rank))
        if count == -1:
            assert len(position) == 512
            assert math.fsum(math.exp(entry.logprob) for entry in position.values()) == pytest.approx(1.0, abs=1e-4)
    assert sample(engine, max_tokens=2).logprobs is None


@covers("prompt_logprobs")
@pytest.mark.parametrize("count", [0, 3, -1])
def test_prompt_logprobs_are_those_of_the_prompts_own_tokens(engine: Engine, count: int) -> None:
    whole = request(engine, "count: 17 18 19 20", prompt_logprobs=count, max_tokens=1)
    assert whole.prompt_logprobs is not None
    first, *others = whole.prompt_logprobs
    assert first is None and len(others) == len(whole.prompt_token_ids) - 1
    for position, token in zip(others, whole.prompt_token_ids[1:], strict=True):
        assert position is not None and next(iter(position)) == token
        likeliest = range(1, (512 if count == -1 else count) + 1)
        assert {entry.rank for entry in position.values()} == {*likeliest, position[token].rank}
    # The same numbers that generating those tokens reports.
    generated = sample(engine, "count: 17 18 19", logprobs=0, max_tokens=3)
    assert generated.token_ids == whole.prompt_token_ids[-3:] and generated.logprobs is not None
    for position, own in zip(whole.prompt_logprobs[-3:], generated.logprobs, strict=True):
        token = next(iter(own))
        assert position is not None and position[token].logprob == pytest.approx(own[token].logprob, abs=1e-4)
    assert request(engine, max_tokens=1).prompt_logprobs is None


@covers("skip_special_tokens")
def test_special_tokens_are_left_out_of_the_text_unless_wanted(engine: Engine) -> None:
    params: dict[str, Any] = {"max_tokens": 3, "ignore_eos": True}
    assert sample(engine, **params).text == "42"
    assert sample(engine, skip_special_tokens=False, **params).text == "42<|eos|>"


def test_every_field_has_a_test_here() -> None:
    assert set(SamplingParams.__struct_fields__) == TESTED
