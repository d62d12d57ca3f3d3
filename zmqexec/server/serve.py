"""The life of the server process: engine up, HTTP up, and both down again in order.

Runs in: server. SIGTERM or Ctrl-C: no new connections, open requests may finish until the deadline, then the engine is
closed, exit code 0; a second signal does not wait. The engine dies: open requests end with its error, /health says 503
for a moment, exit code 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from zmqexec.async_engine import AsyncEngine
from zmqexec.config import EngineConfig, ServerConfig
from zmqexec.errors import ZmqexecError
from zmqexec.protocol import EngineProgress
from zmqexec.server.app import Api
from zmqexec.server.connection import HttpProtocol

logger = logging.getLogger("zmqexec.server")

KEEP_ALIVE_S = 65
"""Longer than clients' pools keep idle connections (httpx 5 s, proxies 60 s), so that they close first and no request
meets a closing connection."""
DEAD_LINGER_S = 0.4
"""How long a server whose engine died still answers, so that open requests and probes get to know."""
DEAD_SHUTDOWN_S = 0.3

OnReady = Callable[[AsyncEngine], None]


class Server(uvicorn.Server):
    """uvicorn, with signals left to us and a call when it accepts requests."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again at the end, and the process would die of it instead of exiting with 0.
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


async def serve(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    listener: socket.socket,
    *,
    model_name: str,
    chat_template: str | None,
    on_progress: Callable[[EngineProgress], None],
    on_ready: OnReady,
) -> int:
    """Start the engine and answer requests on `listener` until a signal or the engine's death; the exit code.

    Raises what `AsyncEngine.start` raises. `listener` is closed at the end.
    """
    stop = _Stop()
    with stop.on_signals(), contextlib.closing(listener):
        starting = asyncio.ensure_future(
            AsyncEngine.start(engine_config, on_progress=on_progress, chat_template=chat_template)
        )
        if not await stop.before(starting):
            return 0
        engine = starting.result()
        try:
            return await _run_http(engine, server_config, listener, stop, model_name, on_ready)
        finally:
            await engine.close()


class _Stop:
    """Remembers signals: `count` of them so far."""

    def __init__(self) -> None:
        self.count = 0
        self.requested = asyncio.Event()
        self.on_repeat: Callable[[], None] | None = None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        self.count += 1
        self.requested.set()
        if self.count > 1 and self.on_repeat is not None:
            self.on_repeat()

    async def before(self, work: asyncio.Future[AsyncEngine]) -> bool:
        """Wait for `work`; False if a signal came first, and `work` has been cancelled."""
        waiting = asyncio.ensure_future(self.requested.wait())
        await asyncio.wait((work, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if work.done():
            return True
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError, ZmqexecError):
            await work
        return False


async def _run_http(
    engine: AsyncEngine,
    config: ServerConfig,
    listener: socket.socket,
    stop: _Stop,
    model_name: str,
    on_ready: OnReady,
) -> int:
    api = Api(engine, config, model_name)
    settings = uvicorn.Config(
        api.app,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    settings.timeout_graceful_shutdown = config.shutdown_timeout_s  # type: ignore[assignment]  # seconds, for wait_for
    server = Server(settings, lambda: on_ready(engine))

    def stop_now() -> None:
        server.force_exit = True

    stop.on_repeat = stop_now
    serving = asyncio.create_task(server.serve([listener]))
    stopping = asyncio.create_task(stop.requested.wait())
    dying = asyncio.create_task(engine.wait_dead())
    try:
        await asyncio.wait((serving, stopping, dying), return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            logger.error("the engine has died, the server ends: %s", dying.result())
            await asyncio.sleep(DEAD_LINGER_S)
            settings.timeout_graceful_shutdown = DEAD_SHUTDOWN_S  # type: ignore[assignment]
        elif stopping.done():
            logger.info("stopping: open requests may take %g s to finish", config.shutdown_timeout_s)
        server.should_exit = True
        await serving
        return 1 if dying.done() else 0
    finally:
        for task in (serving, stopping, dying):
            task.cancel()
        api.close()
