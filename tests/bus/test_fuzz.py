"""Whatever stands in the ring, on a status page or in a frame: a value, or one of our errors."""

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzzing import (
    PAD_KIND,
    decode_control,
    encode,
    expect_announcement,
    parse_frame,
    read_status,
    receive_record,
    seeds,
    shared_bus,
)
from zmqexec import _bus
from zmqexec.bus.zeromq import frames
from zmqexec.bus.zmq_path import Announcement, new_endpoint

ENDPOINT = new_endpoint()
ENDPOINTS = st.text(max_size=20) | st.text(max_size=200).map("ipc://@zmqexec-".__add__) | st.just(ENDPOINT)
NUMBERS = st.sampled_from([0, 1, -1, 2**63, 2**64 - 1, -(2**63)]) | st.integers(-(2**63), 2**64 - 1)


@pytest.fixture(scope="module", autouse=True)
def _bus_of_the_module():
    yield
    shared_bus().close()
    shared_bus.cache_clear()


def damaged(valid: list[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes that were valid, with some of them replaced, cut off, or repeated."""

    def damage(data: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
        for begin, length, replacement in cuts:
            begin %= len(data) + 1
            data = data[:begin] + replacement + data[begin + length :]
        return data

    cuts = st.tuples(st.integers(0, 1000), st.integers(0, 4), st.binary(max_size=4))
    return st.builds(damage, st.sampled_from(valid), st.lists(cuts, max_size=3))


@given(st.binary(max_size=60) | damaged(seeds("record")))
def test_a_record_of_any_kind_and_content_is_a_message_or_a_protocol_error(data):
    receive_record(data)


def test_a_record_that_would_be_taken_for_a_pad_cannot_be_written(make_ring):
    writer, (reader,) = make_ring(16, 1)
    with pytest.raises(OverflowError, match="less than"):
        writer.segment.write(b"a", PAD_KIND, 0.0)
    assert writer.try_write(b"b", PAD_KIND - 1)
    with pytest.raises(Exception, match=f"unknown kind {PAD_KIND - 1}"):
        reader.try_read()


@example(Announcement(0, 5, ENDPOINT))
@example(Announcement(0, -1, ENDPOINT))
@example(Announcement(0, 5, "ipc://@zmqexec-" + "a" * 200))
@example(Announcement(0, 5, "ipc://@zmqexec-\0"))
@given(st.builds(Announcement, NUMBERS, NUMBERS, ENDPOINTS))
def test_an_announcement_of_any_content_is_the_next_or_refused(announcement):
    is_next = announcement.number == 0 and announcement.num_bytes >= 0 and announcement.endpoint == ENDPOINT
    assert (expect_announcement(encode(announcement)) == "announced") == is_next


@given(st.binary(max_size=80) | damaged(seeds("announcement")))
def test_any_bytes_are_an_announcement_or_refused(data):
    expect_announcement(data)


@example(b"\xff")
@given(st.binary(max_size=600))
def test_a_status_page_of_any_content_is_a_status_or_a_protocol_error(data):
    read_status(data)


@pytest.mark.parametrize("name", ["é" * 40, "a" + "é" * 40, "a" * 100, "", "名" * 30])
def test_a_bus_has_as_much_of_its_name_as_fits(stack, name):
    geometry = {"num_slots": 64, "slot_bytes": 64, "reply_num_slots": 64, "reply_slot_bytes": 64}
    segment = _bus.Segment.create(num_workers=1, epoch=7, name=name, **geometry)
    stack.callback(segment.close)
    kept = segment.header()[0]
    assert name.startswith(kept) and (kept == name or 63 - len(kept.encode()) < len(name[0].encode()))


@given(
    st.binary(max_size=60)
    | damaged(seeds("frame"))
    | st.builds(
        lambda fields, payload: frames.FIELDS.pack(*fields, len(payload)) + bytes(4) + payload,
        st.tuples(
            st.just(b"zx"), st.just(1), st.integers(0, 255), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)
        ),
        st.binary(max_size=40),
    )
)
def test_any_bytes_are_a_frame_or_a_protocol_error(data):
    parse_frame(data)


@example(struct.pack("<B", 0x91) * 100_000)
@given(st.binary(max_size=60) | damaged(seeds("control")))
def test_any_bytes_beside_the_lanes_are_a_control_message_or_a_protocol_error(data):
    decode_control(data)
