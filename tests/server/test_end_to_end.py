"""The demo model behind the real command, over HTTP, on two workers."""

import asyncio
import json
import shutil
import socket
import subprocess
import time

import httpx
import openai
import psutil
import pytest

from tests.procs import wait_for
from tests.server.real_server import RealServer
from zmqexec import AsyncEngine, EngineConfig, SamplingParams
from zmqexec.demo.tasks import QUESTIONS, held_out_additions
from zmqexec.errors import InternalError

MODEL = "zmqexec-demo"


@pytest.fixture(scope="module")
def server():
    real = RealServer()
    try:
        yield real.wait_ready()
    finally:
        real.close()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def test_the_banner_says_where_it_runs_and_its_curl_line_works(server):
    assert "computes on the CPU" in server.said and "2 workers" in server.said and server.url in server.said
    assert "loading weights" in server.said  # progress, before
    assert "zmqexec-serve --model path/to/checkpoint" in server.said
    [line] = [line.strip() for line in server.lines if line.strip().startswith("curl ")]
    if shutil.which("curl"):
        result = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=True)
        assert QUESTIONS[0][1] in result.stdout


@pytest.mark.parametrize(("question", "answer"), QUESTIONS, ids=[question for question, _ in QUESTIONS])
def test_the_demo_model_answers_its_questions(client, question, answer):
    fields = {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0}
    whole = client.chat.completions.create(**fields)
    assert whole.choices[0].message.content.strip() == answer and whole.choices[0].finish_reason == "stop"
    with client.chat.completions.create(**fields, stream=True) as stream:
        pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 3


def test_logprobs_samples_and_stops_come_through(client):
    fields = {"model": MODEL, "messages": [{"role": "user", "content": QUESTIONS[0][0]}]}
    answer = client.chat.completions.create(**fields, n=3, logprobs=True, top_logprobs=2, max_tokens=4, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert len(choice.logprobs.content) == 4
        assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in choice.logprobs.content)
        joined = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        assert joined.decode() == choice.message.content
    stopped = client.chat.completions.create(**fields, temperature=0, stop=["machine"])
    assert stopped.choices[0].message.content == QUESTIONS[0][1].partition("machine")[0]
    scored = client.completions.create(model=MODEL, prompt="12+30=42", echo=True, logprobs=1, max_tokens=1)
    logprobs = scored.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens).endswith("12+30=42" + logprobs.tokens[-1])


def test_64_streams_at_once_are_each_what_they_are_alone(server, client):
    problems = held_out_additions(64)
    alone = client.completions.create(model=MODEL, prompt=[p.prompt for p in problems], temperature=0, max_tokens=8)
    expected = [choice.text for choice in alone.choices]
    assert sum(text.strip() == p.answer.strip() for text, p in zip(expected, problems, strict=True)) >= 60

    async def stream(problem, http):
        fields = {"model": MODEL, "prompt": problem.prompt, "temperature": 0, "max_tokens": 8}
        text, ends = "", 0
        async with http.stream("POST", "/v1/completions", json=fields | {"stream": True}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    [choice] = json.loads(line[6:])["choices"]
                    text += choice["text"]
                    ends += choice["finish_reason"] is not None
        assert ends == 1
        return text

    async def all_streams():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
            return await asyncio.gather(*(stream(problem, http) for problem in problems))

    assert asyncio.run(all_streams()) == expected
    assert server.metric("zmqexec_num_requests_running") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_sequences(server, stream, record_property):
    host, port = server.url.removeprefix("http://").split(":")
    body = (
        b'{"prompt": "1+1=", "max_tokens": 400, "ignore_eos": true, "n": 4, "stream": %s}'
        % str(stream).lower().encode()
    )
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        wait_for(lambda: server.metric("zmqexec_num_requests_running") > 0, 30, "a running request")
    left = time.monotonic()
    names = ("zmqexec_num_requests_running", "zmqexec_num_requests_waiting", "zmqexec_http_requests_open",
             "zmqexec_kv_cache_usage_ratio")  # fmt: skip
    wait_for(lambda: all(server.metric(name) == 0 for name in names), 5, "gauges at 0")  # stated: 1 s
    record_property("freed_s", round(time.monotonic() - left, 3))


def test_nobody_listens_but_the_server_on_its_port(server):
    for process in server.family():
        listening = [c.laddr for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
        if process == server.process:
            assert [address.port for address in listening] == [int(server.url.rpartition(":")[2])]
        else:
            assert listening == []


def test_refusals_of_the_engine_are_400s(server):
    for fields, param in (
        ({"prompt": "1" * 5000}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": "1", "temperature": 1e400}, None),
        ({"prompt": "1", "top_p": 7}, "top_p"),
    ):
        body = httpx.Request("POST", server.url + "/v1/completions", content=str(fields).replace("'", '"')).content
        response = server.http.post("/v1/completions", content=body)
        assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert server.http.get("/health").status_code == 200


def test_steps_go_on_while_the_front_ends_event_loop_is_blocked(record_property):
    async def run():
        config = EngineConfig(tensor_parallel_size=1, num_threads=1)
        params = SamplingParams(max_tokens=500, ignore_eos=True, temperature=0)
        async with await AsyncEngine.start(config) as engine:
            outputs = engine.generate("1+1=", params, output="delta")
            await anext(outputs)
            count = 0
            start = time.monotonic()
            while time.monotonic() < start + 0.5 and count < 200:
                count += len((await anext(outputs)).outputs[0].token_ids)
            per_token_s = (time.monotonic() - start) / count
            steps = engine.stats.steps
            time.sleep(0.5)  # what must not happen in an event loop
            at_once = 0
            start = time.monotonic()
            while time.monotonic() < start + 0.02 and (one := await anext(outputs, None)) is not None:
                at_once += len(one.outputs[0].token_ids)  # to the end, on a fast machine
            record_property("tokens_per_s", round(1 / per_token_s))
            record_property("tokens_during_block", at_once)
            # Half a second's worth, with slack for a busy machine; without a driver of its own it would be one or two.
            assert engine.stats.steps - steps >= min(0.5 / per_token_s, 250) / 5
            await outputs.aclose()

    asyncio.run(run())


def test_an_error_in_the_front_end_ends_streams_that_would_wait_for_ever(capfd):
    async def run():
        async with await AsyncEngine.start(EngineConfig(num_threads=1)) as engine:
            outputs = engine.generate("1+1=", SamplingParams(max_tokens=500, ignore_eos=True), output="delta")
            await anext(outputs)

            def broken(updates):
                raise ValueError("an update that cannot be read")

            engine._front.apply = broken
            with pytest.raises(InternalError, match="an update that cannot be read"):
                async with asyncio.timeout(20):
                    async for _ in outputs:
                        pass
            assert isinstance(engine.error, InternalError)

    asyncio.run(run())
    assert "Traceback" in capfd.readouterr().err
