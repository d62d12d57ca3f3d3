"""The front end alone, fed with updates made by hand: text, stop strings, samples, deltas, aborts."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqexec import Logprob, RequestError, SamplingParams
from zmqexec.demo import CHECKPOINT
from zmqexec.frontend import FrontEnd, OpenRequest, load_tokenizer
from zmqexec.outputs import CompletionOutput
from zmqexec.protocol import EngineInfo, Logprobs, NewRequest, RequestUpdate, pack, unpack
from zmqexec.text import Tokenizer

TOKENIZER = Tokenizer.load(CHECKPOINT)
INFO = EngineInfo(
    model_dir="",
    max_model_len=100,
    vocab_size=512,
    num_blocks=10,
    block_size=16,
    device="cpu",
    dtype="float32",
    eos_token_ids=[1, 2],
)
EOS = 1


def floats(values: list[float]) -> bytes:
    """Packed as in `Logprobs.values`."""
    return np.array(values, "<f4").tobytes()


def digit(value: int) -> int:
    """The token of a digit."""
    return TOKENIZER.encode(str(value), add_special_tokens=False)[0]


class Conversation:
    """One request in a front end, and what the driver is told."""

    def __init__(self, tokenizer: Tokenizer | None = TOKENIZER, **params: Any) -> None:
        self.front = FrontEnd(INFO, tokenizer)
        self.request, self.sequences = self.front.prepare("r", [5, 6], SamplingParams(**params))
        self.front.open(self.request)
        self.aborted: list[str] = []

    def update(self, *tokens: int, index: int = 0, **fields: Any) -> OpenRequest | None:
        moved = None
        update = RequestUpdate(self.request.sequence_id(index), list(tokens), **fields)
        for request, sample, must_abort in self.front.apply([update]):
            moved = request
            if must_abort:
                self.aborted.append(request.sequence_id(sample.index))
        return moved

    def sample(self, index: int = 0) -> CompletionOutput:
        return self.request.output("cumulative").outputs[index]


# ── from a request to sequences ─────────────────────────────────────────────────────────────────────────────────────


def test_a_request_becomes_one_sequence_per_sample() -> None:
    front = FrontEnd(INFO, TOKENIZER)
    params = SamplingParams(n=3, stop="x", prompt_logprobs=1, temperature=0.5, seed=4)
    prompt: Any = {"prompt": "12", "cache_salt": "s"}
    request, sequences = front.prepare("name", prompt, params)
    assert request.prompt == "12" and request.prompt_token_ids == TOKENIZER.encode("12")
    assert len({sequence.request_id for sequence in sequences}) == 3
    for index, sequence in enumerate(sequences):
        assert isinstance(sequence, NewRequest) and sequence.sample_index == index and sequence.cache_salt == "s"
        assert unpack(sequence.prompt_token_ids) == request.prompt_token_ids
        own = sequence.params
        assert (own.n, own.stop, own.temperature, own.seed) == (1, None, 0.5, 4)
        assert own.prompt_logprobs == (1 if index == 0 else None), "once is enough"
    assert front.requests == {}, "prepared is not opened"


def test_names_of_sequences_never_collide_also_when_a_request_id_comes_again() -> None:
    front = FrontEnd(INFO, TOKENIZER)
    names = [
        sequence.request_id
        for name in ("a", "0.0", "1", "a", "")
        for sequence in front.prepare(name, [5], SamplingParams(n=2))[1]
    ]
    assert len(set(names)) == 10


def test_a_salt_given_beside_the_prompt_wins_over_the_one_inside() -> None:
    prompt: Any = {"prompt": "1", "cache_salt": "inside"}
    _, (sequence,) = FrontEnd(INFO, TOKENIZER).prepare("r", prompt, SamplingParams(), cache_salt="beside")
    assert sequence.cache_salt == "beside"


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_text_grows_token_by_token_and_the_end_token_is_not_in_it() -> None:
    talk = Conversation()
    for value, text in ((4, "4"), (2, "42")):
        talk.update(digit(value))
        assert talk.sample().text == text and talk.sample().finish_reason is None
    request = talk.update(EOS, finish_reason="stop")
    assert request is not None and request.finished and talk.front.requests == {}
    assert (talk.sample().text, talk.sample().token_ids[-1], talk.sample().finish_reason) == ("42", EOS, "stop")


def test_a_character_of_several_tokens_appears_when_it_is_whole() -> None:
    tokens = TOKENIZER.encode("é!", add_special_tokens=False)
    assert len(tokens) > 2
    talk = Conversation()
    talk.update(tokens[0])
    assert talk.sample().text == ""
    talk.update(*tokens[1:])
    assert talk.sample().text == "é!"
    unfinished = Conversation()
    unfinished.update(tokens[0], finish_reason="length")
    assert unfinished.sample().text == "\N{REPLACEMENT CHARACTER}"


def expected_stop(text: str, stops: list[str], min_tokens: int) -> tuple[int, str] | None:
    """(where the first stop string ends, the string); one character is one token."""
    for end in range(min_tokens + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(st.integers(0, 2), min_size=1, max_size=14),
    stops=st.lists(st.text("012", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 5),
    seed=st.integers(0, 2**32),
)
def test_stop_strings_end_the_text_however_its_tokens_arrive(
    values: list[int], stops: list[str], include: bool, min_tokens: int, seed: int
) -> None:
    whole = "".join(map(str, values))
    talk = Conversation(stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens)
    chunks = random.Random(seed)
    position = 0
    while position < len(values) and not talk.aborted:
        size = chunks.randint(1, 3)
        tokens = [digit(value) for value in values[position : position + size]]
        position += size
        talk.update(*tokens, finish_reason="length" if position >= len(values) else None)
        # Nothing that may still become a stop string is shown before its time.
        assert whole.startswith(talk.sample().text)
    found = expected_stop(whole, stops, min_tokens)
    output = talk.sample()
    if found is None:
        assert (output.text, output.finish_reason, output.stop_reason) == (whole, "length", None)
        assert not talk.aborted
    else:
        end, stop = found
        assert output.text == whole[: end if include else end - len(stop)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.token_ids == [digit(value) for value in values[:end]]
        assert talk.aborted == ([talk.request.sequence_id(0)] if position < len(values) else []), (
            "the driver goes on unless told"
        )
    assert talk.front.requests == {}


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 511), min_size=1, max_size=20), seed=st.integers(0, 2**32))
def test_deltas_put_together_are_the_cumulative_output(tokens: list[int], seed: int) -> None:
    talk = Conversation(logprobs=0, stop=["zz", "\x00\x00"])
    chunks = random.Random(seed)
    text, seen, logprobs, position = "", [], [], 0
    while position < len(tokens):
        part = tokens[position : position + chunks.randint(1, 3)]
        position += len(part)
        entry = Logprobs(0, 1, pack(part), floats([-0.5] * len(part)), pack([1] * len(part)))
        talk.update(*part, finish_reason="length" if position == len(tokens) else None, logprobs=[entry])
        if chunks.random() < 0.7 or position == len(tokens):
            (delta,) = talk.request.output("delta").outputs
            text, seen = text + delta.text, seen + delta.token_ids
            logprobs += delta.logprobs or []
    output = talk.sample()
    assert (text, seen, logprobs) == (output.text, output.token_ids, output.logprobs)
    assert seen == tokens and text == TOKENIZER.decode([5, 6, *tokens])[len(TOKENIZER.decode([5, 6])) :]
    assert output.cumulative_logprob == pytest.approx(-0.5 * len(tokens))


def test_without_a_tokenizer_there_are_tokens_and_no_text(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert load_tokenizer(tmp_path) is None and "prompts must be token ids" in capsys.readouterr().err
    talk = Conversation(tokenizer=None, logprobs=0)
    talk.update(7, finish_reason="stop", logprobs=[Logprobs(0, 1, pack([7]), floats([-1.0]), pack([3]))])
    assert (talk.sample().text, talk.sample().token_ids) == ("", [7])
    assert talk.sample().logprobs == [{7: Logprob(-1.0, 3, None)}]
    with pytest.raises(RequestError, match="no tokenizer"):
        talk.front.prepare("t", "text", SamplingParams())


# ── samples, log-probabilities, ends ────────────────────────────────────────────────────────────────────────────────


def test_samples_grow_apart_and_the_request_ends_with_the_last() -> None:
    talk = Conversation(n=3)
    talk.update(digit(1), index=2, finish_reason="length")
    talk.update(digit(2), index=0)
    assert not talk.request.finished
    talk.update(digit(3), index=0, finish_reason="stop", stop_reason=digit(3))
    talk.update(digit(4), index=1, finish_reason="abort")
    assert talk.request.finished and talk.front.requests == {}
    outputs = talk.request.output("cumulative").outputs
    assert [(o.index, o.text, o.finish_reason, o.stop_reason) for o in outputs] == [
        (0, "2", "stop", digit(3)),
        (1, "4", "abort", None),
        (2, "1", "length", None),
    ]


def test_log_probabilities_are_ranked_and_the_chosen_token_comes_first() -> None:
    talk = Conversation(logprobs=2, prompt_logprobs=1)
    row = Logprobs(0, 3, pack([7, 9, 8]), floats([-3.0, -0.5, -1.5]), pack([5]))
    prompt = Logprobs(0, 2, pack([6, 4]), floats([-2.0, -0.25]), pack([9]))
    talk.update(7, logprobs=[row], prompt_logprobs=[prompt], num_cached_tokens=1, queue_s=0.5)
    (position,) = talk.sample().logprobs or []
    assert [(token, entry.logprob, entry.rank) for token, entry in position.items()] == [
        (7, -3.0, 5),
        (9, -0.5, 1),
        (8, -1.5, 2),
    ]
    assert talk.sample().cumulative_logprob == -3.0
    output = talk.request.output("cumulative")
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    first = output.prompt_logprobs[1]
    assert first is not None and [(t, e.logprob, e.rank) for t, e in first.items()] == [(6, -2.0, 9), (4, -0.25, 1)]
    assert (output.num_cached_tokens, output.queue_s) == (1, 0.5)


def test_an_aborted_request_names_its_running_sequences_and_ignores_late_updates() -> None:
    talk = Conversation(n=3)
    talk.update(digit(1), index=1, finish_reason="stop")
    assert talk.front.abort("r") == [talk.request.sequence_id(0), talk.request.sequence_id(2)]
    assert talk.request.finished and talk.front.requests == {}
    assert talk.update(digit(2), index=0) is None and talk.sample(0).token_ids == []
    assert talk.front.abort("r") == [] == talk.front.abort("unknown")
    assert [output.finish_reason for output in talk.request.output("cumulative").outputs] == ["abort", "stop", "abort"]


def test_only_the_sample_that_moved_is_in_an_output_that_asks_for_it() -> None:
    talk = Conversation(n=2)
    talk.update(digit(1), index=1)
    (output,) = talk.request.output("delta", talk.request.samples[1]).outputs
    assert (output.index, output.text) == (1, "1")
    assert talk.request.output("delta", talk.request.samples[1]).outputs[0].text == ""
