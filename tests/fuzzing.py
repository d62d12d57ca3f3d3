"""What a decoder must do with any bytes: a value of its type, or one of the errors it names. Nothing else, and soon.

`TARGETS` are functions of bytes that raise where a decoder does not keep that promise, and otherwise say what came of
them. Both hypothesis and a coverage-guided fuzzer drive them; the latter begins with `seeds`, and also looks for inputs
of which something new comes: it cannot see into msgspec.
"""

from __future__ import annotations

import functools
import mmap
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import msgspec
import numpy as np

from zmqexec import _bus, protocol
from zmqexec.bus import zmq_path
from zmqexec.bus.channel import DriverChannel
from zmqexec.bus.link import NO_MESSAGE, Inbox
from zmqexec.bus.statistics import Snapshot
from zmqexec.bus.zeromq import control, frames
from zmqexec.bus.zmq_path import ZmqReceiver
from zmqexec.config import EngineConfig, SamplingParams
from zmqexec.errors import InternalError, ProtocolError
from zmqexec.protocol import FromEngine, StepInput, ToDriver, ToEngine, ToWorker, pack
from zmqexec.worker.batch import Batch

UNIONS: dict[str, Any] = {"ToWorker": ToWorker, "ToDriver": ToDriver, "ToEngine": ToEngine, "FromEngine": FromEngine}
DECODERS = {name: msgspec.msgpack.Decoder(union) for name, union in UNIONS.items()}
encode = msgspec.msgpack.Encoder().encode

PAD_KIND = 2**32 - 1  # which cannot be written
NUM_SLOTS, MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS = 3, 20, 4, 10


def decode_message(name: str, data: bytes) -> str:
    """A message of the union `name`, which survives another journey, or an error that its receiver catches."""
    try:
        message = DECODERS[name].decode(data)
    except NO_MESSAGE as error:
        return str(error)
    assert isinstance(message, get_args(UNIONS[name]))
    assert encode(DECODERS[name].decode(encode(message))) == encode(message)
    return type(message).__name__


def expect_announcement(data: bytes) -> str:
    """The announcement of a payload that never comes, or ProtocolError."""
    receiver = ZmqReceiver(0)
    try:
        receiver.expect(data)
        assert receiver.receive(time.monotonic()) is None
        assert receiver.pending is not None
        zmq_path.HEADER.pack(receiver.pending.number, receiver.pending.num_bytes)
        return "announced"
    except ProtocolError as error:
        return str(error)
    finally:
        receiver.close()


class Bus:
    """Both ends of a bus for one worker, to write garbage into."""

    def __init__(self) -> None:
        self.driver = DriverChannel.create(1, epoch=7, ring_bytes=1 << 20, reply_ring_bytes=1 << 20)
        self.downstream = self.driver._segment
        self.upstream = _bus.Segment.attach(self.driver.fd, 0)

    def close(self) -> None:
        self.upstream.close()
        self.driver.close()


@functools.cache
def shared_bus() -> Bus:
    """One for the whole process."""
    return Bus()


def receive_record(data: bytes) -> str:
    """A record of any kind (4 bytes) and content is a message, an announcement, or a ProtocolError; then it is gone."""
    bus = shared_bus()
    kind, payload = int.from_bytes(data[:4], "little") % PAD_KIND, data[4:]
    outcome = ""
    for writer, reader, union in ((bus.downstream, bus.upstream, ToWorker), (bus.upstream, bus.downstream, ToDriver)):
        inbox = Inbox(reader, msgspec.msgpack.Decoder(union).decode)
        assert writer.write(payload, kind, 0.0)
        try:
            received = inbox.receive(0.0)
            if received is not None:
                message = received if reader.rank >= 0 else received[1]
                assert isinstance(message, get_args(union))
                outcome += type(message).__name__
            else:
                assert kind == 1
        except ProtocolError as error:
            outcome += str(error)
        finally:
            inbox.close()
        assert reader.read((bytes, bytes), 0.0) is None
    return outcome


def read_status(data: bytes) -> str:
    """A status page of any content is a status or a ProtocolError, and its counters are counters."""
    bus = shared_bus()
    outcome = "status"
    with mmap.mmap(bus.driver.fd, 0) as memory:
        page = memory[3 * mmap.PAGESIZE : 4 * mmap.PAGESIZE]
        memory[3 * mmap.PAGESIZE : 4 * mmap.PAGESIZE] = data[: mmap.PAGESIZE].ljust(mmap.PAGESIZE, b"\0")
        try:
            status = bus.driver.status(0)
            assert Snapshot.of(bus.downstream).ranks[0].status.phase == status.phase
            assert status.where() and len(status.error.encode()) <= 232
        except ProtocolError as error:
            assert "rank 0" in str(error)
            outcome = "damaged"
        bus.downstream.statistics()
        memory[3 * mmap.PAGESIZE : 4 * mmap.PAGESIZE] = page
    return outcome


def parse_frame(data: bytes) -> str:
    """A frame of the ZeroMQ transport, also where its checksum happens to be right, or ProtocolError."""
    sealed = bytearray(data.ljust(frames.HEADER_BYTES, b"\0"))
    frames.CRC.pack_into(sealed, frames.FIELDS.size, frames._checksum(memoryview(sealed)))
    for one in (data, sealed):
        try:
            frame = frames.parse(one, "a peer")
            assert len(frame.payload) == len(one) - frames.HEADER_BYTES
        except ProtocolError as error:
            outcome = type(error).__name__
        else:
            outcome = "frame"
    return outcome


def decode_control(data: bytes) -> str:
    """What is said beside the lanes, or ProtocolError."""
    outcome = ""
    for decode in (control.decode_to_worker, functools.partial(control.decode_to_driver, sender="rank 0")):
        try:
            outcome += type(decode(data)).__name__
        except ProtocolError as error:
            outcome += str(error)
    return outcome


def run_steps(steps: list[StepInput]) -> str:
    """Steps one after another: each gives rows that lie in the cache and in the model, or is our bug."""
    batch = Batch(NUM_SLOTS, MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS)
    for step in steps:
        try:
            rows = batch.begin(step)
        except InternalError as error:
            assert len(str(error)) < 1000
            return str(error)
        assert len(rows.token_ids) == len(rows.positions) == len(rows.num_prompt) == len(rows.slot_mapping)
        assert all(0 <= row < NUM_BLOCKS * BLOCK_SIZE for row in rows.slot_mapping.tolist())
        assert all(0 <= position < MAX_MODEL_LEN for position in rows.positions.tolist())
        assert all(0 < num_prompt <= MAX_MODEL_LEN for num_prompt in rows.num_prompt.tolist())
        assert all(0 <= row < len(rows.token_ids) for row in rows.sample_rows.tolist())
        batch.finish(rows, np.zeros(len(rows.sample_slots), np.int64))
    return f"{len(steps)} steps"


class Numbers:
    """Bytes as a source of numbers that are mostly small, and sometimes anything."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def next(self, below: int) -> int:
        return next(self._data, 0) % below

    def number(self) -> int:
        first = next(self._data, 0)
        if first < 250:
            return first % 25 - 2
        return int.from_bytes(bytes(next(self._data, 0) for _ in range(8)), "little", signed=True) >> (first - 250) * 12

    def packed(self, most: int) -> bytes:
        """int32s, now and then with some bytes more or less."""
        count, oddity = self.next(most + 1), self.next(16)
        values = b"".join((self.number() & 0xFFFFFFFF).to_bytes(4, "little") for _ in range(count))
        return values if oddity else values + b"\0" * self.next(5)


def steps_of(data: bytes) -> Iterator[StepInput]:
    """A few steps that a fuzzer makes up."""
    numbers = Numbers(data)
    for _ in range(1 + numbers.next(4)):
        admitted = [
            protocol.Admission(
                numbers.number(), numbers.packed(22), numbers.number(), numbers.number(), numbers.packed(7)
            )
            for _ in range(numbers.next(4))
        ]
        decodes = bytes(numbers.next(256) for _ in range(numbers.next(3)))
        yield StepInput(0, 0, decodes, numbers.packed(8), numbers.packed(8), admitted)


TARGETS: dict[str, Callable[[bytes], str]] = {
    **{name: functools.partial(decode_message, name) for name in UNIONS},
    "announcement": expect_announcement,
    "record": receive_record,
    "status": read_status,
    "frame": parse_frame,
    "control": decode_control,
    "steps": lambda data: run_steps(list(steps_of(data))),
}


def seeds(name: str) -> list[bytes]:
    """Inputs of target `name` that a real sender would produce."""
    step = StepInput(7, 1, b"\x07", pack([0, 2]), pack([0, 1]), [protocol.Admission(1, pack([5, 6]), 2, 0, pack([3]))])
    error = protocol.ErrorInfo("WorkerFailed", "text", "param")
    logprobs = protocol.Logprobs(0, 2, pack([1, 2]), bytes(8), pack([1]))
    messages = {
        "ToWorker": [protocol.LoadModel(7, EngineConfig(), "m", "float32", 64, 2), protocol.InitCache(7, 10), step],
        "ToDriver": [
            protocol.Hello(7, 0, 1, "d", "1", "b"),
            protocol.StepOutput(7, 1, pack([1]), [logprobs], [logprobs]),
            protocol.Failure(7, -1, "IDLE", error),
        ],
        "ToEngine": [
            protocol.StartEngine(EngineConfig()),
            protocol.NewRequest("r", pack([1, 2]), SamplingParams(stop=["a"], logit_bias={1: 2.0}, seed=3)),
            protocol.AbortRequests(["r"]),
        ],
        "FromEngine": [
            protocol.EngineReady(protocol.EngineInfo("m", 8, 8, 8, 8, "cpu", "float32", [1])),
            protocol.EngineFailed(error),
            protocol.EngineUpdates([protocol.RequestUpdate("r", [1, 2], "stop", 2)], protocol.EngineStats()),
        ],
    }
    if name in messages:
        return [encode(message) for message in messages[name]]
    announcement = zmq_path.encode(zmq_path.Announcement(0, 10, zmq_path.new_endpoint()))
    controls = [control.Hello("1", 0, 1), control.Answer(1, 1, 2, 3, 4, "e"), control.Refused("no")]
    return {
        "announcement": [announcement],
        "record": [bytes(4) + encode(step), b"\1\0\0\0" + announcement],
        "status": [bytes(64), (17 << 8 | 4).to_bytes(8, "little") + bytes(16) + b"text"],
        "frame": [bytes(frames.make(frames.DATA, 7, 1, b"payload"))],
        "control": [encode(said) for said in controls],
        "steps": [bytes(range(64)), bytes([2, 1, 2, 5, 1, 7, 7, 7, 7, 7, 7, 2, 1, 3, 1, 1, 2, 4, 2, 1, 1, 7])],
    }[name]
