"""The driver as a process of its own, for servers: steps go on whatever the server's event loop does.

Runs in: driver. Started by `async_engine.py` through `_entry.py`; speaks `ToEngine` and `FromEngine` over ZeroMQ.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from typing import Any

import msgspec
import zmq

from zmqexec.bus.extension import arm_death_watch
from zmqexec.driver.plan import make_plan
from zmqexec.driver.step import Driver
from zmqexec.errors import InternalError, UserError, ZmqexecError
from zmqexec.protocol import (
    AbortRequests,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineUpdates,
    ErrorInfo,
    FromEngine,
    NewRequest,
    StartEngine,
    StopEngine,
    ToEngine,
)

IDLE_WAIT_MS = 60_000
"""Longest single wait for a message; the loop then simply waits again."""


def main(arguments: dict[str, Any]) -> None:
    """Serve one front end until it says `StopEngine` or is gone. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    arm_death_watch(arguments["parent_pid"], arguments["lifeline_fd"])
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.linger = 1000
    # Updates are bounded by the tokens that the open requests may still get, so nothing else needs to limit them,
    # and a driver that waited for a slow front end would hold up every other request.
    socket.sndhwm = socket.rcvhwm = 0
    socket.connect(arguments["endpoint"])
    exit_code = DriverProcess(socket).run()
    socket.close()
    context.term()
    sys.stderr.flush()
    os._exit(exit_code)


class DriverProcess:
    """Takes commands between steps, and reports what each step brought."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()
        self._driver: Driver | None = None
        self._is_stopping = False

    def run(self) -> int:
        """Serve until told to stop; the exit code. An error is reported to the front end first."""
        try:
            while not self._is_stopping:
                self._take_commands()
                if self._driver is not None and self._driver.has_unfinished:
                    self._step(self._driver)
        except ZmqexecError as error:
            return self._fail(error)
        except Exception as error:
            traceback.print_exc()
            return self._fail(InternalError(f"{type(error).__name__} in the driver: {error}"))
        finally:
            if self._driver is not None:
                self._driver.close()
        return 0

    def _take_commands(self) -> None:
        """Handle what has come; with nothing to compute, wait for more or for a worker's death."""
        driver = self._driver
        if driver is None or not driver.has_unfinished:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            if driver is not None and driver.death_fd is not None:
                poller.register(driver.death_fd, zmq.POLLIN)
            poller.poll(IDLE_WAIT_MS)
            if driver is not None:
                driver.check()
        while not self._is_stopping:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(self._decoder.decode(data))

    def _handle(self, message: ToEngine) -> None:
        match message:
            case StartEngine():
                self._driver = Driver(make_plan(message.config), self._report_progress)
                self._send(EngineReady(self._driver.info))
            case StopEngine():
                self._is_stopping = True
            case NewRequest():
                self._started().add(message)
            case AbortRequests():
                self._started().abort(message.request_ids)

    def _step(self, driver: Driver) -> None:
        updates = driver.step()
        if updates or not driver.has_unfinished:
            self._send(EngineUpdates(updates, driver.stats))

    def _started(self) -> Driver:
        if self._driver is None:
            raise InternalError("a request came before StartEngine")
        return self._driver

    def _report_progress(self, what: str, done: int, total: int) -> None:
        self._send(EngineProgress(what, done, total))

    def _send(self, message: FromEngine) -> None:
        self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)

    def _fail(self, error: ZmqexecError) -> int:
        param = error.param if isinstance(error, UserError) else None
        with contextlib.suppress(zmq.ZMQError):
            self._send(EngineFailed(ErrorInfo(type(error).__name__, str(error), param)))
        return 1
