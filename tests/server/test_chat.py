"""POST /v1/chat/completions and the small endpoints."""

import msgspec
import openai
import pytest

from zmqexec.version import __version__

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "abc"}]


def test_a_chat_is_answered(server):
    answer = server.chat("abc").json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "cba"},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["prompt_tokens"] == 5 and answer["usage"]["completion_tokens"] == 4


def test_content_may_be_a_list_of_text_parts(server):
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    assert server.chat(parts).json()["choices"][0]["message"]["content"] == "c\nba"


def test_max_completion_tokens_goes_before_max_tokens(server):
    answer = server.chat("abcdef", max_tokens=5, max_completion_tokens=2).json()
    assert answer["choices"][0]["message"]["content"] == "fe"
    assert server.chat("x" * 50).json()["usage"]["completion_tokens"] == 51  # no limit of 16 here


def test_the_first_event_of_a_choice_carries_the_role_and_no_other_does(server):
    events = server.events(CHAT, messages=USER, n=2)
    for index in (0, 1):
        first, *rest = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert first["delta"] == {"role": "assistant", "content": ""} and first["finish_reason"] is None
        assert [choice["delta"] for choice in rest] == [{"content": text} for text in ("c", "b", "a", "")]
        assert [choice["finish_reason"] for choice in rest] == [None, None, None, "stop"]
    assert all("usage" not in event for event in events)


def test_a_token_that_completes_no_character_is_an_event_without_text(server):
    events = server.events(CHAT, messages=[{"role": "user", "content": "é"}], max_tokens=1, ignore_eos=True)
    assert [event["choices"][0]["delta"].get("content") for event in events] == ["", "�"]
    reversed_bytes = server.events(CHAT, messages=[{"role": "user", "content": "ab"}], stop="zzz", max_tokens=3)
    assert [event["choices"][0]["delta"]["content"] for event in reversed_bytes] == ["", "", "", "ba"]


def test_usage_comes_last_and_only_on_request(server):
    events = server.events(CHAT, messages=USER, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 4
    assert all(event["usage"] is None and len(event["choices"]) == 1 for event in events[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.events(CHAT, messages=USER, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in events[1:]] == [1, 2, 3, 4, 4]


def test_chat_logprobs(server):
    answer = server.chat("aé", logprobs=True, top_logprobs=2, max_tokens=3).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xA9], [0xC3], [ord("a")]]
    assert [entry["token"] for entry in content] == ["�", "�", "a"]
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[2]["top_logprobs"][0] == {"token": "a", "logprob": -0.5, "bytes": [97]}
    none = server.chat("a", logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in none] == [[], []]
    events = server.events(CHAT, messages=USER, logprobs=True, top_logprobs=1)
    streamed = [entry for event in events[1:] for entry in event["choices"][0]["logprobs"]["content"]]
    assert [entry["token"] for entry in streamed] == ["c", "b", "a", "<|eos|>"]


def test_the_openai_client_reads_everything(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=10)
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    answer = client.chat.completions.create(model="fake", messages=USER, n=2, logprobs=True, top_logprobs=1)
    assert [choice.message.content for choice in answer.choices] == ["cba", "cba"]
    assert answer.choices[0].logprobs.content[0].token == "c"
    pieces = {0: "", 1: ""}
    usage = None
    with client.chat.completions.create(
        model="fake", messages=USER, n=2, stream=True, stop="a", stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                pieces[choice.index] += choice.delta.content
    assert pieces == {0: "cb", 1: "cb"} and usage.total_tokens == 5 + 2 * 3
    completion = client.completions.create(model="fake", prompt=["ab", "cd"], echo=True, logprobs=1)
    assert [choice.text for choice in completion.choices] == ["abba", "cddc"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=USER, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.status_code == 400
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=USER)


def test_request_ids_are_taken_over_when_harmless(server):
    response = server.http.post(CHAT, json={"messages": USER}, headers={"x-request-id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1" and response.json()["id"] == "chatcmpl-abc-1"
    for bad in ("x" * 200, "é", "a\tb"):
        headers = {"x-request-id": bad.encode()}
        assert len(server.http.post(CHAT, json={"messages": USER}, headers=headers).json()["id"]) == 9 + 32
    both = [server.http.post(CHAT, json={"messages": USER}, headers={"x-request-id": "same"}) for _ in range(2)]
    assert [response.status_code for response in both] == [200, 200]


def test_models_say_what_benchmarks_read(server):
    [card] = server.http.get("/v1/models").json()["data"]
    assert card["id"] == "fake" and card["max_model_len"] == 4096 and card["root"]
    assert server.http.get("/v1/models/other").status_code == 404


def test_tokenize_and_detokenize(server):
    answer = server.post("/tokenize", prompt="hé", return_token_strs=True).json()
    assert answer["count"] == 3 and answer["max_model_len"] == 4096 and len(answer["tokens"]) == 3
    assert answer["token_strs"][0] == "h"
    assert server.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": "hé"}
    chat = server.post("/tokenize", messages=USER).json()["tokens"]
    assert server.post("/detokenize", tokens=chat).json() == {"prompt": "<|user|>abc<|assistant|>"}
    bare = server.post("/tokenize", messages=USER, add_generation_prompt=False).json()["tokens"]
    assert server.post("/detokenize", tokens=bare).json() == {"prompt": "<|user|>abc"}
    assert server.post("/detokenize", tokens=[260]).json()["error"]["param"] == "tokens"
    assert server.post("/tokenize").status_code == 400


def test_probes(server):
    health = server.http.get("/health")
    assert health.status_code == 200 and health.content == b""
    assert server.http.get("/ping").status_code == server.http.post("/ping").status_code == 200
    assert server.http.get("/version").json() == {"version": __version__}
    document = server.http.get("/openapi.json").json()
    properties = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "top_logprobs", "min_p"} <= set(properties)
    assert msgspec.json.encode(document).count(b"$ref") >= 4
