"""What happens on the wire: framing, clients that leave or stand still, bodies and headers without end."""

import json
import socket
import threading
import time

import httpx
import pytest

from tests.server.conftest import DEADLINE_S, FakeServer, wait_until
from zmqexec.errors import WorkerDied
from zmqexec.server import app as app_module
from zmqexec.server import connection as connection_module
from zmqexec.server.texts import MAX_DETOKENIZE_TOKENS, MAX_TOKENIZE_CHARS

USER = [{"role": "user", "content": "abc"}]
LONG = {"prompt": "x" * 500, "max_tokens": 3000, "ignore_eos": True}


def http_bytes(path, fields, *headers):
    body = json.dumps(fields).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def read_until(connection, mark):
    data = b""
    while mark not in data:
        piece = connection.recv(65536)
        assert piece, f"closed after {data[-300:]!r}"
        data += piece
    return data


def no_open_requests(server):
    return server.metric("zmqexec_num_requests_running") == 0 and server.metric("zmqexec_http_requests_open") == 0


def test_a_stream_ends_its_body_at_once_after_done(server):
    with server.connect() as connection:
        connection.sendall(http_bytes("/v1/completions", {"prompt": "ab", "stream": True}))
        data = read_until(connection, b"0\r\n\r\n")
        head, _, body = data.partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head.lower()
        assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        # The connection serves the next request.
        connection.sendall(http_bytes("/v1/completions", {"prompt": "ab"}))
        assert b'"text":"ba"' in read_until(connection, b"}}}")


def test_events_are_sent_as_their_tokens_come(own_server):
    own_server.engine.step_s = 0.05
    with own_server.http.stream("POST", "/v1/completions", json={"prompt": "abcdef", "stream": True}) as response:
        times = [time.monotonic() for line in response.iter_lines() if line]
    assert times[-1] - times[0] > 0.2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_request(own_server, stream):
    own_server.engine.step_s = 0.01
    with own_server.connect() as connection:
        connection.sendall(http_bytes("/v1/completions", LONG | {"stream": stream, "n": 2}))
        wait_until(lambda: own_server.metric("zmqexec_num_requests_running") == 2)
        if stream:
            read_until(connection, b"data:")
    left = time.monotonic()
    wait_until(lambda: no_open_requests(own_server))
    assert time.monotonic() - left < 5  # stated: 1 s
    assert len(own_server.engine.aborted) == 2
    assert 'zmqexec_requests_finished_total{reason="abort"} 2' in own_server.http.get("/metrics").text


def test_a_client_that_leaves_while_its_request_waits_for_a_step_frees_it(own_server):
    own_server.call(own_server.engine.pause)
    with own_server.connect() as connection:
        connection.sendall(http_bytes("/v1/completions", LONG | {"stream": True}))
        wait_until(lambda: own_server.metric("zmqexec_num_requests_running") == 1)
    wait_until(lambda: no_open_requests(own_server), 5)


def test_a_client_that_stopped_reading_frees_its_request_when_it_leaves(own_server):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", own_server.port))
    # So much per token that the buffers of both ends fill and the sender has to wait.
    fields = LONG | {"logprobs": 200, "stream": True}
    connection.sendall(http_bytes("/v1/completions", fields))
    wait_until(lambda: own_server.metric("zmqexec_num_requests_running") == 0, 30)  # all tokens are there
    assert own_server.metric("zmqexec_http_requests_open") == 1  # and not all have been sent
    connection.close()
    wait_until(lambda: no_open_requests(own_server), 5)


def test_a_client_that_never_reads_again_is_given_up(own_server, monkeypatch):
    monkeypatch.setattr(connection_module, "WRITE_TIMEOUT_S", 0.3)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", own_server.port))
        connection.sendall(http_bytes("/v1/completions", LONG | {"logprobs": 200, "stream": True}))
        wait_until(lambda: own_server.metric("zmqexec_num_requests_running") == 1)
        wait_until(lambda: no_open_requests(own_server), 30)


def test_a_slow_reader_does_not_hold_up_others(server):
    with server.connect() as connection:
        connection.sendall(http_bytes("/v1/completions", LONG | {"stream": True}))
        assert server.chat("abc").status_code == 200


def test_a_long_text_is_encoded_beside_the_event_loop(tmp_path):
    server = FakeServer(tmp_path, max_model_len=600_000)
    encode = server.engine.tokenizer.encode
    threads = []
    server.engine.tokenizer.encode = lambda *arguments: [
        threads.append(threading.current_thread()),
        encode(*arguments),
    ][1]
    text = "x y" * 20_000
    answer = server.complete(text, max_tokens=2, echo=True).json()
    assert answer["choices"][0]["text"] == text + "y " and answer["usage"]["prompt_tokens"] == len(text)
    assert threads and server.thread not in threads
    threads.clear()
    refused = server.complete("x" * 900_000 * 3)  # little enough to be read to its end: the answer arrives
    assert refused.status_code == 413
    refused = server.complete("x" * 900_000)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"
    server.close()


@pytest.mark.parametrize(
    ("served_before", "begin"), [(False, b""), (False, b"POST /v1/comp"), (True, b"POST /v1/comp")]
)
def test_a_head_that_never_ends_is_given_up(own_server, monkeypatch, served_before, begin):
    monkeypatch.setattr(connection_module, "HEAD_TIMEOUT_S", 0.3)
    with own_server.connect() as connection:
        if served_before:
            connection.sendall(http_bytes("/v1/completions", {"prompt": "ab"}))
            read_until(connection, b"}}}")
        connection.sendall(begin)
        assert connection.recv(1000) == b""


def test_the_deadline_of_a_head_does_not_cut_what_follows_it(own_server, monkeypatch):
    monkeypatch.setattr(connection_module, "HEAD_TIMEOUT_S", 0.2)
    own_server.engine.step_s = 0.05
    with own_server.connect() as connection:
        for _ in range(2):
            connection.sendall(http_bytes("/v1/completions", {"prompt": "abcdefgh"}))
            assert b'"text":"hgfedcba"' in read_until(connection, b"}}}")


@pytest.mark.parametrize("n", [1, 8, 100])
def test_one_request_of_many_prompts_does_not_hold_up_the_others(own_server, n):
    """Prompts start a few at a time, not all of them in one turn of the event loop."""
    own_server.engine.pause()
    prepared = []  # per turn of the event loop
    prepare = own_server.engine._front.prepare

    def counted(*arguments, **named):
        if not prepared:
            own_server.loop.call_soon(new_turn)
        prepared.append(prepared.pop() + 1 if prepared else 1)
        return prepare(*arguments, **named)

    turns = []

    def new_turn():
        turns.append(prepared.pop())

    own_server.engine._front.prepare = counted
    with own_server.connect() as connection:
        connection.sendall(http_bytes("/v1/completions", {"prompt": ["ab"] * 200, "max_tokens": 1, "n": n}))
        wait_until(lambda: sum(turns) == 200)
    assert max(turns) <= 2 * max(app_module.SAMPLES_AT_ONCE // n, 1)


def test_long_token_lists_are_made_text_beside_the_event_loop(own_server):
    tokenizer, threads = own_server.engine.tokenizer, []
    decode = tokenizer.decode
    tokenizer.decode = lambda *arguments, **named: [
        threads.append(threading.current_thread()),
        decode(*arguments, **named),
    ][1]
    answer = own_server.post("/detokenize", tokens=[66] * 100_000)
    assert answer.json()["prompt"] == decode([66]) * 100_000
    assert threads and own_server.thread not in threads


def test_texts_that_would_take_a_core_for_long_are_refused(tmp_path):
    server = FakeServer(tmp_path, max_body_bytes=16 << 20)
    texts = {"prompt": "x" * (MAX_TOKENIZE_CHARS + 1)}
    assert server.post("/tokenize", **texts).json()["error"]["param"] == "prompt"
    tokens = {"tokens": [1] * (MAX_DETOKENIZE_TOKENS + 1)}
    assert server.post("/detokenize", **tokens).json()["error"]["param"] == "tokens"
    server.close()


def test_an_engine_that_dies_ends_open_requests_with_its_error(own_server):
    own_server.call(own_server.engine.pause)
    streaming = own_server.connect()
    streaming.sendall(http_bytes("/v1/completions", LONG | {"stream": True}))
    waiting = own_server.connect()
    waiting.sendall(http_bytes("/v1/completions", LONG))
    begun = own_server.connect()
    wait_until(lambda: own_server.metric("zmqexec_num_requests_running") == 2)
    own_server.engine.step_s = 0.05
    own_server.call(own_server.engine.pause, False)
    begun.sendall(http_bytes("/v1/chat/completions", {"messages": USER, "ignore_eos": True, "stream": True}))
    read_until(begun, b'"role"')
    own_server.call(own_server.engine.die, WorkerDied("worker 1 died: SIGKILL", 1))
    assert b" 500 " in read_until(waiting, b"}}").split(b"\r\n")[0]
    for connection in (streaming, begun):
        data = read_until(connection, b"0\r\n\r\n")
        error, done, _ = data.split(b"\n\n")[-3:]
        assert b"worker 1 died" in error and b'"code":500' in error and b"[DONE]" in done
    for connection in (streaming, waiting, begun):
        connection.close()
    assert own_server.http.get("/health").status_code == 503
    answer = own_server.chat("abc")
    assert answer.status_code == 500 and "worker 1 died" in answer.json()["error"]["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused(server, declared):
    size = server.config.max_body_bytes + 1

    def body():
        for _ in range(size // 1000 + 1):
            yield b"x" * 1000

    response = server.http.post("/v1/completions", content=b"x" * size if declared else body())
    assert response.status_code == 413 and response.json()["error"]["code"] == 413
    assert response.headers["connection"] == "close"
    assert server.chat("abc").status_code == 200


def test_a_body_just_under_the_limit_is_read(server):
    pad = " " * (server.config.max_body_bytes - 100)
    response = server.http.post("/v1/completions", content='{"prompt": "ab"' + pad + "}")
    assert response.status_code == 200


def test_headers_without_end_are_refused(server):
    with server.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
        try:
            for n in range(3000):
                connection.sendall(b"x-filler-%d: " % n + b"y" * 100 + b"\r\n")
            data = connection.recv(65536)
        except ConnectionError:
            data = b""  # cut off while still writing
        assert data == b"" or b" 400 " in data.split(b"\r\n")[0]
    assert server.http.get("/health").status_code == 200


def test_a_client_that_leaves_within_its_body_leaves_nothing(server, caplog):
    with server.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    wait_until(lambda: no_open_requests(server))
    assert server.chat("abc").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_body_in_pieces_is_put_together(server):
    with server.connect() as connection:
        data = http_bytes("/v1/completions", {"prompt": "ab"})
        for n in range(len(data)):
            connection.sendall(data[n : n + 1])
        assert b'"text":"ba"' in read_until(connection, b"}}}")


def test_many_streams_at_once_are_each_whole(server):
    prompts = [f"{n:04d}" * 8 for n in range(64)]
    connections = [server.connect() for _ in prompts]
    for prompt, connection in zip(prompts, connections, strict=True):
        connection.sendall(http_bytes("/v1/completions", {"prompt": prompt, "max_tokens": 40, "stream": True}))
    for prompt, connection in zip(prompts, connections, strict=True):
        body = read_until(connection, b"0\r\n\r\n").partition(b"\r\n\r\n")[2]
        events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")]
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == prompt[::-1]
        connection.close()


def test_metrics_count_what_happened(own_server):
    own_server.complete("abcd")
    own_server.complete("x" * 30, n=2, max_tokens=5)
    own_server.events("/v1/chat/completions", messages=USER)
    own_server.complete("", max_tokens=5)
    text = own_server.http.get("/metrics").text
    assert 'zmqexec_requests_finished_total{reason="stop"} 2' in text
    assert 'zmqexec_requests_finished_total{reason="length"} 2' in text
    assert 'zmqexec_requests_finished_total{reason="error"} 0' in text
    for name, count in (("time_to_first_token", 4), ("inter_token_latency", 4 + 2 * 4 + 3), ("request_queue_time", 4)):
        assert f"zmqexec_{name}_seconds_count {count}\n" in text, name
        assert f'zmqexec_{name}_seconds_bucket{{le="+Inf"}} {count}\n' in text
    buckets = [int(line.split()[-1]) for line in text.splitlines() if "e2e_request_latency_seconds_bucket" in line]
    assert buckets == sorted(buckets) and buckets[-1] == 4
    assert text.endswith("\n") and no_open_requests(own_server)
    for line in text.splitlines():
        assert line.startswith("# ") or len(line.split()) == 2


def test_idle_connections_outlive_clients_pools(own_server):
    client = httpx.Client(base_url=own_server.url, timeout=DEADLINE_S)
    assert client.get("/health").status_code == client.get("/health").status_code == 200
