"""Rings: every reader sees every record, whole, once and in order; the slowest holds the writer back."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqexec.bus import ring
from zmqexec.errors import BusClosed, BusTimeout

RECORD_HEADER_BYTES = 40


@pytest.mark.parametrize("num_readers", [1, 2, 8])
def test_writer_waits_for_the_slowest_reader(make_ring, num_readers):
    writer, (slow, *others) = make_ring(num_slots=2, num_readers=num_readers)
    assert writer.try_write(b"a") and writer.try_write(b"b")
    assert [r.try_read() for r in others] == [b"a"] * len(others)
    assert not writer.try_write(b"c")  # `slow` still owns the first slot

    assert slow.try_read() == b"a"
    assert writer.try_write(b"c")


def test_an_empty_ring_has_nothing_to_read(make_ring):
    _, (reader,) = make_ring(num_slots=2, num_readers=1)
    assert reader.try_read() is None


def test_an_empty_payload_is_a_record(make_ring):
    writer, (reader,) = make_ring(num_slots=2, num_readers=1)
    assert writer.try_write(b"")
    assert reader.try_read() == b""


def test_a_record_keeps_its_kind(make_ring):
    writer, (reader,) = make_ring(num_slots=2, num_readers=1)
    assert writer.try_write(b"a", 1) and writer.try_write(b"b", 0)
    assert [reader.try_read_record(), reader.try_read_record()] == [(1, b"a"), (0, b"b")]


@pytest.mark.parametrize("kind", [2**32 - 1, 2**32, -1])
def test_a_kind_that_pads_have_or_that_does_not_fit_is_refused(make_ring, kind):
    writer, _ = make_ring(num_slots=2, num_readers=1)
    with pytest.raises(OverflowError):
        writer.try_write(b"a", kind)


def test_a_record_may_fill_the_whole_ring_from_any_slot(make_ring):
    writer, (reader,) = make_ring(num_slots=3, num_readers=1)
    full = bytes(range(256)) * (writer.max_payload_bytes // 256 + 1)
    full = full[: writer.max_payload_bytes]
    for _ in range(4):  # each time one slot further
        assert writer.try_write(b"one slot") and reader.try_read() == b"one slot"
        assert writer.try_write(full)
        assert not writer.try_write(b"")
        assert reader.try_read() == full


def test_a_payload_larger_than_the_ring_is_refused_at_once(make_ring):
    writer, _ = make_ring(num_slots=2, num_readers=1)
    with pytest.raises(ValueError, match="at most"):
        writer.write(bytes(writer.max_payload_bytes + 1), timeout_s=60)


def test_a_full_ring_names_the_readers_that_hold_it_back(make_ring):
    writer, readers = make_ring(num_slots=2, num_readers=4)
    assert writer.try_write(b"a") and writer.try_write(b"b")
    readers[0].try_read(), readers[2].try_read()
    with pytest.raises(BusTimeout, match=r"ranks 1, 3$"):
        writer.write(b"c", timeout_s=0.01)


def test_a_read_gives_up_at_its_deadline(make_ring):
    _, (reader,) = make_ring(num_slots=2, num_readers=1)
    assert reader.read(timeout_s=0.01) is None
    assert reader.read(timeout_s=-1) is None


def test_a_parked_reader_is_woken_by_a_record(make_ring, in_thread):
    writer, (reader,) = make_ring(num_slots=2, num_readers=1)
    join = in_thread(lambda: [reader.read(timeout_s=10) for _ in range(100)])
    for i in range(100):
        writer.write(b"%d" % i, timeout_s=10)
    assert join() == [b"%d" % i for i in range(100)]


def test_check_ends_a_wait_for_room(make_ring):
    writer, _ = make_ring(num_slots=2, num_readers=1)
    assert writer.try_write(b"a") and writer.try_write(b"b")

    def check():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        writer.write(b"c", timeout_s=60, check=check)


def test_a_closed_ring_still_delivers_what_was_written(make_ring):
    writer, (reader,) = make_ring(num_slots=2, num_readers=1)
    writer.write(b"last words", timeout_s=1)
    writer.close()
    assert reader.try_read() == b"last words"
    with pytest.raises(BusClosed, match="the driver closed"):
        reader.try_read()
    with pytest.raises(BusClosed, match="the driver closed"):
        reader.read(timeout_s=60)


def test_use_after_close_is_an_error(make_ring):
    writer, (reader,) = make_ring(num_slots=2, num_readers=1)
    reader.close(), reader.close()
    with pytest.raises(BusClosed):
        reader.try_read()
    assert writer.try_write(b"the others go on")
    writer.close(), writer.close()
    with pytest.raises(BusClosed):
        writer.try_write(b"a")
    with pytest.raises(BusClosed):
        writer.write(b"a", timeout_s=1)


def test_a_ring_whose_readers_keep_up_stays_within_a_small_part_of_its_memory(make_ring):
    writer, readers = make_ring(num_slots=1 << 16, num_readers=2, slot_bytes=256)
    for number in range(5000):
        payload = number.to_bytes(4, "little") * 2000
        assert writer.try_write(payload)
        assert [reader.try_read() for reader in readers] == [payload] * 2
    assert os.fstat(writer.segment.fd).st_blocks * 512 < 1 << 20, "40 MB went through it"


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_ring_that_begins_again_before_its_end_loses_and_reorders_nothing(data):
    """A ring of a MiB, records up to a third of it, and readers that lag at random."""
    writer, readers = ring.make_ring(1 << 12, 2, slot_bytes=256)
    sizes = st.one_of(st.integers(0, 2000), st.integers(200_000, 350_000))
    sent, got = [], [[] for _ in readers]
    try:
        for number, (size, lags) in enumerate(
            data.draw(st.lists(st.tuples(sizes, st.tuples(st.booleans(), st.booleans())), max_size=60))
        ):
            payload = number.to_bytes(4, "little") * (size // 4)
            while not writer.try_write(payload):
                for reader, own in zip(readers, got, strict=True):
                    own += [one] if (one := reader.try_read()) is not None else []
            sent.append(payload)
            for reader, own, lag in zip(readers, got, lags, strict=True):
                while not lag and (one := reader.try_read()) is not None:
                    own.append(one)
        for reader, own in zip(readers, got, strict=True):
            own += iter(reader.try_read, None)
        assert got == [sent, sent]
    finally:
        for end in (writer, *readers):
            end.close()


@pytest.mark.parametrize("num_slots", [2, 3, 5, 64, 1000])
def test_slots_are_chosen_to_fill_whole_pages(num_slots):
    slot_bytes = ring.slot_bytes_for(num_slots)
    assert slot_bytes % 64 == 0 and num_slots * slot_bytes % ring.PAGE_BYTES == 0


@pytest.mark.parametrize(("ring_bytes", "slot_bytes"), [(1, 64), (4096, 256), (4097, 256), (64 << 20, 192)])
def test_a_ring_has_at_least_the_bytes_asked_for(ring_bytes, slot_bytes):
    num_slots = ring.slots_for(ring_bytes, slot_bytes)
    assert num_slots >= 2 and num_slots * slot_bytes >= ring_bytes
    assert num_slots * slot_bytes % ring.PAGE_BYTES == 0


class Model:
    """What a ring should do, with lists: records, how many of them each reader has read, slots in use."""

    def __init__(self, num_slots: int, slot_bytes: int, num_readers: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.records: list[bytes] = []
        self.num_read = [0] * num_readers

    def slots(self, payload: bytes) -> int:
        return -(-(RECORD_HEADER_BYTES + len(payload)) // self.slot_bytes)

    def write(self, payload: bytes) -> bool:
        used = sum(map(self.slots, self.records[min(self.num_read) :]))
        if used + self.slots(payload) > self.num_slots:
            return False
        self.records.append(payload)
        return True

    def read(self, reader: int) -> bytes | None:
        if self.num_read[reader] == len(self.records):
            return None
        self.num_read[reader] += 1
        return self.records[self.num_read[reader] - 1]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), num_slots=st.sampled_from([2, 3, 7, 64]), num_readers=st.integers(1, 4))
def test_random_writes_and_reads_match_the_model(data, num_slots, num_readers):
    slot_bytes = ring.slot_bytes_for(num_slots)
    model = Model(num_slots, slot_bytes, num_readers)
    writer, readers = ring.make_ring(num_slots, num_readers)
    sizes = st.one_of(st.integers(0, 3 * slot_bytes), st.integers(0, writer.max_payload_bytes))
    turns = st.one_of(
        sizes.map(lambda size: ("write", size)), st.integers(0, num_readers - 1).map(lambda r: ("read", r))
    )
    try:
        for number, (action, value) in enumerate(data.draw(st.lists(turns, max_size=80))):
            if action == "write":
                payload = number.to_bytes(4, "little") * (min(value, writer.max_payload_bytes) // 4)
                assert writer.try_write(payload) == model.write(payload)
            else:
                assert readers[value].try_read() == model.read(value)
        for index, reader in enumerate(readers):
            while (expected := model.read(index)) is not None:
                assert reader.try_read() == expected
            assert reader.try_read() is None
    finally:
        for end in (writer, *readers):
            end.close()
