"""A server on the fake engine, in a thread of the test process."""

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from tests.server.fake_engine import FakeEngine
from zmqexec.config import ServerConfig
from zmqexec.server.app import Api
from zmqexec.server.connection import HttpProtocol

DEADLINE_S = 10.0


def wait_until(condition, timeout_s=DEADLINE_S):
    """Poll until `condition()` is true; its value."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.005)
    raise AssertionError(f"not within {timeout_s} s: {condition}")


class FakeServer:
    """The HTTP side as it is, on an engine that can be held and killed."""

    def __init__(self, folder, max_body_bytes=1 << 20, max_logprobs=20, **settings):
        self._ready = threading.Event()
        self._folder = folder
        self._settings = settings
        self.config = ServerConfig(port=0, max_body_bytes=max_body_bytes, max_logprobs=max_logprobs)
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        assert self._ready.wait(DEADLINE_S)
        self.http = httpx.Client(base_url=self.url, timeout=DEADLINE_S)

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        self.engine = FakeEngine(self._folder, **self._settings)
        self.api = Api(self.engine, self.config, "fake")
        options = {"http": HttpProtocol, "ws": "none", "lifespan": "off", "access_log": False, "log_config": None}
        self._server = uvicorn.Server(uvicorn.Config(self.api.app, **options))
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._ready.set()
        await self._server.serve([listener])
        await self.engine.close()

    def call(self, function, *arguments):
        """Run `function` in the server's event loop."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def close(self):
        self.http.close()
        self._server.should_exit = True
        self.thread.join(DEADLINE_S)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)

    def chat(self, content="abc", **fields):
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **fields)

    def complete(self, prompt="abc", **fields):
        return self.post("/v1/completions", prompt=prompt, **fields)

    def post(self, path, **fields):
        return self.http.post(path, json=fields)

    def events(self, path, **fields):
        """The JSON of a stream's events, which must end with [DONE]."""
        response = self.http.post(path, json=fields | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = response.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def metric(self, name):
        lines = self.http.get("/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith((name + " ", name + "{"))))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    fake = FakeServer(tmp_path_factory.mktemp("fake"))
    yield fake
    fake.close()


@pytest.fixture
def own_server(tmp_path):
    """One that the test may hold, kill, or ask for long answers."""
    fake = FakeServer(tmp_path, max_logprobs=-1)
    yield fake
    fake.close()
