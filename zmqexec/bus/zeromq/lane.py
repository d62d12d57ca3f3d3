"""One direction between the driver and one rank: frames over a ZeroMQ PAIR socket, and credits the other way.

Runs in: driver | worker.

A sender may have `Window.messages` messages, and payloads of about `Window.max_bytes`, under way: sent, and not yet
taken by the receiving program. The receiver says what it has taken in cumulative credits, a quarter of the window at a
time. libzmq's own high-water marks stand a little above and are never reached, so

    memory is bounded in bytes, which marks in messages alone would not do
    a send never blocks, and what was sent is soon in the receiver's memory, whether it reads or not
    the sender knows exactly who holds it back, and that a rank has joined: the first credit says so

PAIR, because it talks to one peer only: a second connection, even with the right key, gets nothing. A lane's socket is
used by one thread at a time; its owner sees to that.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import cast

import zmq

from zmqexec.bus.zeromq import frames as frames
from zmqexec.errors import ProtocolError

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

SPARE_FRAMES = 32  # room in libzmq's queues for credits and the closing frame
SHARED_FROM_BYTES = 16 << 10
"""From this size on a broadcast is copied once, into a message that libzmq counts references of."""


@dataclass(frozen=True, slots=True)
class Window:
    """How much may be under way on a lane.

    A message may be sent while both are below their bounds, so that one large message more than `max_bytes` may be
    under way: a message is never too large for the window.
    """

    messages: int
    max_bytes: int

    @property
    def high_water_mark(self) -> int:
        """For libzmq's queues: never reached by a peer that keeps to the window."""
        return self.messages + SPARE_FRAMES


@dataclass(slots=True)
class Counters:
    """What was refused. Incremented by whichever thread sees it; each kind is seen by one thread of a channel.

    stale              frames of another epoch, dropped
    checksum_failures  frames whose bytes had changed
    gaps               frames that were not the next one: something was lost or came twice
    """

    stale: int = 0
    checksum_failures: int = 0
    gaps: int = 0


class LaneSender:
    """The sending end. `peer` names the other end in errors.

    taken ≤ sent; the messages [taken, sent) are under way.
    """

    def __init__(
        self, socket: Socket, peer: str, epoch: int, window: Window, counters: Counters, *, joined: bool
    ) -> None:
        """joined: whether the receiver is known to be there; otherwise its first credit says so."""
        self.socket = socket
        self.joined = joined
        self._peer = peer
        self._epoch = epoch
        self._window = window
        self._counters = counters
        self._sent = self._sent_bytes = 0
        self._taken = self._taken_bytes = 0

    @property
    def under_way(self) -> int:
        """Messages sent and, as far as we know, not yet taken."""
        return self._sent - self._taken

    def has_room(self) -> bool:
        """Whether a message may be sent. ProtocolError: what came back is no credit."""
        if self._fits():
            return True
        while readable(self.socket):
            self._take_credit(self.socket.recv(zmq.NOBLOCK))
        return self._fits()

    def _fits(self) -> bool:
        window = self._window
        return (
            self.joined
            and self._sent - self._taken < window.messages
            and self._sent_bytes - self._taken_bytes < window.max_bytes
        )

    def _take_credit(self, data: bytes) -> None:
        kind, epoch, _, payload = _parse(data, self._peer, self._counters)
        if epoch != self._epoch:
            self._counters.stale += 1
            return
        if kind != frames.CREDIT or len(payload) != frames.CREDIT_PAYLOAD.size:
            raise ProtocolError(f"a frame of kind {kind} from {self._peer} where only credits may come")
        taken, taken_bytes = frames.CREDIT_PAYLOAD.unpack(payload)
        if not (self._taken <= taken <= self._sent and self._taken_bytes <= taken_bytes <= self._sent_bytes):
            raise ProtocolError(f"{self._peer} claims to have taken {taken} of {self._sent} messages")
        self.joined, self._taken, self._taken_bytes = True, taken, taken_bytes

    def send(self, frame: bytearray | zmq.Frame, num_bytes: int) -> bool:
        """Send a sealed frame with `num_bytes` of payload. Call it when there is room. False: the peer is gone."""
        try:
            self.socket.send(frame, zmq.NOBLOCK, copy=not isinstance(frame, zmq.Frame))
        except zmq.Again:
            return False
        self._sent += 1
        self._sent_bytes += num_bytes
        return True

    def send_close(self, sequence: int) -> None:
        """Say that nothing more will come, to whoever is still there."""
        with contextlib.suppress(zmq.Again):
            self.socket.send(frames.make(frames.CLOSE, self._epoch, sequence), zmq.NOBLOCK)


class LaneReceiver:
    """The receiving end. `closed` once the sender has said that nothing more will come."""

    def __init__(self, socket: Socket, peer: str, epoch: int, window: Window, counters: Counters) -> None:
        self.socket = socket
        self.closed = False
        self._peer = peer
        self._epoch = epoch
        self._counters = counters
        self._credit_messages = max(1, window.messages // 4)
        self._credit_bytes = max(1, window.max_bytes // 4)
        self._sequence = 0
        self._taken = self._taken_bytes = 0
        self._told = self._told_bytes = 0
        self._credits = 0

    def join(self) -> None:
        """Tell the sender that we are there."""
        self._send_credit()

    def try_receive(self) -> memoryview | None:
        """The next payload, or None while there is none.

        ProtocolError: a frame that is none, was damaged, or is not the next; the one after it may still be received.
        """
        while not self.closed and readable(self.socket):
            received = self.socket.recv(zmq.NOBLOCK, copy=False)
            try:
                kind, epoch, sequence, payload = _parse(received.buffer, self._peer, self._counters)
            except frames.ChecksumError:
                self._sequence += 1  # most likely it was the next one; if not, the one after it shows a gap
                raise
            if epoch != self._epoch:
                self._counters.stale += 1
                continue
            expected = self._sequence
            if sequence != expected:
                self._counters.gaps += 1
                self._sequence = max(expected, sequence + 1)
                raise ProtocolError(
                    f"frame {sequence} from {self._peer} where {expected} was expected: "
                    + ("frames were lost" if sequence > expected else "it came twice")
                )
            if kind == frames.CLOSE:
                self.closed = True
                return None
            if kind != frames.DATA:
                raise ProtocolError(f"a frame of unknown kind {kind} from {self._peer}")
            self._sequence = sequence + 1
            self._taken += 1
            self._taken_bytes += len(payload)
            if (
                self._taken - self._told >= self._credit_messages
                or self._taken_bytes - self._told_bytes >= self._credit_bytes
            ):
                self._send_credit()
            return payload
        return None

    def _send_credit(self) -> None:
        payload = frames.CREDIT_PAYLOAD.pack(self._taken, self._taken_bytes)
        try:
            self.socket.send(frames.make(frames.CREDIT, self._epoch, self._credits, payload), zmq.NOBLOCK)
        except zmq.Again:
            return  # the sender is gone
        self._credits += 1
        self._told, self._told_bytes = self._taken, self._taken_bytes


def readable(socket: Socket) -> bool:
    """Whether something can be received, without the exception that trying would cost."""
    return bool(cast(int, socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def shareable(frame: bytearray) -> bytearray | zmq.Frame:
    """What to send to several peers: a large frame is copied here, once, and never again.

    pyzmq's own zero-copy would leave a thread behind.
    """
    return zmq.Frame(frame, copy=True) if len(frame) >= SHARED_FROM_BYTES else frame


def _parse(data: bytes | memoryview, peer: str, counters: Counters) -> frames.Frame:
    try:
        return frames.parse(data, peer)
    except frames.ChecksumError:
        counters.checksum_failures += 1
        raise
