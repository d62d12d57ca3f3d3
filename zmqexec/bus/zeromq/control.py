"""What driver and worker say to each other beside the lanes: who is there, what it is doing, and that it leaves.

Runs in: driver | worker.

    worker                                   driver
    Hello      ── who I am ──────────────▶
               ◀───────────── Welcome ──     epoch, where the lanes are, how much may be under way
                              Refused ──     why not
               ◀───────────── Ask ──────     what are you doing? (`status`)
    Answer     ─────────────────────────▶    also unasked, when there is an error to tell
    Broken     ── a lane of mine ended ──▶
               ◀───────────── Closing ──     nothing more is taken; what was published still comes
    Bye        ── I leave in good order ─▶

On either side a service thread owns the control sockets; it sleeps unless something is said. A rank joins once: what a
broken connection lost would be missing, so that a rank whose connection ended is lost.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec
import zmq

from zmqexec.bus.zeromq.lane import Context, Socket, readable
from zmqexec.errors import ProtocolError

EVENT = struct.Struct("=HI")
FAILURES = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_AUTH
"""Not HANDSHAKE_FAILED_PROTOCOL: libzmq 4.3.5 reports by it also a message that was tampered with, forgets its errno
over the report, and leaves the connection open but deaf. Unreported, such a message ends the connection.
"""

WATCHED = (
    FAILURES | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.ACCEPTED | zmq.Event.ACCEPT_FAILED | zmq.Event.DISCONNECTED
)


class Control(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Base of what is said."""


class Hello(Control, tag=1, frozen=True):
    """A worker is there. `version` is the package's: a bus is of one version."""

    version: str
    rank: int
    pid: int


class Answer(Control, tag=2, frozen=True):
    """What the rank is doing, since `age_ns`: the clocks of two hosts cannot be compared. number: that of the `Ask`."""

    number: int
    pid: int
    phase: int
    step_id: int
    age_ns: int
    error: str


class Broken(Control, tag=3, frozen=True):
    """A lane's connection ended on its own."""

    lane: str


class Bye(Control, tag=4, frozen=True):
    """The rank leaves and takes no more messages."""


ControlToDriver = Hello | Answer | Broken | Bye


class Welcome(Control, tag=1, frozen=True):
    """The rank is admitted. `down` and `up`: see `endpoints.lane_name`."""

    epoch: int
    num_workers: int
    down: str
    up: str
    window_messages: int
    window_bytes: int
    max_message_bytes: int


class Refused(Control, tag=2, frozen=True):
    """The rank is not admitted."""

    reason: str


class Ask(Control, tag=3, frozen=True):
    """Answer with this number."""

    number: int


class Closing(Control, tag=4, frozen=True):
    """The driver closes the bus."""


ControlToWorker = Welcome | Refused | Ask | Closing

encode = msgspec.msgpack.Encoder().encode
_to_driver: msgspec.msgpack.Decoder[ControlToDriver] = msgspec.msgpack.Decoder(ControlToDriver)
_to_worker: msgspec.msgpack.Decoder[ControlToWorker] = msgspec.msgpack.Decoder(ControlToWorker)


def decode_to_driver(data: bytes, sender: str) -> ControlToDriver:
    """ProtocolError: nothing that a worker of this version says."""
    try:
        return _to_driver.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{sender} said what no worker of this version says: {error}") from error


def decode_to_worker(data: bytes) -> ControlToWorker:
    """ProtocolError: nothing that a driver of this version says."""
    try:
        return _to_worker.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"the driver said what no driver of this version says: {error}") from error


def say(socket: Socket, message: Control) -> bool:
    """Send; False: nobody is there, or has not listened for long."""
    try:
        socket.send(encode(message), zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True


class Monitor:
    """libzmq's reports about the connections of `socket`. One thread drains them.

    open      file descriptors of the connections there are, of a bound socket
    refused   connections of a bound socket that ended without having been admitted
    """

    def __init__(self, context: Context, socket: Socket, name: str) -> None:
        self.open: set[int] = set()
        self.refused = 0
        self._unknown: set[int] = set()
        self._admitted: set[int] = set()
        self._num_unmatched = 0
        self._failed = False
        self._source = socket
        endpoint = f"inproc://monitor-{name}"
        socket.monitor(endpoint, WATCHED)
        self.socket = context.socket(zmq.PAIR)
        self.socket.linger = 0
        self.socket.connect(endpoint)

    def events(self) -> Iterator[tuple[int, int]]:
        """(event, value) of what was reported since."""
        while readable(self.socket):
            report = self.socket.recv_multipart(zmq.NOBLOCK)
            yield EVENT.unpack(report[0])

    def ended(self) -> list[int]:
        """File descriptors of the connections that ended since, in order.

        A handshake's report does not say which connection it is about, but a failed one is followed by the end of its
        connection at once; and one that succeeded while a single connection was unknown was that one's. So a stranger
        who comes while a rank joins may be missing in `refused`, but nobody is counted who should not be.
        """
        ended = []
        for event, value in self.events():
            if event == zmq.Event.ACCEPTED:
                self.open.add(value)
                self._unknown.add(value)
            elif event == zmq.Event.ACCEPT_FAILED:
                self.refused += 1
            elif event == zmq.Event.HANDSHAKE_SUCCEEDED:
                if len(self._unknown) == 1:
                    self._admitted.add(self._unknown.pop())
                else:
                    self._num_unmatched += 1
            elif event & FAILURES:
                self._failed = True
            elif event == zmq.Event.DISCONNECTED:
                self._count_end(value)
                ended.append(value)
        return ended

    def close(self) -> None:
        """Stop the reports first: libzmq would wait for ever to report to a socket that is gone."""
        if not self._source.closed:
            self._source.monitor(None, 0)
        self.socket.close(linger=0)

    def _count_end(self, fd: int) -> None:
        self.open.discard(fd)
        self._unknown.discard(fd)
        if fd in self._admitted:
            self._admitted.remove(fd)
        elif self._failed or self._num_unmatched == 0:
            self.refused += 1
        else:
            self._num_unmatched -= 1
        self._failed = False
