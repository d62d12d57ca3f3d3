"""`zmqexec-serve`: from a command line to a served model.

Runs in: server. What it says: progress and errors on stderr, the banner on stdout once requests are accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from zmqexec.async_engine import AsyncEngine
from zmqexec.config import DEMO_NAME, EngineConfig
from zmqexec.demo import CHECKPOINT
from zmqexec.errors import ConfigError, UserError, ZmqexecError
from zmqexec.protocol import EngineProgress
from zmqexec.server.flags import parse_flags
from zmqexec.server.serve import serve
from zmqexec.version import __version__

DEMO_QUESTION = "What is zmqexec?"
BACKLOG = 2048


def main() -> NoReturn:
    """The command; its exit code is 0 after a signal, 2 for the user's mistakes, 1 for failures."""
    exit_code = run(sys.argv[1:])
    with contextlib.suppress(OSError):  # nobody reads them any more
        sys.stdout.flush()
        sys.stderr.flush()
    # Everything is closed; only a thread that encodes a long text may still run, and nothing can interrupt it.
    os._exit(exit_code)


def run(argv: Sequence[str]) -> int:
    """Serve as the command line says; the exit code."""
    engine_config, server_config = parse_flags(argv)
    _set_up_logging(server_config.log_level)
    progress = ProgressPrinter(sys.stderr)
    try:
        chat_template = _read_template(server_config.chat_template)
        listener = listen(server_config.host, server_config.port)
        model_name = server_config.served_model_name or _model_name(engine_config.model)

        def on_ready(engine: AsyncEngine) -> None:
            progress.end()
            print(banner(engine, engine_config, listener, model_name), flush=True)

        return asyncio.run(
            serve(
                engine_config,
                server_config,
                listener,
                model_name=model_name,
                chat_template=chat_template,
                on_progress=progress,
                on_ready=on_ready,
            )
        )
    except ZmqexecError as error:
        progress.end()
        print(f"zmqexec-serve: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `ConfigError` where there is none to be had.

    It listens from the start, before the engine is started: two servers could bind the same port, and the second would
    find out only after loading its model. Clients that come early wait.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"host={host!r} is no address to listen on: {error.strerror}", "host") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port", "port"
        ) from None
    return listener


class ProgressPrinter:
    """Start-up progress: one line that is rewritten on a terminal, a line per stage elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._on_terminal = stream.isatty()
        self._stage = ""
        self._started = time.monotonic()

    def __call__(self, progress: EngineProgress) -> None:
        text = progress.text
        if self._on_terminal:
            share = f" {100 * progress.done // progress.total:3d} %" if progress.total else ""
            self._stream.write(f"\r\x1b[K[{time.monotonic() - self._started:4.1f} s] {text}{share}")
        elif text != self._stage:
            self._stream.write(f"[{time.monotonic() - self._started:4.1f} s] {text}\n")
        self._stage = text
        self._stream.flush()

    def end(self) -> None:
        """Leave the line of a terminal."""
        if self._on_terminal and self._stage:
            self._stream.write("\n")
        self._stage = ""


def banner(engine: AsyncEngine, config: EngineConfig, listener: socket.socket, model_name: str) -> str:
    """What a newcomer needs: where it runs, the URL, a line to paste, and the way to another model."""
    url = _url(listener)
    workers = config.tensor_parallel_size
    on_cpu = engine.info.device == "cpu"
    where = "the CPU" if on_cpu else f"NVIDIA GPUs ({engine.info.device})"
    lines = [
        f"zmqexec {__version__} serves {model_name} at {url}",
        f"It computes on {where} with {workers} worker{'s' if workers > 1 else ''}.",
        "",
        "Try it:",
        f"  {_curl(engine, config, url, model_name)}",
        "",
        "Serve a model of your own (the folder of a Hugging Face Llama checkpoint):",
        "  zmqexec-serve --model path/to/checkpoint --tensor-parallel-size 2",
        "",
        "Stop with Ctrl-C.",
    ]
    return "\n".join(lines)


def _curl(engine: AsyncEngine, config: EngineConfig, url: str, model_name: str) -> str:
    question = DEMO_QUESTION if config.model is None else "Hello!"
    tokenizer = engine.tokenizer
    if tokenizer is None:
        path, body = "completions", {"model": model_name, "prompt": [1], "max_tokens": 16}
    elif tokenizer.has_chat_template:
        path, body = "chat/completions", {"model": model_name, "messages": [{"role": "user", "content": question}]}
    else:
        path, body = "completions", {"model": model_name, "prompt": question, "max_tokens": 32}
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def _url(listener: socket.socket) -> str:
    """The URL to reach `listener` from this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _model_name(model: str | None) -> str:
    if model is None or Path(model).resolve() == CHECKPOINT.resolve():
        return DEMO_NAME
    return Path(model).resolve().name


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template={path!r} cannot be read: {error}", "chat_template") from None


def _set_up_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if level != "debug":
        # uvicorn reports each step of starting and stopping, which the lines above and below already say.
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        logging.getLogger("asyncio").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
