"""`AsyncEngine`: the engine for servers, with the driver in a process of its own.

Runs in: server.

The front end (text, validation) runs in the caller's event loop, the scheduler in the driver process, so that neither
waits for the other's GIL. They talk over one ZeroMQ PAIR connection; `bus/zeromq/endpoints.py` says where.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec
import zmq
import zmq.asyncio

from zmqexec.bus.extension import BUILD_ID
from zmqexec.bus.zeromq.endpoints import CONTROL, bind, make_place
from zmqexec.child import Child
from zmqexec.config import EngineConfig, SamplingParams, parse_config
from zmqexec.demo import CHECKPOINT as DEMO_CHECKPOINT
from zmqexec.errors import (
    BusError,
    DriverDied,
    EngineClosed,
    InternalError,
    ProtocolError,
    StartupError,
    ZmqexecError,
    from_info,
)
from zmqexec.frontend import FrontEnd, OpenRequest, Prompt, Sample, load_tokenizer
from zmqexec.outputs import RequestOutput
from zmqexec.protocol import (
    AbortRequests,
    EngineFailed,
    EngineInfo,
    EngineProgress,
    EngineReady,
    EngineStats,
    EngineUpdates,
    FromEngine,
    StartEngine,
    StopEngine,
    ToEngine,
)
from zmqexec.text import Tokenizer

if TYPE_CHECKING:
    from zmqexec.bus.observer import Observer
    from zmqexec.bus.statistics import Snapshot

STOP_GRACE_S = 3.0
"""How long the driver process may take to end its workers and itself."""

OnProgress = Callable[[EngineProgress], None]


class Stream:
    """What `generate` waits on: the items of one request, and whether an error ended it."""

    def __init__(self, request: OpenRequest, output: Literal["cumulative", "delta", "final"]) -> None:
        self.request = request
        self.output = output
        self.items: asyncio.Queue[RequestOutput | ZmqexecError | None] = asyncio.Queue()

    def take(self, moved: Sample | None) -> None:
        """Queue what one step brought for a sample, or an abort for all of them.

        Cumulative outputs are made when they are read: a slow reader skips some.
        """
        if self.output == "delta":
            self.items.put_nowait(self.request.output("delta", moved))
        elif self.request.finished or (self.output == "cumulative" and self.items.empty()):
            self.items.put_nowait(None)


class AsyncEngine:
    """The asyncio front end of an engine. Made by `start`, ended by `close` or `async with`.

        async with await AsyncEngine.start(EngineConfig(model="path/to/checkpoint")) as engine:
            async for out in engine.generate("12+30=", SamplingParams(max_tokens=16)):
                print(out.outputs[0].text)

    `error` is set once the engine is dead; open and later calls to `generate` raise it. An engine that nobody closes
    ends when its event loop has ended and nothing refers to it, or with this process.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._place = make_place(None, None, 1)
        self._endpoint = self._place.endpoint(0, CONTROL)
        context = zmq.asyncio.Context()
        self._socket = context.socket(zmq.PAIR)
        self._owned = contextlib.ExitStack()
        self._owned.callback(self._place.close)
        self._owned.callback(context.destroy, linger=0)
        self._owned.callback(self._socket.close)
        # For an engine that nobody closed: its context would wait for its socket for ever, at the latest at exit.
        self._release = weakref.finalize(self, _release, self._owned, os.getpid())
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = 0
        bind(self._socket, self._endpoint, 0, None)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._config = config
        self._child: Child | None = None
        self._observer: Observer | None = None
        self._front: FrontEnd | None = None
        self._streams: dict[str, Stream] = {}
        self._counter = itertools.count()
        self._receiver: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Future[Any]] = set()
        self._dead = asyncio.Event()
        self._is_closed = False
        self.error: ZmqexecError | None = None
        self.stats = EngineStats()

    @classmethod
    async def start(
        cls,
        config: EngineConfig | None = None,
        *,
        on_progress: OnProgress | None = None,
        chat_template: str | None = None,
        **settings: Any,
    ) -> Self:
        """Start the driver process and its workers; returns when the engine serves.

        Settings come as an `EngineConfig` or as keywords. `chat_template` (jinja text) replaces the checkpoint's own.
        """
        engine = cls(config if config is not None else parse_config(EngineConfig, settings))
        try:
            await engine._start(on_progress or (lambda progress: None), chat_template)
        except BaseException:
            await engine.close()
            raise
        return engine

    async def _start(self, on_progress: OnProgress, chat_template: str | None) -> None:
        folder = Path(self._config.tokenizer or self._config.model or DEMO_CHECKPOINT).expanduser()
        tokenizer = None
        if folder.is_dir() or self._config.tokenizer is not None:  # a missing model is the driver's to report
            tokenizer = await asyncio.to_thread(load_tokenizer, folder, chat_template)
        self._child = Child("driver", {"endpoint": self._endpoint})
        self._owned.callback(self._child.close)
        asyncio.get_running_loop().add_reader(self._child.end_fd, self._on_driver_exit)
        self._send(StartEngine(self._config))
        deadline = time.monotonic() + self._config.start_timeout_s
        while self._front is None:
            match await self._receive_before(deadline):
                case EngineProgress() as progress:
                    on_progress(progress)
                case EngineReady(info):
                    self._front = FrontEnd(info, tokenizer)
                case EngineFailed(error):
                    raise from_info(error.kind, error.message, error.param)
        self._receiver = asyncio.create_task(self._receive_updates())

    async def _receive_before(self, deadline: float) -> FromEngine:
        """The next message; raises when the driver process ends or the deadline passes."""
        receiving = asyncio.ensure_future(self._socket.recv())
        dying = asyncio.ensure_future(self._dead.wait())
        try:
            await asyncio.wait(
                (receiving, dying), timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
            )
            if receiving.done():
                return self._decoder.decode(receiving.result())
            if self.error is not None:
                raise self.error
            raise StartupError(f"the engine was not ready within start_timeout_s={self._config.start_timeout_s}")
        finally:
            receiving.cancel()
            dying.cancel()

    @property
    def info(self) -> EngineInfo:
        """What is being served."""
        return self._open_front().info

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if it has none."""
        return self._open_front().tokenizer

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
        output: Literal["cumulative", "delta", "final"] = "cumulative",
    ) -> AsyncIterator[RequestOutput]:
        """The outputs of one request as they come; leaving the iteration early aborts it.

        cumulative  all so far; a slow reader sees fewer, longer steps
        delta       what one step brought for one sample: text, token ids and log-probabilities that are new
        final       once, at the end

        `RequestError` at the first item for a request that is wrong; the engine's `error` when it dies.
        """
        front = self._open_front()
        name = request_id if request_id is not None else f"r{next(self._counter)}"
        request, sequences = front.prepare(
            name, prompt, params or SamplingParams(), cache_salt=cache_salt, add_special_tokens=add_special_tokens
        )
        stream = Stream(request, output)
        front.open(request)
        self._streams[name] = stream
        try:
            for sequence in sequences:
                self._send(sequence)
            while True:
                item = await stream.items.get()
                if isinstance(item, ZmqexecError):
                    raise item
                result = request.output("cumulative") if item is None else item
                yield result
                if result.finished:
                    return
        finally:
            if self._streams.get(name) is stream:  # an aborted request's id may be in use again
                del self._streams[name]
                aborted = front.abort(name)
                if aborted and self.error is None and not self._is_closed:
                    self._send(AbortRequests(aborted))

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator yields a last output with finish_reason abort. Unknown ids are ignored."""
        aborted = self._open_front().abort(request_id)
        if aborted:
            self._send(AbortRequests(aborted))
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.take(None)

    def bus_snapshot(self) -> Snapshot | None:
        """How the bus stands, read from its shared memory: the driver is not asked. None where there is none to see."""
        if self._is_closed or BUILD_ID == "none":
            return None
        from zmqexec.bus.observer import engines_of

        if self._observer is None and self._child is not None and self.error is None:
            with contextlib.suppress(OSError, BusError):  # it has ended just now, or may not be looked at
                for observer in engines_of(self._child.pid):
                    self._owned.callback(observer.close)
                    self._observer = observer
        with contextlib.suppress(ProtocolError):  # damaged: whatever else there is to show goes on being shown
            return None if self._observer is None else self._observer.snapshot()
        return None

    async def wait_dead(self) -> ZmqexecError:
        """Resolves when the engine has died, with the reason."""
        await self._dead.wait()
        assert self.error is not None
        return self.error

    async def _receive_updates(self) -> None:
        """Take in every step's updates until the engine ends. An error here ends it, or streams would wait for ever."""
        front = self._open_front()
        try:
            while self.error is None:
                self._take(self._decoder.decode(await self._socket.recv()), front)
        except Exception as error:
            traceback.print_exc()
            self._die(InternalError(f"{type(error).__name__} in the front end: {error}"))

    def _take(self, message: FromEngine, front: FrontEnd) -> None:
        match message:
            case EngineUpdates(updates, stats):
                self.stats = stats
                aborted = []
                for request, sample, must_abort in front.apply(updates):
                    if must_abort:
                        aborted.append(request.sequence_id(sample.index))
                    stream = self._streams.get(request.request_id)
                    if stream is not None:
                        stream.take(sample)
                if aborted:
                    self._send(AbortRequests(aborted))
            case EngineFailed(error):
                self._die(from_info(error.kind, error.message, error.param))

    def _on_driver_exit(self) -> None:
        """The driver process has ended. What it sent before is still to be read, and says more than its exit."""
        assert self._child is not None
        asyncio.get_running_loop().remove_reader(self._child.end_fd)
        asyncio.get_running_loop().call_later(0.1, self._die_of_exit, self._child)

    def _die_of_exit(self, child: Child) -> None:
        self._die(DriverDied(f"the driver process (pid {child.pid}) died: {child.describe_exit()}"))

    def _die(self, error: ZmqexecError) -> None:
        if self.error is None and not self._is_closed:
            self.error = error
            self._dead.set()
            for stream in self._streams.values():
                stream.items.put_nowait(error)

    def _send(self, message: ToEngine) -> None:
        """Send without waiting: the PAIR has no limit. The future is kept because asyncio does not."""
        sending = asyncio.ensure_future(self._socket.send(self._encoder.encode(message)))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    def _open_front(self) -> FrontEnd:
        if self.error is not None:
            raise self.error
        if self._front is None or self._is_closed:
            raise EngineClosed("the engine has been closed")
        return self._front

    async def close(self) -> None:
        """End the driver process and its workers. Idempotent; open requests raise `EngineClosed`."""
        if self._is_closed:
            return
        self._is_closed = True
        for stream in self._streams.values():
            stream.items.put_nowait(EngineClosed("the engine has been closed"))
        if self._receiver is not None:
            self._receiver.cancel()
        try:
            if self._child is not None:
                asyncio.get_running_loop().remove_reader(self._child.end_fd)
                with contextlib.suppress(zmq.ZMQError, TimeoutError):  # it may be gone already
                    await asyncio.wait_for(self._socket.send(self._encoder.encode(StopEngine())), 1.0)
                await asyncio.to_thread(self._child.wait, STOP_GRACE_S if self.error is None else 0.5)
        finally:  # also when whoever closes us is cancelled
            self._release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


def _release(owned: contextlib.ExitStack, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a fork of the user's process must not end its parent's engine
        owned.close()
