"""Signals and deaths of the real command: what open requests get, the exit code, and that nobody stays behind."""

import json
import shutil
import signal
import socket
import subprocess
import threading

import httpx
import pytest

from tests.procs import roles, wait_for
from tests.server.real_server import RealServer, command
from zmqexec.demo import CHECKPOINT

LONG = {"prompt": "1+1=", "max_tokens": 300, "ignore_eos": True, "stream": True}
GONE_S = 10.0  # stated: 2 s


@pytest.fixture
def start():
    servers = []

    def start(*flags):
        servers.append(RealServer("--tensor-parallel-size", "1", "--num-threads", "1", *flags))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class OpenStream:
    """A streaming request, read in a thread of its own."""

    def __init__(self, server, **fields):
        self.events = []
        self.error = None
        self._url = server.url
        self._thread = threading.Thread(target=self._read, args=(LONG | fields,), daemon=True)
        self._thread.start()
        wait_for(lambda: self.events or self.error, 30, "a first event")

    def _read(self, fields):
        try:
            with httpx.stream("POST", self._url + "/v1/completions", json=fields, timeout=60) as response:
                self.events.extend(line[6:] for line in response.iter_lines() if line)
        except httpx.HTTPError as error:
            self.error = error

    def result(self):
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.events


def test_sigterm_lets_open_requests_finish_then_everyone_is_gone(start):
    server = start().wait_ready()
    family = server.family()
    assert len(family) == 3  # server, driver, worker
    stream = OpenStream(server, max_tokens=100)
    server.popen.send_signal(signal.SIGTERM)
    wait_for(lambda: "stopping" in server.said, 10, "the signal")
    *events, done = stream.result()
    assert done == "[DONE]" and stream.error is None
    assert json.loads(events[-1])["choices"][0]["finish_reason"] == "length"
    assert server.wait_exit(GONE_S) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5)


def test_requests_that_outlast_the_deadline_end_with_an_error(start):
    server = start("--shutdown-timeout-s", "0", "--max-num-batched-tokens", "256").wait_ready()
    server.family()
    stream = OpenStream(server, n=16)
    server.popen.send_signal(signal.SIGTERM)
    *_, error, done = stream.result()
    assert done == "[DONE]" and json.loads(error)["error"]["code"] == 503
    assert server.wait_exit(GONE_S) == 0


def test_a_long_text_that_is_being_encoded_does_not_hold_up_the_end(start, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINT, model)
    # A token that swallows spaces: now nothing but encoding tells how many tokens a text has.
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["lstrip"] = True
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    server = start("--shutdown-timeout-s", "0", "--model", str(model)).wait_ready()
    server.family()
    body = {"prompt": "a " * 8_000_000}  # takes more than 10 s
    sender = threading.Thread(target=server.http.post, args=("/v1/completions",), kwargs={"json": body}, daemon=True)
    sender.start()
    wait_for(lambda: server.metric("zmqexec_http_requests_open") == 1, 30, "the request")
    server.popen.send_signal(signal.SIGTERM)
    assert server.wait_exit(GONE_S) == 0
    sender.join(30)


def test_the_death_of_the_driver_ends_requests_and_the_server(start):
    server = start().wait_ready()
    server.family()
    stream = OpenStream(server, n=8)
    roles(server.process)["driver"].kill()
    *_, error, done = stream.result()
    assert done == "[DONE]" and "SIGKILL" in json.loads(error)["error"]["message"]
    assert server.wait_exit(GONE_S) == 1
    assert "the engine has died" in server.said


def test_the_death_of_the_server_ends_driver_and_workers(start):
    server = start().wait_ready()
    server.family()
    OpenStream(server, n=8)
    server.popen.kill()
    assert server.wait_exit(GONE_S) == -signal.SIGKILL


def test_a_signal_during_start_up_ends_it(start):
    server = start()
    wait_for(lambda: len(server.family()) == 3, 30, "a worker")
    server.popen.send_signal(signal.SIGTERM)
    assert server.wait_exit(GONE_S) == 0
    assert "Traceback" not in server.said


def test_a_port_in_use_is_said_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = subprocess.run([*command(), "--port", port], capture_output=True, text=True, timeout=30)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and port in result.stderr and "--port" in result.stderr


def test_a_model_that_is_not_there_is_said_in_one_line(tmp_path):
    for flags in (
        ["--model", str(tmp_path / "none")],
        ["--chat-template", str(tmp_path / "none")],
        ["--host", "no.such."],
    ):
        result = subprocess.run([*command(), "--port", "0", *flags], capture_output=True, text=True, timeout=30)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith("zmqexec-serve: error: ") and "Traceback" not in result.stderr
