"""POST /v1/completions: prompts in every form, echo, log-probabilities, streams."""

import pytest


def choices_text(response):
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def test_a_prompt_is_completed_until_its_end(server):
    answer = server.complete("héllo").json()
    assert answer["object"] == "text_completion" and answer["model"] == "fake" and answer["id"].startswith("cmpl-")
    [choice] = answer["choices"]
    assert choice == {"index": 0, "text": "oll��h", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert answer["usage"] == {
        "prompt_tokens": 6, "completion_tokens": 7, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 2}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ba"]),
        (["ab", "cd", ""], None),
        (["ab", "cd"], ["ba", "dc"]),
        ([64, 65], None),
        ([[64, 65], [66, 67, 68]], None),
    ],
)
def test_prompts_come_in_four_forms(server, prompt, texts):
    if texts is None and "" not in prompt:
        many = prompt if isinstance(prompt[0], list) else [prompt]
        texts = [server.post("/detokenize", tokens=ids[::-1]).json()["prompt"] for ids in many]
    response = server.complete(prompt)
    if texts is None:
        assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"
    else:
        assert choices_text(response) == texts


def test_choices_are_numbered_over_prompts_and_samples(server):
    answer = server.complete(["ab", "cde"], n=2).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "ba"), (1, "ba"), (2, "edc"), (3, "edc")
    ]  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == 5 and answer["usage"]["completion_tokens"] == 3 + 3 + 4 + 4
    events = server.events("/v1/completions", prompt=["ab", "cde"], n=2)
    texts = dict.fromkeys(range(4), "")
    for event in events:
        [choice] = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "ba", 1: "ba", 2: "edc", 3: "edc"}


def test_max_tokens_defaults_to_16(server):
    choice = server.complete("x" * 100).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("x" * 16, "length")


def test_stop_strings_and_stop_tokens(server):
    choice = server.complete("abcdef", stop="dc").json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("fe", "stop", "dc")
    choice = server.complete("abcdef", stop=["x", "c"], include_stop_str_in_output=True).json()["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == ("fedc", "c")
    token = server.post("/tokenize", prompt="d").json()["tokens"][0]
    choice = server.complete("abcdef", stop_token_ids=[token]).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("fe", "stop", token)


def test_a_streamed_stop_string_is_held_back(server):
    events = server.events("/v1/completions", prompt="abcdef", stop="dc")
    assert "".join(event["choices"][0]["text"] for event in events) == "fe"
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "stop"
    assert events[-1]["choices"][0]["stop_reason"] == "dc"


def test_logprobs_are_parallel_lists(server):
    logprobs = server.complete("ab", logprobs=3).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["b", "a", "<|eos|>"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["text_offset"] == [0, 1, 2]
    assert [len(top) for top in logprobs["top_logprobs"]] == [4, 4, 4]
    assert logprobs["top_logprobs"][0]["b"] == -0.5
    assert min(logprobs["top_logprobs"][0].values()) == -9999.0  # minus infinity
    assert server.complete("ab", logprobs=0).json()["choices"][0]["logprobs"]["top_logprobs"][0] == {"b": -0.5}


def test_echo_with_logprobs_scores_the_prompt(server):
    tokens = server.post("/tokenize", prompt="hey").json()["tokens"]
    answer = server.complete([tokens, tokens[:2]], echo=True, logprobs=1, max_tokens=1, temperature=0).json()
    first, second = answer["choices"]
    assert first["text"] == "heyy" and second["text"] == "hee"
    assert first["logprobs"]["tokens"] == ["h", "e", "y", "y"]
    assert first["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert first["logprobs"]["top_logprobs"][0] is None and first["logprobs"]["top_logprobs"][1]["e"] == -0.5
    assert first["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_echo_of_no_new_tokens(server):
    answer = server.complete("hey", echo=True, max_tokens=0, logprobs=1).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hey", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert answer["usage"]["completion_tokens"] == 0
    assert server.complete("hey", max_tokens=0).status_code == 400


def test_streamed_pieces_make_the_whole_answer(server):
    fields = {"prompt": "añb\U0001f600c", "logprobs": 2, "echo": True, "n": 2, "max_tokens": 9, "ignore_eos": True}
    whole = server.post("/v1/completions", **fields).json()
    events = server.events("/v1/completions", **fields, stream_options={"include_usage": True})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    for expected in whole["choices"]:
        pieces = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == expected["index"]]
        assert "".join(piece["text"] for piece in pieces) == expected["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [entry for piece in pieces for entry in piece["logprobs"][name]]
            assert joined == expected["logprobs"][name], name
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [expected["finish_reason"]]
    assert all(event["usage"] is None for event in events[:-1])


def test_every_token_makes_one_event(server):
    events = server.events("/v1/completions", prompt="ab\U0001f600", max_tokens=6)
    assert len(events) == 6
    assert all(len(event["choices"]) == 1 for event in events)
    assert all("usage" not in event for event in events)


def test_prompt_logprobs_and_token_ids_on_request(server):
    choice = server.complete("ab", prompt_logprobs=1, return_token_ids=True).json()["choices"][0]
    tokens = server.post("/tokenize", prompt="ab").json()["tokens"]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1][str(tokens[1])] == {"logprob": -0.5, "rank": 1, "decoded_token": "b"}
    assert choice["prompt_token_ids"] == tokens and choice["token_ids"] == [*tokens[::-1], 256]
    events = server.events("/v1/completions", prompt="ab", return_token_ids=True)
    told = [event["choices"][0].get("prompt_token_ids") for event in events]
    assert told == [choice["prompt_token_ids"], *[None] * (len(events) - 1)]
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == choice["token_ids"]


def test_special_tokens_stay_in_the_text_on_request(server):
    assert server.complete("ab", skip_special_tokens=False).json()["choices"][0]["text"] == "ba"
    answer = server.complete("ab", skip_special_tokens=False, include_stop_str_in_output=True).json()
    assert answer["choices"][0]["text"] == "ba<|eos|>"


def test_a_cache_salt_reaches_the_engine(server):
    answer = server.complete("abc", cache_salt="tenant").json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
