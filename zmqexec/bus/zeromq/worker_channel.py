"""A worker's end of the bus over ZeroMQ alone; see driver_channel.py.

Runs in: worker.
"""

from __future__ import annotations

import threading
import time
import weakref
from time import monotonic_ns
from typing import Self

import msgspec
import zmq

from zmqexec.bus.status import Phase
from zmqexec.bus.zeromq.codec import check_size, decode
from zmqexec.bus.zeromq.endpoints import (
    DEFAULT_LINGER_S,
    DEFAULT_LOST_AFTER_S,
    parse_tcp,
)
from zmqexec.bus.zeromq.frames import DATA, HEADER_BYTES, seal
from zmqexec.bus.zeromq.keys import WorkerKeys, check_curve
from zmqexec.bus.zeromq.wake import Gate, deadline_after, leave_in, poll_ms, take_turn
from zmqexec.bus.zeromq.worker_end import WorkerEnd
from zmqexec.bus.zeromq.worker_service import ERROR_BYTES
from zmqexec.errors import BusClosed, BusTimeout, ConfigError
from zmqexec.protocol import ToDriver, ToWorker


class ZmqWorkerChannel:
    """A worker's end: receives what the driver publishes, replies to it.

    One thread receives and one (the same or another) replies; the rest may come from any.
    """

    def __init__(self, end: WorkerEnd, rank: int) -> None:
        """Takes over `end`; `connect` is the usual way."""
        self._end = end
        self._state = end.state
        self._gate = Gate(end.wake, lambda: leave_in(end.tear_down, end.service.is_own_thread))
        weakref.finalize(self, self._gate.close)  # also at exit, while the service thread can still run
        self._receiving = threading.RLock()
        self._replying = threading.RLock()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
        self._buffer = bytearray(HEADER_BYTES)
        self._sequence = 0
        self._message_poller = zmq.Poller()
        self._message_poller.register(end.inbox.socket, zmq.POLLIN)
        self._message_poller.register(end.message_wake.fd, zmq.POLLIN)
        self._space_poller = zmq.Poller()
        self._space_poller.register(end.outbox.socket, zmq.POLLIN)
        self._space_poller.register(end.space_wake.fd, zmq.POLLIN)
        self.rank = rank
        self.num_workers = end.welcome.num_workers
        self.epoch = end.welcome.epoch

    @classmethod
    def connect(
        cls,
        endpoint: str,
        rank: int,
        *,
        keys: WorkerKeys | None = None,
        timeout_s: float = 60.0,
        lost_after_s: float = DEFAULT_LOST_AFTER_S,
        linger_s: float = DEFAULT_LINGER_S,
    ) -> ZmqWorkerChannel:
        """Rank `rank`'s end of the bus, at the endpoint that its driver made for it.

        keys          for tcp://, and only then
        timeout_s     how long to wait for the driver
        lost_after_s  over TCP, a driver that is not heard of for so long is lost
        linger_s      how long `close` may take to hand over what was replied

        ConfigError: the settings do not go together. BusTimeout: nobody answered. BusError: we are not admitted.
        """
        is_remote = endpoint.startswith("tcp://")
        if is_remote:
            parse_tcp(endpoint)
            if keys is None:
                raise ConfigError(f"{endpoint} needs keys: without, nobody knows who answers there", "keys")
            check_curve()
            if keys.rank != rank:
                raise ConfigError(f"these are the keys of rank {keys.rank}, not of rank {rank}", "keys")
        elif not endpoint.startswith("ipc://"):
            raise ConfigError(f"{endpoint!r} is neither tcp://HOST:PORT nor ipc://...", "connect")
        elif keys is not None:
            raise ConfigError("keys are for tcp://HOST:PORT; on one machine the kernel says who connects", "keys")
        if not (lost_after_s > 0 and linger_s >= 0):
            raise ConfigError(f"{lost_after_s=} must be positive and {linger_s=} not negative")
        deadline = deadline_after(timeout_s)
        return cls(WorkerEnd(endpoint, rank, keys, deadline, lost_after_s if is_remote else None, linger_s), rank)

    @property
    def closed(self) -> bool:
        """Whether the bus was closed, by the driver or here, or the driver is lost.

        What was published before can still be received.
        """
        return self._gate.closed or bool(self._end.why_closed)

    def try_receive(self) -> ToWorker | None:
        """The next message, or None while there is none. BusClosed: there will be none. ProtocolError: no message."""
        with self._gate:
            if not self._receiving.acquire(blocking=False):
                return None  # another thread is receiving, and will get it
            try:
                ended = self._end.state.down_ended  # before we look: what came before the end is still delivered
                payload = self._end.inbox.try_receive()
                if payload is not None:
                    return decode(self._decoder, payload, "the driver")
                if self._end.inbox.closed:
                    raise BusClosed(self._end.why_closed)
                if ended:
                    raise BusClosed(ended)
            finally:
                self._receiving.release()
        return None

    def receive(self, timeout_s: float) -> ToWorker | None:
        """The next message; None at the deadline."""
        deadline = deadline_after(timeout_s)
        with self._gate:
            if not take_turn(self._receiving, timeout_s):
                return None
            try:
                while True:
                    message = self.try_receive()
                    if message is not None or time.monotonic() >= deadline:
                        return message
                    self._message_poller.poll(poll_ms(deadline))
                    self._end.message_wake.clear()
            finally:
                self._receiving.release()

    def reply(self, message: ToDriver, timeout_s: float) -> None:
        """Send `message` to the driver, waiting at most `timeout_s` for room.

        BusTimeout, BusClosed, ConfigError as `publish`. A process that ends at once afterwards calls `close` before:
        a reply is on its way when this returns, not yet with the driver.
        """
        deadline = deadline_after(timeout_s)
        with self._gate:
            if not take_turn(self._replying, timeout_s):
                raise BusTimeout(f"another thread was replying for {timeout_s:g} s: one at a time")
            try:
                self._encoder.encode_into(message, self._buffer, HEADER_BYTES)
                num_bytes = len(self._buffer) - HEADER_BYTES
                check_size(num_bytes, self._end.welcome.max_message_bytes)
                self._wait_for_room(num_bytes, timeout_s, deadline)
                seal(self._buffer, DATA, self.epoch, self._sequence)
                if not self._end.outbox.send(self._buffer, num_bytes):
                    raise BusClosed(self._end.why_closed or "the connection to the driver ended")
                self._sequence += 1
            finally:
                self._replying.release()

    def _wait_for_room(self, num_bytes: int, timeout_s: float, deadline: float) -> None:
        end = self._end
        while True:
            self._gate.check()
            if end.why_closed:
                raise BusClosed(end.why_closed)
            if end.outbox.has_room():
                return
            if time.monotonic() >= deadline:
                raise BusTimeout(
                    f"no room for a message of {num_bytes} bytes within {timeout_s:g} s: the driver has not taken "
                    f"{end.outbox.under_way} replies"
                )
            self._space_poller.poll(poll_ms(deadline))
            end.space_wake.clear()

    def set_status(self, phase: Phase, step_id: int) -> None:
        """Note what this rank is doing from now on, for when the driver asks. Costs a fraction of a microsecond."""
        self._state.status = (phase, step_id, monotonic_ns())

    def set_error(self, text: str) -> None:
        """Tell the driver the beginning of `text` (232 bytes), for its `status`."""
        self._end.state.error = text.encode(errors="replace")[:ERROR_BYTES].decode(errors="ignore")
        self._end.service.wake.ring()

    @property
    def stale(self) -> int:
        """Frames of another epoch, dropped."""
        return sum(counters.stale for counters in self._end.counters)

    @property
    def checksum_failures(self) -> int:
        """Frames whose bytes had changed on their way."""
        return sum(counters.checksum_failures for counters in self._end.counters)

    @property
    def gaps(self) -> int:
        """Frames that were not the next one."""
        return sum(counters.gaps for counters in self._end.counters)

    def close(self) -> None:
        """End every wait of this process (BusClosed) and let go of the bus. Idempotent, from any thread.

        Takes up to `linger_s` while the driver's host does not accept what was replied.
        """
        self._gate.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
