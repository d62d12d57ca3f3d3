"""Typed messages between the driver and its workers: the two ends of the bus.

Runs in: driver | worker.

Every message is whole: the same class with the same fields on both sides, encoded as msgpack arrays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Self

import msgspec

from zmqexec import _bus
from zmqexec.bus.cores import usable_cores
from zmqexec.bus.link import Inbox, Outbox
from zmqexec.bus.ring import slots_for
from zmqexec.bus.status import Phase, WorkerStatus
from zmqexec.config import WAIT_POLICIES, WaitPolicy
from zmqexec.errors import BusClosed
from zmqexec.protocol import EngineStats, StepInput, StepOutput, ToDriver, ToWorker

MAX_NAME_BYTES = 63


FROM_DRIVER = StepInput(0, 0, decodes=b"\1")
FROM_WORKER = StepOutput(0, 0, token_ids=bytes(4))


def rehearsal(
    decode: Callable[[bytes], object], received: ToWorker | ToDriver, sent: ToWorker | ToDriver
) -> Callable[[], None]:
    """A function that decodes `received` and encodes `sent`, for its effect on the caches."""
    encode_into = msgspec.msgpack.Encoder().encode_into
    sample, buffer = msgspec.msgpack.encode(received), bytearray()

    def rehearse() -> None:
        decode(sample)
        encode_into(sent, buffer)

    return rehearse


class DriverChannel:
    """The driver's end: publishes to all workers, receives the replies of each.

    One thread publishes and one (the same or another) receives; `wake`, `status` and `close` may come from any.
    """

    def __init__(self, segment: _bus.Segment) -> None:
        """Takes over `segment`; `create` is the usual way."""
        self._segment = segment
        self._outbox = Outbox(segment)
        decode = msgspec.msgpack.Decoder[ToDriver](ToDriver).decode
        self._inbox = Inbox(segment, decode, rehearsal(decode, FROM_WORKER, FROM_DRIVER))
        self.fd = segment.fd
        self.num_workers = segment.num_workers
        self.epoch = segment.epoch

    @classmethod
    def create(
        cls,
        num_workers: int,
        *,
        epoch: int,
        ring_bytes: int = 64 << 20,
        slot_bytes: int = 256,
        reply_ring_bytes: int = 4 << 20,
        wait_policy: WaitPolicy = "balanced",
        has_checksums: bool = False,
        name: str = "",
    ) -> DriverChannel:
        """A new bus; its memfd `fd` is to be inherited by the workers.

        ring_bytes        of the broadcast ring; a larger message travels by ZeroMQ
        reply_ring_bytes  of each worker's ring
        wait_policy       how much waits may spin to be woken sooner, on both sides
        has_checksums     every record carries a CRC-32C of its payload, which its readers check
        name              what tools show; its first 63 bytes
        """
        segment = _bus.Segment.create(
            num_workers=num_workers,
            epoch=epoch,
            num_slots=slots_for(ring_bytes, slot_bytes),
            slot_bytes=slot_bytes,
            reply_num_slots=slots_for(reply_ring_bytes, slot_bytes),
            reply_slot_bytes=slot_bytes,
            wait_policy=WAIT_POLICIES.index(wait_policy),
            cores=usable_cores(),
            has_checksums=has_checksums,
            name=name.encode(errors="replace")[:MAX_NAME_BYTES].decode(errors="ignore"),
        )
        return cls(segment)

    def publish(self, message: ToWorker, timeout_s: float, check: Callable[[], None] | None = None) -> None:
        """Send `message` to all workers, waiting at most `timeout_s` for room.

        `check` is called every few milliseconds of waiting and may raise to give up. It has to take replies, since a
        worker that cannot deliver one takes no message. BusTimeout names the ranks that hold us back. BusClosed:
        closed.
        """
        self._outbox.send_message(message, timeout_s, check)

    def try_receive(self) -> tuple[int, ToDriver] | None:
        """(rank, message) of the next reply, ranks in turn; None while there is none. ProtocolError: no message."""
        return self.receive(0.0)

    def receive(self, timeout_s: float) -> tuple[int, ToDriver] | None:
        """(rank, message) of the next reply; None at the deadline or after `wake`, also a `wake` that came before.

        Whoever gets None checks its own conditions and calls again.
        """
        return self._inbox.receive(timeout_s)  # type: ignore[no-any-return]

    def wake(self) -> None:
        """Make a waiting `receive` return, or the next that finds no reply. From any thread, also when closed."""
        with contextlib.suppress(BusClosed):  # also by another thread, just now
            self._inbox.interrupt()

    def attachment(self, rank: int) -> tuple[dict[str, Any], dict[str, int]]:
        """What a worker needs to attach: arguments, and file descriptors to inherit."""
        return {}, {"bus_fd": self.fd}

    def status(self, rank: int) -> WorkerStatus:
        """What `rank` is doing, without asking it. ProtocolError: its page holds what no worker writes."""
        return WorkerStatus.of(rank, *self._segment.status(rank))

    @property
    def stale(self) -> int:
        """A segment has one epoch: what its ranks reply is for the executor to look at."""
        return 0

    def set_gauges(self, stats: EngineStats) -> None:
        """Show the engine's figures to whoever observes. Costs a quarter of a microsecond."""
        self._segment.set_gauges(msgspec.structs.astuple(stats))

    def close(self) -> None:
        """End every wait, here (BusClosed) and in the workers, which first read what was published. Idempotent."""
        self._segment.close()
        self._outbox.close()
        self._inbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class WorkerChannel:
    """A worker's end: receives what the driver publishes, replies on a ring of its own.

    One thread receives and one (the same or another) replies; the rest may come from any.
    """

    def __init__(self, segment: _bus.Segment) -> None:
        """Takes over `segment`; `attach` is the usual way."""
        self._segment = segment
        decode = msgspec.msgpack.Decoder[ToWorker](ToWorker).decode
        self._inbox = Inbox(segment, decode, rehearsal(decode, FROM_DRIVER, FROM_WORKER))
        self._outbox = Outbox(segment)
        self.rank = segment.rank
        self.num_workers = segment.num_workers
        self.epoch = segment.epoch

    @classmethod
    def attach(cls, fd: int, rank: int) -> WorkerChannel:
        """Rank `rank`'s end of the bus in memfd `fd`, which stays the caller's and may be closed afterwards."""
        return cls(_bus.Segment.attach(fd, rank, usable_cores()))

    @property
    def closed(self) -> bool:
        """Whether the bus was closed, by the driver or here. What was published before can still be received."""
        return self._segment.closed

    def try_receive(self) -> ToWorker | None:
        """The next message, or None while there is none. BusClosed: there will be none. ProtocolError: no message."""
        return self.receive(0.0)

    def receive(self, timeout_s: float) -> ToWorker | None:
        """The next message; None at the deadline."""
        return self._inbox.receive(timeout_s)  # type: ignore[no-any-return]

    def reply(self, message: ToDriver, timeout_s: float) -> None:
        """Send `message` to the driver, waiting at most `timeout_s` for room. BusTimeout, BusClosed as `publish`."""
        self._outbox.send_message(message, timeout_s)

    def set_status(self, phase: Phase, step_id: int) -> None:
        """Say on the status page what this rank is doing from now on. Costs a fraction of a microsecond."""
        self._segment.set_status(phase, step_id)

    def set_error(self, text: str) -> None:
        """Leave the beginning of `text` (232 bytes) on the status page."""
        self._segment.set_error(text)

    def close(self) -> None:
        """End every wait of this process (BusClosed) and let go of the bus. Idempotent, from any thread."""
        self._segment.close()
        self._outbox.close()
        self._inbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
