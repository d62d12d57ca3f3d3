"""Engine as its users call it: prompts in every form, batches and single steps, and what an output holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from zmqexec import CompletionOutput, Engine, RequestError, RequestOutput, SamplingParams
from zmqexec.demo.tasks import QUESTIONS

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
SUM_TOKENS = [0, 22, 23, 16, 24, 21, 34]
"""`12+30=` with the token that begins a text."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(kv_cache_memory_bytes=32 << 20, max_model_len=256, num_threads=1, block_size=4) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_stays_open(engine: Engine) -> Iterator[None]:
    yield
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.stats.num_running == engine.stats.num_waiting == engine.stats.num_blocks_used == 0


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def finish(engine: Engine, max_steps: int = 500) -> dict[str, RequestOutput]:
    """Step until nothing is left; the last output of each request."""
    last: dict[str, RequestOutput] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            return last
        for output in engine.step():
            assert output.request_id not in last or not last[output.request_id].finished, "an output after the end"
            last[output.request_id] = output
    raise AssertionError(f"not finished after {max_steps} steps")


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "prompt",
    [
        "12+30=",
        SUM_TOKENS,
        tuple(SUM_TOKENS),
        {"prompt": "12+30="},
        {"prompt_token_ids": SUM_TOKENS},
        {"prompt": "12+30=", "cache_salt": "tenant"},
    ],
    ids=repr,
)
def test_a_prompt_may_be_text_token_ids_or_a_dict_alone_or_in_a_batch(engine: Engine, prompt: Any) -> None:
    alone = engine.generate(prompt, GREEDY, use_tqdm=False)
    assert texts(alone) == ["42"] and alone[0].prompt_token_ids == SUM_TOKENS
    assert texts(engine.generate([prompt, "1+1=", prompt], GREEDY, use_tqdm=False)) == ["42", "2", "42"]


def test_outputs_come_in_the_order_of_the_prompts_whatever_ends_first(engine: Engine) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (30, 1, 12)]
    outputs = engine.generate(["12+30=", "7+5=", "count: 1 2 3"], params, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["12+30=", "7+5=", "count: 1 2 3"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [30, 1, 12]


def test_params_are_for_all_prompts_or_one_each_or_the_defaults(engine: Engine) -> None:
    short = SamplingParams(temperature=0.0, max_tokens=1)
    assert texts(engine.generate(["12+30=", "12+30="], [short, GREEDY], use_tqdm=False)) == ["4", "42"]
    (output,) = engine.generate("Hello", use_tqdm=False)
    assert 1 <= len(output.outputs[0].token_ids) <= SamplingParams().max_tokens  # type: ignore[operator]
    with pytest.raises(RequestError, match="1 sampling_params for 2 prompts"):
        engine.generate(["1+1=", "1+2="], [GREEDY], use_tqdm=False)


def test_no_prompts_give_no_outputs(engine: Engine) -> None:
    assert engine.generate([], GREEDY, use_tqdm=False) == []


def test_chat_answers_one_conversation_or_several(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=200)
    conversations = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
    assert texts(engine.chat(conversations[0], params, use_tqdm=False)) == [QUESTIONS[0][1]]
    assert texts(engine.chat(conversations, params, use_tqdm=False)) == [answer for _, answer in QUESTIONS]
    (output,) = engine.chat(conversations[0], params, use_tqdm=False)
    assert output.prompt == f"<|bos|><|user|>{QUESTIONS[0][0]}<|end|><|assistant|>"
    assert output.prompt_token_ids[:2] != [0, 0], "the template writes the first token, and only it"


def test_a_progress_bar_counts_the_requests_of_a_long_batch_and_can_be_turned_off(
    engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.generate(["12+30="] * 3, GREEDY)
    assert capsys.readouterr().err == "", "a batch of milliseconds needs none"
    monkeypatch.setattr("zmqexec.engine.PROGRESS_AFTER_S", 0.0)
    engine.generate(["12+30="] * 3, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    engine.generate(["12+30="] * 3, GREEDY)
    shown = capsys.readouterr().err
    assert "Requests" in shown and "3/3" in shown


# ── outputs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_field_of_an_output_is_right(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=16, logprobs=1, prompt_logprobs=0, n=2)
    (output,) = engine.generate("12+30=", params, use_tqdm=False)
    request = {field.name: getattr(output, field.name) for field in fields(RequestOutput)}
    assert isinstance(request.pop("request_id"), str)
    assert 0.0 < request.pop("queue_s") < 30.0
    prompt_logprobs = request.pop("prompt_logprobs")
    assert [list(position or ()) for position in prompt_logprobs] == [[], *([token] for token in SUM_TOKENS[1:])]
    first, second = request.pop("outputs")
    assert request == {
        "prompt": "12+30=",
        "prompt_token_ids": SUM_TOKENS,
        "finished": True,
        "num_cached_tokens": 0,
    }
    for index, sample in enumerate((first, second)):
        completion = {field.name: getattr(sample, field.name) for field in fields(CompletionOutput)}
        logprobs = completion.pop("logprobs")
        assert [next(iter(position)) for position in logprobs] == sample.token_ids
        assert [position[sample.token_ids[i]].decoded_token for i, position in enumerate(logprobs)] == [
            "4",
            "2",
            "<|eos|>",
        ]
        chosen = [position[token].logprob for position, token in zip(logprobs, sample.token_ids, strict=True)]
        assert completion.pop("cumulative_logprob") == pytest.approx(math.fsum(chosen), abs=1e-6)
        assert completion == {
            "index": index,
            "text": "42",
            "token_ids": [25, 23, 1],
            "finish_reason": "stop",
            "stop_reason": None,
        }


def test_request_ids_are_those_given_or_new_ones(engine: Engine) -> None:
    outputs = engine.generate(["1+1=", "1+2="], GREEDY, use_tqdm=False)
    outputs += engine.generate(["1+1=", "1+2="], GREEDY, use_tqdm=False)
    assert len({output.request_id for output in outputs}) == 4
    engine.add_request("mine", "1+1=", GREEDY)
    assert set(finish(engine)) == {"mine"}


def test_a_prompt_of_token_ids_has_no_text(engine: Engine) -> None:
    (output,) = engine.generate([SUM_TOKENS], GREEDY, use_tqdm=False)
    assert output.prompt is None


# ── step by step ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_requests_are_stepped_to_their_end_with_all_tokens_so_far(engine: Engine) -> None:
    engine.add_request("a", "12+30=", GREEDY)
    engine.add_request("b", "count: 1 2 3", SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    lengths: dict[str, list[int]] = {"a": [], "b": []}
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            lengths[output.request_id].append(len(output.outputs[0].token_ids))
            last[output.request_id] = output
            assert output.finished == (output.outputs[0].finish_reason is not None)
    assert lengths == {"a": [1, 2, 3], "b": [1, 2, 3, 4, 5]}
    assert last["a"].outputs[0].text == "42" and last["a"].finished and last["b"].finished
    assert engine.step() == []


def test_the_request_is_finished_when_its_last_sample_is(engine: Engine) -> None:
    # Every token is either the end or token 9, by chance: the samples end at different lengths.
    params = SamplingParams(n=6, temperature=20.0, top_k=2, logit_bias={1: 100.0, 9: 100.0}, seed=2, max_tokens=40)
    engine.add_request("n", "12+30=", params)
    unfinished_after_an_end = False
    for _ in range(200):
        for output in engine.step():
            ended = [sample.finish_reason is not None for sample in output.outputs]
            assert output.finished == all(ended)
            unfinished_after_an_end |= any(ended) and not all(ended)
        if not engine.has_unfinished_requests():
            break
    assert unfinished_after_an_end


def test_an_aborted_request_is_silent_and_the_others_go_on(engine: Engine) -> None:
    expected = engine.generate("The", ENDLESS, use_tqdm=False)[0].outputs[0].token_ids
    for name in ("kept", "dropped", "also dropped"):
        engine.add_request(name, "The", ENDLESS)
    for _ in range(5):
        engine.step()
    engine.abort_request("dropped")
    engine.abort_request(["also dropped", "unknown"])
    last = finish(engine)
    assert set(last) == {"kept"} and last["kept"].outputs[0].token_ids == expected
    engine.add_request("dropped", "12+30=", GREEDY)  # the name is free again
    assert finish(engine)["dropped"].outputs[0].text == "42"


@pytest.mark.parametrize("steps_before", [0, 1, 5])
def test_the_name_of_an_aborted_request_can_be_used_at_once(engine: Engine, steps_before: int) -> None:
    engine.add_request("name", "The", ENDLESS)
    for _ in range(steps_before):
        engine.step()
    engine.abort_request("name")
    engine.add_request("name", "12+30=", GREEDY)
    output = finish(engine)["name"]
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("42", "stop")


def test_the_last_request_can_be_aborted_and_nothing_is_left(engine: Engine) -> None:
    engine.add_request("only", "The", ENDLESS)
    engine.step()
    engine.abort_request("only")
    assert finish(engine) == {}
    assert not engine.has_unfinished_requests()


def test_open_requests_survive_a_generate_in_between(engine: Engine) -> None:
    expected = engine.generate("The", ENDLESS, use_tqdm=False)[0].outputs[0].token_ids
    engine.add_request("long", "The", ENDLESS)
    engine.add_request("short", "12+30=", GREEDY)
    engine.step()
    longer = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    assert len(engine.generate("7+5=", longer, use_tqdm=False)[0].outputs[0].token_ids) == 20
    first = {output.request_id: output for output in engine.step()}
    assert first["short"].outputs[0].text == "42" and first["short"].finished
    assert len(first["long"].outputs[0].token_ids) >= 20
    last = finish(engine)
    assert set(last) == {"long"} and last["long"].finished and last["long"].outputs[0].token_ids == expected


def test_a_request_aborted_after_a_generate_is_silent_too(engine: Engine) -> None:
    engine.add_request("dropped", "The", ENDLESS)
    engine.generate("7+5=", GREEDY, use_tqdm=False)
    engine.abort_request("dropped")
    assert finish(engine) == {}


def test_an_interrupted_generate_leaves_nothing_open(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step, left = engine._driver.step, iter([True] * 3)

    def interrupted() -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine._driver, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(["The", "12+30="], ENDLESS, use_tqdm=False)
    assert finish(engine) == {}
    assert texts(engine.generate("12+30=", GREEDY, use_tqdm=False)) == ["42"]


def test_a_request_id_in_use_is_refused(engine: Engine) -> None:
    engine.add_request("same", "12+30=", GREEDY)
    with pytest.raises(RequestError, match="request_id='same' is in use"):
        engine.add_request("same", "1+1=", GREEDY)
    assert finish(engine)["same"].outputs[0].text == "42"


# ── the prefix cache ────────────────────────────────────────────────────────────────────────────────────────────────


def cached(engine: Engine, prompt: Any, **params: Any) -> int:
    own = SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **params})
    return engine.generate(prompt, own, use_tqdm=False)[0].num_cached_tokens


def test_a_repeated_prefix_comes_from_the_cache_within_one_salt(engine: Engine) -> None:
    prompt = [40 + i for i in range(18)]
    for salt in ("a", "b", None):
        salted: Any = {"prompt_token_ids": prompt, "cache_salt": salt} if salt else prompt
        assert cached(engine, salted) == 0
        assert cached(engine, salted) == 16  # all full blocks of 4
    assert cached(engine, [*prompt[:9], 99, *prompt[10:]]) == 8
    assert cached(engine, prompt[:16]) == 12  # the last token is always computed
    engine.add_request("salted", prompt, GREEDY, cache_salt="b")
    assert finish(engine)["salted"].num_cached_tokens == 16


def test_cached_prefixes_do_not_change_the_tokens(engine: Engine) -> None:
    prompt: Any = {"prompt": "count: 31 32 33", "cache_salt": "fresh"}
    first, second = (engine.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert second.num_cached_tokens > 0 == first.num_cached_tokens
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
