"""Mistakes of clients: refused with a 400 in OpenAI's shape, or forgiven where clients differ."""

import json
import logging

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqexec.server.openai import MAX_STOPS, CompletionRequest, decode_request, sampling_params

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "abc"}]


def refusal(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    assert len(error["message"]) < 1100
    return error


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1}, {"temperature": "hot"}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -2}, {"top_k": 1.5},
        {"min_p": 2}, {"n": 0}, {"n": True}, {"max_tokens": 0}, {"max_tokens": -1}, {"min_tokens": -1},
        {"presence_penalty": 3}, {"frequency_penalty": -3}, {"repetition_penalty": 0}, {"seed": 1.5}, {"seed": 2**70},
        {"stop": ""}, {"stop": [""]}, {"stop": [1]}, {"stop": 3}, {"stop_token_ids": [-1]}, {"stop_token_ids": [10**6]},
        {"logit_bias": {"1": 101}}, {"logit_bias": {"x": 1}}, {"logit_bias": {"99999": 1}}, {"logprobs": 2},
        {"top_logprobs": 3}, {"stream": "yes"}, {"stream_options": {"include_usage": True}}, {"ignore_eos": 1},
        {"prompt_logprobs": 1, "stream": True}, {"user": 3}, {"messages": None}, {"messages": "hi"},
        {"messages": []}, {"messages": [{}]}, {"messages": [{"role": 1, "content": "x"}]},
        {"messages": [{"role": "judge", "content": "x"}]}, {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        {"tools": [{"type": "function"}]}, {"tool_choice": "required"}, {"response_format": {"type": "json_object"}},
        {"guided_json": {"type": "object"}}, {"best_of": 3}, {"continue_final_message": True},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)  # fmt: skip
def test_a_wrong_value_is_refused_and_its_field_named(server, fields):
    error = refusal(server.post(CHAT, **{"messages": USER} | fields))
    assert error["type"] == "BadRequestError"
    assert error["param"] in fields


@pytest.mark.parametrize(
    "prompt", [None, "", [], [[]], [1, "a"], [[1], "a"], [1.5], [-1], [260], [[1, 999]], {"a": 1}, 3]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_prompt_is_refused(server, prompt, stream):
    error = refusal(server.complete(prompt, stream=stream))
    assert error["param"] == "prompt"


def test_one_wrong_prompt_of_many_refuses_the_request(server):
    for stream in (False, True):
        assert refusal(server.complete(["ab", "x" * 5000, "cd"], stream=stream))["param"] == "prompt"


def test_more_choices_than_a_request_may_have_are_refused(server):
    assert refusal(server.complete(["a"] * 65, n=1024))["param"] == "prompt"


def test_a_prompt_longer_than_the_model_is_refused_with_both_lengths(server):
    message = refusal(server.complete("x" * 4096))["message"]
    assert "4096" in message and "4095" in message


def test_null_is_accepted_for_every_optional_field(server):
    for path, required in ((CHAT, {"messages": USER}), ("/v1/completions", {"prompt": "abc"})):
        schema = "ChatRequest" if path == CHAT else "CompletionRequest"
        names = server.http.get("/openapi.json").json()["components"]["schemas"][schema]["properties"]
        nothing = dict.fromkeys([*names, "tools", "response_format", "anything"])
        assert server.post(path, **nothing | required).status_code == 200
    options = {"include_usage": None, "continuous_usage_stats": None}
    assert len(server.events(CHAT, messages=USER, stream_options=options)) == 5


def test_integral_floats_are_integers(server):
    body = '{"prompt": [65.0, 66], "max_tokens": 2.0, "n": 1e0, "top_k": 3.0, "logit_bias": {"5": 1}, "seed": 4.0}'
    response = server.http.post("/v1/completions", content=body)
    assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 2


def test_a_number_beyond_every_range_is_refused_by_the_name_of_its_field(server):
    response = server.http.post("/v1/completions", content='{"prompt": "abc", "temperature": 1e400}')
    error = refusal(response)
    assert error["param"] == "temperature" and error["message"] == "temperature: Number out of range"


def test_unknown_fields_are_accepted_and_logged_once(server, caplog):
    with caplog.at_level(logging.WARNING, logger="zmqexec.server"):
        for _ in range(3):
            assert server.chat("abc", a_field_of_tomorrow={"deep": [1]}).status_code == 200
    assert sum("a_field_of_tomorrow" in record.getMessage() for record in caplog.records) == 1


def test_fields_that_ask_for_nothing_are_accepted(server):
    harmless = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "best_of": 1, "suffix": ""}
    assert server.chat("abc", **harmless).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"3", b"null", b'"text"', b"{'messages': []}", b'{"messages": NaN}', b"\xff\xfe",
        b'{"a": "\xff"}', b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\udc00x"}]}',
        b"[" * 100_000 + b"]" * 100_000, b'{"x": ' * 100_000 + b"1" + b"}" * 100_000,
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": [{"role": "user", "content": "a", "extra": ' + b"[" * 50_000 + b"]" * 50_000 + b"}]}",
        b'{"messages": [{"role": "user", "content": ' + b'[{"a":' * 20_000 + b"1" + b"}]" * 20_000 + b"}]}",
    ],
    ids=lambda body: repr(body[:40]),
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(server, body):
    refusal(server.http.post(CHAT, content=body))
    assert server.http.get("/health").status_code == 200


def test_stops_are_bounded_however_many_a_body_has_room_for(server):
    stops = [f"stop {n}" for n in range(MAX_STOPS + 1)]
    assert server.complete("abc", stop=stops[1:]).status_code == 200
    assert refusal(server.complete("abc", stop=stops))["param"] == "stop"
    body = msgspec.json.encode({"prompt": "abc", "stop_token_ids": [98, 97] * 50_000})
    params = sampling_params(decode_request(body, CompletionRequest), max_tokens=9, logprobs=None, prompt_logprobs=None)
    assert params.stop_token_ids == [98, 97]


@pytest.mark.parametrize("count", [21, -1])
def test_log_probabilities_of_more_than_the_limit_are_refused(server, count):
    assert refusal(server.complete("abc", logprobs=count))["param"] == "logprobs"
    assert refusal(server.complete("abc", prompt_logprobs=count))["param"] == "prompt_logprobs"
    assert refusal(server.chat("abc", logprobs=True, top_logprobs=count))["param"] == "top_logprobs"
    assert server.complete("abc", logprobs=20, prompt_logprobs=20).status_code == 200


def test_long_values_do_not_make_long_messages(server):
    error = refusal(server.chat("abc", model="m" * 100_000), 404)
    assert error["type"] == "NotFoundError" and error["param"] == "model"
    refusal(server.chat("abc", stop=["x" * 50_000, ""]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(-2, 2) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
FIELDS = ["prompt", "messages", "max_tokens", "n", "stop", "stream", "stream_options", "logprobs", "top_logprobs",
          "echo", "logit_bias", "seed", "top_p", "temperature", "tools", "prompt_logprobs", "model"]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=5), chat=st.booleans())
def test_no_body_makes_an_internal_error(server, fields, chat):
    response = server.post(CHAT if chat else "/v1/completions", **fields)
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        refusal(response, response.status_code)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("POST", "/v1/embeddings", 404), ("POST", "/v1/chat/completions/", 404),
        ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405), ("POST", "/health", 405),
    ],
)  # fmt: skip
def test_unknown_paths_and_methods_have_the_same_shape(server, method, path, status):
    response = server.http.request(method, path)
    refusal(response, status)
    assert status == 404 or response.headers["allow"]
