"""The shared memory: a process attaches only to a bus of its own kind, and believes nothing it reads there."""

import fcntl
import os
import struct

import pytest

from zmqexec import _bus
from zmqexec.bus import ring
from zmqexec.errors import BusClosed, BusError, ProtocolError

PAGE = ring.PAGE_BYTES
# magic, layout version, has checksums, epoch, total bytes; page bytes, workers, slots, slot bytes, the same of reply
# rings; wait policy, driver pid, created, name
HEADER = struct.Struct("<QIIQQIIIIIIIIQ64s")
RECORD = struct.Struct("<QQQIIII")  # position, time, cause, length, kind, checksum, reserved
STATUS_END = 5 * PAGE  # of a bus for two: header, bells, driver, two ranks; then come the cursors
READ = (lambda payload: (0, bytes(payload)), lambda payload: (1, bytes(payload)))


def record(position, length):
    return RECORD.pack(position, 0, 0, length, 0, 0, 0)


@pytest.fixture
def segment(stack):
    made = _bus.Segment.create(
        num_workers=2, epoch=9, num_slots=16, slot_bytes=PAGE // 16, reply_num_slots=4, reply_slot_bytes=PAGE // 4
    )
    stack.callback(made.close)
    return made


def copy_of(segment, stack, change=None, size=None, seal=True):
    """A memfd with the segment's header, changed."""
    fd = os.memfd_create("copy", os.MFD_ALLOW_SEALING)
    stack.callback(os.close, fd)
    fields = list(HEADER.unpack(os.pread(segment.fd, HEADER.size, 0)))
    for index, value in (change or {}).items():
        fields[index] = value
    os.ftruncate(fd, os.fstat(segment.fd).st_size if size is None else size)
    os.pwrite(fd, HEADER.pack(*fields), 0)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def test_both_sides_agree_on_the_geometry(segment, stack):
    worker = _bus.Segment.attach(segment.fd, 1)
    stack.callback(worker.close)
    assert (worker.rank, worker.epoch, worker.num_workers, worker.fd) == (1, 9, 2, -1)
    assert (segment.rank, segment.max_payload_bytes) == (-1, PAGE - RECORD.size)
    assert worker.max_payload_bytes == PAGE - RECORD.size


def test_an_unchanged_copy_is_a_bus(segment, stack):
    _bus.Segment.attach(copy_of(segment, stack), 0).close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: 1}, "is not a bus"),
        ({1: 99}, "layout version 99"),
        ({4: 5}, "geometry needs"),
        ({5: 1024}, "pages of 1024 bytes"),
        ({6: 0}, "0 workers"),
        ({6: 65}, "65 workers"),
        ({6: 3}, "geometry needs"),
        ({7: 1}, "broadcast ring of 1 slots"),
        ({7: 17}, "broadcast ring of 17 slots"),
        ({7: 0xFFFFFFFF, 8: 0xFFFFFFC0}, "broadcast ring of 4294967295 slots"),
        ({8: 0}, "slots of 0 bytes"),
        ({10: 32}, "a reply ring of 4 slots of 32 bytes"),
        ({11: 3}, "settings that no driver writes"),
        ({14: b"x" * 64}, "settings that no driver writes"),
    ],
)
def test_a_strange_header_is_refused(segment, stack, change, message):
    with pytest.raises(BusError, match=message):
        _bus.Segment.attach(copy_of(segment, stack, change), 0)


@pytest.mark.parametrize("size", [0, 8, HEADER.size - 1, PAGE, 4 * PAGE])
def test_a_truncated_segment_is_refused(segment, stack, size):
    fd = copy_of(segment, stack, seal=False)
    os.ftruncate(fd, size)
    with pytest.raises(BusError, match=r"is not a bus|geometry needs"):
        _bus.Segment.attach(fd, 0)


def test_a_segment_that_could_still_shrink_is_refused(segment, stack):
    with pytest.raises(BusError, match="not sealed"):
        _bus.Segment.attach(copy_of(segment, stack, seal=False), 0)


def test_nobody_can_shrink_the_segment(segment):
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, PAGE)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_bus_is_refused(segment, rank):
    with pytest.raises(BusError, match=f"rank {rank}"):
        _bus.Segment.attach(segment.fd, rank)


def test_a_file_descriptor_that_is_no_file_is_refused(stack):
    ends = os.pipe()
    for fd in ends:
        stack.callback(os.close, fd)
    with pytest.raises(BusError):
        _bus.Segment.attach(ends[0], 0)
    with pytest.raises(BusError, match="file descriptor"):
        _bus.Segment.attach(-1, 0)


@pytest.mark.parametrize(
    "geometry",
    [{"num_slots": 1}, {"slot_bytes": 100}, {"num_workers": 0}, {"num_workers": 65}, {"num_slots": 17}],
)
def test_an_impossible_geometry_is_a_value_error(geometry):
    usual = {"num_workers": 1, "epoch": 0, "num_slots": 16, "slot_bytes": PAGE // 16}
    with pytest.raises(ValueError, match="it takes"):
        _bus.Segment.create(**{**usual, "reply_num_slots": 2, "reply_slot_bytes": PAGE // 2, **geometry})


def ring_offset(segment) -> int:
    """Where the broadcast ring's data begins: after it come the two reply rings of a page each."""
    return os.fstat(segment.fd).st_size - 3 * PAGE


@pytest.mark.parametrize(
    "damaged",
    [
        record(1, 5),  # not the expected position
        record(0, 0xFFFFFFFF),  # longer than the ring
        record(0, PAGE // 16),  # longer than what was published
        b"\xff" * RECORD.size,
    ],
)
def test_garbage_in_a_record_is_an_error_every_time(segment, stack, damaged):
    worker = _bus.Segment.attach(segment.fd, 0)
    stack.callback(worker.close)
    assert segment.write(b"hello", 0, 0.0)
    os.pwrite(segment.fd, damaged, ring_offset(segment))
    for _ in range(3):
        with pytest.raises(ProtocolError, match="slot 0"):
            worker.read(READ, 0.0)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 63, 64, 1000])
def test_a_damaged_payload_is_found_by_its_checksum_and_counted(stack, length):
    driver = _bus.Segment.create(
        num_workers=1, epoch=0, num_slots=16, slot_bytes=PAGE, reply_num_slots=2, reply_slot_bytes=PAGE,
        has_checksums=True,
    )  # fmt: skip
    stack.callback(driver.close)
    worker = _bus.Segment.attach(driver.fd, 0)
    stack.callback(worker.close)
    payload = bytes(range(250)) * 4
    assert driver.write(payload[:length], 0, 0.0) and worker.read(READ, 0.0) == (0, payload[:length])
    if length == 0:
        return
    assert driver.write(payload[:length], 0, 0.0)
    begin = os.fstat(driver.fd).st_size - 18 * PAGE + PAGE + RECORD.size
    last = begin + length - 1
    os.pwrite(driver.fd, bytes([os.pread(driver.fd, 1, last)[0] ^ 0x10]), last)
    with pytest.raises(ProtocolError, match="checksum"):
        worker.read(READ, 0.0)
    assert driver.statistics()[-1][0][4] == 1


def test_the_checksum_is_crc_32c(stack):
    """The check value of RFC 3720 and of every catalogue of CRCs: 0xE3069283 for the digits 1 to 9."""
    driver = _bus.Segment.create(
        num_workers=1, epoch=0, num_slots=2, slot_bytes=PAGE, reply_num_slots=2, reply_slot_bytes=PAGE,
        has_checksums=True,
    )  # fmt: skip
    stack.callback(driver.close)
    driver.write(b"123456789", 0, 0.0)
    begin = os.fstat(driver.fd).st_size - 4 * PAGE
    assert RECORD.unpack(os.pread(driver.fd, RECORD.size, begin))[5] == 0xE3069283


def test_a_rank_is_one_process_s(segment, stack):
    stack.callback(_bus.Segment.attach(segment.fd, 0).close)
    with pytest.raises(BusError, match=f"rank 0 was taken by process {os.getpid()} already"):
        _bus.Segment.attach(segment.fd, 0)


def test_an_observer_sees_and_cannot_touch(segment, stack, start):
    worker = _bus.Segment.attach(segment.fd, 0)
    stack.callback(worker.close)
    segment.write(b"hello", 0, 0.0)
    segment.set_gauges((3, 2**64 - 1))
    worker.read(READ, 0.0)
    observer = _bus.Segment.observe(segment.fd)
    published, published_bytes, _, _, _, gauges, _, ranks = observer.statistics()
    assert (published, published_bytes, gauges[:3], ranks[0][1]) == (1, 5, (3, 2**64 - 1, 0), 1)
    assert observer.status(0)[0] == os.getpid()
    for use in (
        lambda: observer.write(b"a", 0, 0.0),
        lambda: observer.read(READ, 0.0),
        lambda: observer.wake(),
        lambda: observer.set_status(1, 1),
        lambda: observer.set_gauges((1,)),
    ):
        with pytest.raises((BusError, ValueError)):
            use()
    observer.close()
    assert not segment.closed and not worker.closed
    with pytest.raises(BusClosed):
        observer.statistics()


@pytest.mark.parametrize("tail", [17, 2**63, 2**64 - 1])
def test_a_tail_beyond_the_ring_is_an_error(segment, stack, tail):
    worker = _bus.Segment.attach(segment.fd, 0)
    stack.callback(worker.close)
    os.pwrite(segment.fd, struct.pack("<Q", tail), STATUS_END)
    with pytest.raises(ProtocolError, match="the writer claims"):
        worker.read(READ, 0.0)


@pytest.mark.parametrize("head", [17, 33, 2**64 - 1])
def test_a_head_ahead_of_the_writer_is_an_error(segment, head):
    for _ in range(16):
        assert segment.write(b"a", 0, 0.0)
    os.pwrite(segment.fd, struct.pack("<Q", head), STATUS_END + 64)
    with pytest.raises(ProtocolError, match="reader 0 claims"):
        segment.write(b"a", 0, 0.0)


def test_a_worker_cannot_write_the_broadcast_ring(segment, start):
    """Its mapping is read-only: a stray write would end that worker, not corrupt what the others read."""
    script = """if True:
        import re, sys
        from zmqexec import _bus
        worker = _bus.Segment.attach(int(sys.argv[1]), 0)
        maps = [line.split() for line in open("/proc/self/maps") if "memfd:zmqexec-bus" in line]
        print(*sorted(fields[1] for fields in maps))
    """
    process = start("-c", script, str(segment.fd), pass_fds=[segment.fd])
    assert process.communicate(timeout=20)[0].split() == ["r--s"] * 2 + ["rw-s"] * 3  # control page, reply ring twice


def test_a_fork_neither_uses_nor_closes_its_parents_bus(segment, stack):
    worker = _bus.Segment.attach(segment.fd, 0)
    stack.callback(worker.close)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            segment.write(b"a", 0, 0.0)
        except BusError:
            segment.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert not worker.closed
    assert segment.write(b"still open", 0, 0.0) and worker.read(READ, 0.0) == (0, b"still open")
