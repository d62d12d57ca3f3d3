"""Messages encoded where their records lie: the same bytes as written ones, and an encoder can do no harm."""

import random

import msgspec
import pytest

from zmqexec import _bus
from zmqexec.bus.ring import AS_RECORD, PAGE_BYTES, RingReader, make_ring, slots_for
from zmqexec.errors import BusClosed, BusError

encode_into = msgspec.msgpack.Encoder().encode_into
HOT_BYTES = 256 << 10  # ring.c begins again past this


@pytest.fixture
def pair(stack):
    """A driver's and a worker's segment with a broadcast ring of a page in 16 slots."""
    writer, (reader,) = make_ring(num_slots=16, num_readers=1)
    stack.callback(writer.close)
    stack.callback(reader.close)
    return writer.segment, reader.segment


def read(segment):
    record = segment.read(AS_RECORD, 0.0)
    return None if record is None else (record[0], msgspec.msgpack.decode(record[1]))


def fill(message, buffer):
    """An encoder in Python."""
    buffer[: len(message)] = message


def test_a_message_arrives_as_if_it_had_been_written(pair):
    driver, worker = pair
    assert driver.encode(encode_into, {"a": [1, 2.5, b"c"]}, 7) is True
    assert driver.statistics()[:2] == (1, len(msgspec.msgpack.encode({"a": [1, 2.5, b"c"]})))
    assert worker.read((*[None] * 7, lambda payload: msgspec.msgpack.decode(bytes(payload))), 0.0) == {
        "a": [1, 2.5, b"c"]
    }
    assert worker.encode(encode_into, "reply", 1) is True
    assert driver.read(AS_RECORD, 0.0) == (0, (1, msgspec.msgpack.encode("reply")))


def test_without_room_nothing_is_published(pair):
    driver, worker = pair
    sent = 0
    while driver.encode(encode_into, bytes(500), 0):
        sent += 1
    assert sent == 16 // 3  # 500 bytes and two headers take 3 slots of 256
    assert not driver.encode(encode_into, bytes(PAGE_BYTES), 0)
    for _ in range(sent):
        assert read(worker) == (0, bytes(500))
    assert read(worker) is None
    assert not driver.encode(encode_into, bytes(PAGE_BYTES), 0)  # larger than the ring
    assert driver.encode(encode_into, bytes(PAGE_BYTES - 100), 0)
    assert read(worker) == (0, bytes(PAGE_BYTES - 100))


def test_random_messages_of_all_sizes_arrive_in_order_from_encoders_and_writers(stack):
    """In a ring large enough to begin again now and then."""
    segment = _bus.Segment.create(
        num_workers=1,
        epoch=0,
        num_slots=slots_for(4 * HOT_BYTES, 256),
        slot_bytes=256,
        reply_num_slots=2,
        reply_slot_bytes=PAGE_BYTES,
        has_checksums=True,
    )
    stack.callback(segment.close)
    reader = RingReader(_bus.Segment.attach(segment.fd, 0))
    stack.callback(reader.close)
    chance = random.Random(7)
    expected = []
    num_refused = 0
    for number in range(3000):
        size = chance.choice([0, 100, 5000, HOT_BYTES // 2, HOT_BYTES, 2 * HOT_BYTES])
        message = [number, bytes([number % 251]) * chance.randint(0, size)]
        if chance.random() < 0.5:
            sent = segment.encode(encode_into, message, 1)
        else:
            sent = segment.write(msgspec.msgpack.encode(message), 1, 0.0)
        if sent:
            expected.append(message)
        else:
            num_refused += 1
        while expected and (not sent or chance.random() < 0.7):
            kind, payload = reader.try_read_record()
            assert kind == 1 and msgspec.msgpack.decode(payload) == expected.pop(0)
    assert 0 < num_refused < 1000


@pytest.mark.parametrize("message", [object(), {1: object()}, [b"x" * 1000, object()]])
def test_what_cannot_be_encoded_leaves_the_ring_as_it_was(pair, message):
    driver, worker = pair
    with pytest.raises(TypeError):
        driver.encode(encode_into, message, 0)
    assert read(worker) is None
    assert driver.encode(encode_into, "next", 0) and read(worker) == (0, "next")


def test_an_encoder_cannot_change_the_size_of_its_buffer(pair):
    driver, worker = pair
    for spoil in (bytearray.clear, lambda buffer: buffer.extend(b"a"), lambda buffer: buffer.__delitem__(0)):
        assert not driver.encode(lambda message, buffer, spoil=spoil: spoil(buffer), None, 0)
    assert read(worker) is None


def test_a_buffer_kept_by_an_encoder_shows_nothing_afterwards(pair):
    driver, worker = pair
    kept = []

    def keep(message, buffer):
        kept.append(buffer)
        encode_into(message, buffer)

    assert driver.encode(keep, "a", 0) and read(worker) == (0, "a")
    assert kept[0] == b""
    with pytest.raises(BufferError):
        kept[0].extend(b"more")
    driver.close()
    assert kept[0] == b""


def test_an_encoder_that_keeps_a_view_is_an_error_for_good_and_cannot_crash_the_process(pair):
    driver = pair[0]
    views = []

    def keep(message, buffer):
        fill(message, buffer)
        views.append(memoryview(buffer))

    for encoder in (keep, encode_into):
        with pytest.raises(BufferError, match="kept a view"):
            driver.encode(encoder, b"abc", 0)
    driver.close()
    assert views[0][1:5] == b"\x03abc"  # the last encoder's, for the mapping is still there


def test_an_encoder_may_neither_write_nor_encode(pair):
    driver, worker = pair

    def again(message, buffer):
        for call in (lambda: driver.encode(encode_into, 1, 0), lambda: driver.write(b"a", 0, 0.0)):
            with pytest.raises(BusError, match="two threads write"):
                call()
        encode_into(message, buffer)

    assert driver.encode(again, "a", 0) and read(worker) == (0, "a")


def test_what_an_encoder_returns_may_not_write_either_when_it_is_dropped(pair):
    driver, worker = pair
    refused = []

    class Returned:
        def __del__(self):
            try:
                driver.write(b"a", 0, 0.0)
            except BusError as error:
                refused.append(str(error))

    def encode(message, buffer):
        encode_into(message, buffer)
        return Returned()

    assert driver.encode(encode, "a message", 0) and len(refused) == 1
    assert read(worker) == (0, "a message") and read(worker) is None


def test_an_encoder_that_closes_the_bus_has_published_nothing(pair):
    driver, worker = pair

    def close(message, buffer):
        driver.close()
        encode_into(message, buffer)

    with pytest.raises(BusClosed):
        driver.encode(close, "a", 0)
    with pytest.raises(BusClosed):
        worker.read(AS_RECORD, 0.0)


def test_nobody_encodes_for_a_closed_bus(pair):
    driver, worker = pair
    driver.close()
    with pytest.raises(BusClosed, match="driver closed"):
        worker.encode(encode_into, "a", 0)
    with pytest.raises(BusClosed):
        driver.encode(encode_into, "a", 0)


def test_a_kind_is_checked(pair):
    with pytest.raises(OverflowError):
        pair[0].encode(encode_into, "a", 2**32 - 1)
    with pytest.raises(TypeError):
        pair[0].encode(encode_into, "a")
