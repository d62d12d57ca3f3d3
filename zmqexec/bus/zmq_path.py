"""What is larger than the ring travels by ZeroMQ, announced in the ring so that the order holds.

Runs in: driver | worker.

The writer publishes a small `Announcement` in the ring, then sends the payload on one PUSH socket per reader; a reader
that comes to the announcement fetches the payload from its PULL socket before it reads on. Contexts, threads and
sockets exist only from the first such payload on.

Endpoints are Linux abstract sockets (`ipc://@...`): they have no file, so a killed process leaves none behind, and no
path length or directory permission matters. What a directory's mode 0700 would do is done at the connection: libzmq
asks the kernel who connects, and admits this user's processes only (the name, 128 random bits, is visible to all in
/proc/net/unix).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import zmq

from zmqexec.errors import BusClosed, BusError, BusTimeout, ProtocolError

ENDPOINT_PREFIX = "ipc://@zmqexec-"
ENDPOINT = re.compile(rf"{ENDPOINT_PREFIX}[0-9a-f]{{32}}")
IPC_FILTER_UID = 59  # ZMQ_IPC_FILTER_UID; pyzmq has no name for it
HEADER = struct.Struct("<QQ")  # number and num_bytes of its announcement, before each payload
POLL_MS = 10  # how often a sender or receiver looks whether it should give up
CONTEXT_FDS = 5  # of libzmq's threads, from a context's first socket on
SENDER_FDS = 3  # a PUSH socket, its listener, and the connection of its reader
RECEIVER_FDS = 2


def new_endpoint() -> str:
    """A name that nobody has and nobody can guess. Whoever binds it sets `IPC_FILTER_UID` first."""
    return f"{ENDPOINT_PREFIX}{secrets.token_hex(16)}"


class Announcement(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Stands in the ring for a payload that comes by ZeroMQ.

    number       counts the announcements of this ring, from 0
    num_bytes    length of the payload
    endpoint     reader i connects to f"{endpoint}-{i}"
    """

    number: int
    num_bytes: int
    endpoint: str


encode = msgspec.msgpack.Encoder().encode
decode_announcement = msgspec.msgpack.Decoder(Announcement).decode


class ZmqSender:
    """The writer's end: one bound PUSH socket per reader. One sending thread; `close` from any.

    Sockets are used and closed under the lock. A sender holds it for as long as it sends, but looks every `POLL_MS`
    whether it should give up, which bounds how long `close` waits.
    """

    def __init__(self, num_readers: int) -> None:
        self._num_readers = num_readers
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._sockets: list[zmq.Socket[bytes]] = []
        self._endpoint = ""
        self._number = 0
        self._closed = False

    def announce(self, num_bytes: int) -> bytes:
        """The record to publish before `send`. BusError: the system has no sockets for us."""
        with self._lock:
            if self._closed:
                raise BusClosed("the bus was closed in this process")
            if self._context is None:
                self._open()
        return encode(Announcement(self._number, num_bytes, self._endpoint))

    def send(self, payload: bytes | bytearray, timeout_s: float, check: Callable[[], None] | None = None) -> None:
        """Hand `payload` to ZeroMQ for every reader. Call it once the announcement is published.

        `check` is called every few milliseconds and may raise. After any error here a reader waits for a payload that
        never comes: the bus cannot go on.
        """
        deadline = time.monotonic() + timeout_s
        # One copy for all readers, counted by libzmq; pyzmq's own zero-copy would leave a thread behind.
        message = zmq.Frame(b"".join((HEADER.pack(self._number, len(payload)), payload)), copy=True)
        waiting = dict(enumerate(self._sockets))
        with self._lock:
            while True:
                if self._closed:
                    raise BusClosed("the bus was closed in this process")
                for reader, socket in list(waiting.items()):
                    if _try_send(socket, message):
                        del waiting[reader]
                if not waiting:
                    break
                if time.monotonic() >= deadline:
                    readers = ", ".join(map(str, waiting))
                    raise BusTimeout(
                        f"a payload of {len(payload)} bytes was not fetched within {timeout_s:.2g} s by rank {readers}"
                    )
                poller = zmq.Poller()
                for socket in waiting.values():
                    poller.register(socket, zmq.POLLOUT)
                poller.poll(POLL_MS)
                if check is not None:
                    check()
        self._number += 1

    def close(self) -> None:
        """Drop what is unsent and close the sockets. Idempotent, from any thread."""
        self._closed = True
        if os.getpid() != self._pid:
            return  # a fork: the sockets are its parent's, and so may be whoever holds the lock
        with self._lock:
            _destroy(self._context, self._sockets)
            self._context = None

    def __del__(self) -> None:
        self.close()

    def _open(self) -> None:
        endpoint = new_endpoint()
        with _opening(CONTEXT_FDS + SENDER_FDS * self._num_readers) as (context, sockets):
            for reader in range(self._num_readers):
                socket = context.socket(zmq.PUSH)
                sockets.append(socket)
                socket.linger = 0
                socket.sndhwm = 1  # payloads are large: let them wait here rather than in a queue
                socket.setsockopt(IPC_FILTER_UID, os.getuid())
                socket.bind(f"{endpoint}-{reader}")
        self._context, self._sockets, self._endpoint = context, sockets, endpoint


class ZmqReceiver:
    """Reader `index`'s end: a PULL socket, opened at the first payload. One receiving thread; `close` from any.

    `pending` is the announcement whose payload has not come yet; until it has, the reader must not read on.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._sockets: list[zmq.Socket[bytes]] = []
        self._number = 0
        self._closed = False
        self.pending: Announcement | None = None

    def expect(self, record: bytes) -> None:
        """Take an announcement from the ring. ProtocolError: it is none, or not the next."""
        try:
            announcement = decode_announcement(record)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"a record of {len(record)} bytes is no announcement: {error}") from error
        is_next = announcement.number == self._number and announcement.num_bytes >= 0
        if not is_next or ENDPOINT.fullmatch(announcement.endpoint) is None:
            raise ProtocolError(f"expected announcement {self._number}, got {announcement!r:.200}")
        self.pending = announcement

    def receive(self, deadline: float) -> bytes | None:
        """The pending payload; None where it has not come by `deadline` (monotonic), or within some milliseconds.

        ProtocolError: it is not what was announced. BusError: the system has no socket for us; it is still to come.
        """
        announcement = self.pending
        if announcement is None:
            return None
        with self._lock:
            if self._closed:
                raise BusClosed("the bus was closed in this process")
            if self._context is None:
                self._open(announcement.endpoint)
            socket = self._sockets[0]
            if not socket.poll(max(0, min(POLL_MS, math.ceil((deadline - time.monotonic()) * 1e3)))):
                return None
            message = socket.recv(zmq.NOBLOCK)
        if (
            message[: HEADER.size] != HEADER.pack(announcement.number, announcement.num_bytes)
            or len(message) != HEADER.size + announcement.num_bytes
        ):
            raise ProtocolError(f"{len(message)} bytes came by ZeroMQ, which are not those of {announcement}")
        self._number += 1
        self.pending = None
        return message[HEADER.size :]

    def close(self) -> None:
        """Close the socket. Idempotent, from any thread."""
        self._closed = True
        if os.getpid() != self._pid:
            return  # a fork: the sockets are its parent's, and so may be whoever holds the lock
        with self._lock:
            _destroy(self._context, self._sockets)
            self._context = None

    def __del__(self) -> None:
        self.close()

    def _open(self, endpoint: str) -> None:
        with _opening(CONTEXT_FDS + RECEIVER_FDS) as (context, sockets):
            socket = context.socket(zmq.PULL)
            sockets.append(socket)
            socket.linger = 0
            socket.rcvhwm = 1
            socket.connect(f"{endpoint}-{self._index}")
        self._context, self._sockets = context, sockets


@contextlib.contextmanager
def _opening(num_fds: int) -> Iterator[tuple[zmq.Context[zmq.Socket[bytes]], list[zmq.Socket[bytes]]]]:
    """A new context and a list for its sockets, which are destroyed again if the block fails.

    libzmq aborts the process where file descriptors run out while it starts its threads or lets a reader in. So we
    first see whether there are `num_fds` of them. Another thread may still take them in between, but a program without
    any left mostly has been so for a while.
    """
    probes: list[int] = []
    try:
        try:
            for _ in range(num_fds):
                probes.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        finally:
            for probe in probes:
                os.close(probe)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        sockets: list[zmq.Socket[bytes]] = []
        try:
            yield context, sockets
        except BaseException:
            _destroy(context, sockets)
            raise
    except (OSError, zmq.ZMQError) as error:
        raise BusError(
            f"a message larger than its ring travels by ZeroMQ, which takes {num_fds} file descriptors in this "
            f"process: {error}; raise the limit (ulimit -n), or ring_bytes"
        ) from error


def _try_send(socket: zmq.Socket[bytes], message: zmq.Frame) -> bool:
    """Queue the message; False while the socket has no peer or no room."""
    try:
        socket.send(message, zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return False
    return True


def _destroy(context: zmq.Context[zmq.Socket[bytes]] | None, sockets: list[zmq.Socket[bytes]]) -> None:
    while sockets:
        sockets.pop().close(linger=0)
    if context is not None:
        context.term()
