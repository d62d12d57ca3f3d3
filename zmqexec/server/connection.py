"""The HTTP side of one request: head and body bounded in size and time, clients that have gone, OpenAI's errors.

Runs in: server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import h11
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from zmqexec.errors import EngineClosed, UserError, ZmqexecError

HEAD_TIMEOUT_S = 60.0
"""The head of a request must be whole by then; connections that never send one would use up the file descriptors."""
BODY_TIMEOUT_S = 60.0
"""A body must not stand still for longer."""
DISCARD_TIMEOUT_S = 2.0
DISCARD_FACTOR = 4
"""A body over the limit is still read, this many limits and seconds at most: a client that is cut off while it writes
sees a broken connection instead of the answer."""
WRITE_TIMEOUT_S = 300.0
"""A client that reads nothing for so long has gone, whatever its connection says."""
FAREWELL_TIMEOUT_S = 0.5
MAX_MESSAGE_CHARS = 1000

ERROR_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestEntityTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class HttpError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, param: str | None = None, *, close: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.close = close

    @classmethod
    def of(cls, error: Exception) -> HttpError:
        """400 for the client's mistakes, 503 while closing, 500 for all else."""
        match error:
            case HttpError():
                return error
            case EngineClosed():
                return cls(503, "the server is shutting down")
            case UserError():
                return cls(400, str(error), error.param)
            case ZmqexecError():
                return cls(500, f"the engine has failed: {error}")
            case _:
                return cls(500, "internal error")

    def body(self) -> bytes:
        """The JSON that says what is wrong, bounded however long the values in its message are."""
        message = str(self).encode("utf-8", "replace").decode()
        if len(message) > MAX_MESSAGE_CHARS:
            message = message[:MAX_MESSAGE_CHARS] + " …"
        kind = ERROR_TYPES.get(self.status, "Error")
        return msgspec.json.encode(
            {"error": {"message": message, "type": kind, "param": self.param, "code": self.status}}
        )

    def response(self) -> Response:
        """As a response."""
        headers = {"connection": "close"} if self.close else {}
        return Response(self.body(), self.status, headers, "application/json")


class HttpProtocol(H11Protocol):
    """uvicorn's protocol on h11, with a deadline for the head of a request, for which it would wait for ever.

    Its other one, on httptools, has no limit on the size of headers.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


async def read_body(request: Request, limit: int) -> bytes:
    """The body of at most `limit` bytes; `HttpError` 413 for a larger one, 408 for one that does not come."""
    declared = request.headers.get("content-length", "")
    body = bytearray()
    more, too_large = True, declared.isdigit() and int(declared) > limit
    while more and not too_large:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                message = await request.receive()
        except TimeoutError:
            raise HttpError(408, f"no more of the body came within {BODY_TIMEOUT_S:.0f} s", close=True) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        more, too_large = bool(message.get("more_body")), len(body) > limit
    if too_large:
        if more:
            await _discard(request.receive, DISCARD_FACTOR * limit)
        raise HttpError(413, f"the body is larger than the limit of {limit} bytes", close=True)
    return bytes(body)


async def _discard(receive: Receive, max_bytes: int) -> None:
    try:
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while max_bytes > 0:
                message = await receive()
                max_bytes -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return
    except TimeoutError:
        return


class ClientGone(Exception):
    """The client has closed the connection, or stopped reading for good, before the end."""


class Reply:
    """The sending half of a request, which remembers how far the answer has got."""

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send = send
        self._headers = headers
        self.started = False
        self.finished = False

    async def start_events(self) -> None:
        """Begin a stream of server-sent events."""
        # Proxies that buffer would turn a stream of tokens into one block.
        headers = self._headers | {"cache-control": "no-cache", "x-accel-buffering": "no"}
        await self._start(200, "text/event-stream; charset=utf-8", headers)

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Part of the body. Waits while the client does not read; `ClientGone` at the deadline."""
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        except TimeoutError:
            raise ClientGone from None
        self.finished = last

    async def whole(self, status: int, body: bytes, *, close: bool = False) -> None:
        """A complete JSON answer."""
        headers = self._headers | {"content-length": str(len(body))} | ({"connection": "close"} if close else {})
        await self._start(status, "application/json", headers)
        await self.write(body, last=True)

    async def fail(self, error: HttpError) -> None:
        """Say what went wrong: as the answer, or as the last event of a stream that has begun."""
        if self.finished:
            return
        if self.started:
            await self.write(b"data: " + error.body() + b"\n\ndata: [DONE]\n\n", last=True)
        else:
            await self.whole(error.status, error.body(), close=error.close)

    async def _start(self, status: int, content_type: str, headers: dict[str, str]) -> None:
        self.started = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        raw.append((b"content-type", content_type.encode("latin-1")))
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


class WatchedResponse(Response):
    """Runs `work(reply)` and cancels it as soon as the client has gone, whether or not anything is being sent.

    No framework notices by itself that a client which waits for an answer has left, and a client that has stopped
    reading blocks the sender, so someone else has to listen for the end of the connection.
    """

    def __init__(self, work: Callable[[Reply], Awaitable[None]], headers: dict[str, str]) -> None:
        self._work = work
        self._extra_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, self._extra_headers)
        work = asyncio.ensure_future(self._run(reply))
        gone = asyncio.ensure_future(_wait_disconnect(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # The time to finish after SIGTERM is over. The client is told, unless it does not read.
            await _end(work)
            try:
                async with asyncio.timeout(FAREWELL_TIMEOUT_S):
                    await reply.fail(HttpError(503, "the server is shutting down", close=True))
            except TimeoutError:
                return
        finally:
            await _end(work)
            await _end(gone)

    async def _run(self, reply: Reply) -> None:
        try:
            await self._work(reply)
        except ZmqexecError as error:
            await reply.fail(HttpError.of(error))
        except HttpError as error:
            await reply.fail(error)
        except ClientGone:
            return  # an answer without end, at which the connection is closed


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[None]) -> None:
    """Cancel a task and wait for its end; an error of its own is raised."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
