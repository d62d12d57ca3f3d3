"""The shared memory: a process attaches only to a bus of its own kind, and believes nothing it reads there."""

import fcntl
import os
import struct

import pytest

from zmqexec import _bus
from zmqexec.bus import ring
from zmqexec.errors import BusError, ProtocolError

PAGE = ring.PAGE_BYTES
# magic, layout version, reserved, epoch, total bytes; page bytes, workers, slots, slot bytes, the same of reply rings
HEADER = struct.Struct("<QIIQQIIIIII")
RECORD = struct.Struct("<QII")  # position, length, kind


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
    "record",
    [
        RECORD.pack(1, 5, 0),  # not the expected position
        RECORD.pack(0, 0xFFFFFFFF, 0),  # longer than the ring
        RECORD.pack(0, PAGE // 16, 0),  # longer than what was published
        b"\xff" * RECORD.size,
    ],
)
def test_garbage_in_a_record_is_an_error_every_time(segment, stack, record):
    worker = _bus.Segment.attach(segment.fd, 0)
    stack.callback(worker.close)
    assert segment.try_write(b"hello", 0)
    os.pwrite(segment.fd, record, ring_offset(segment))
    for _ in range(3):
        with pytest.raises(ProtocolError, match="slot 0"):
            worker.try_read()


@pytest.mark.parametrize("tail", [17, 2**63, 2**64 - 1])
def test_a_tail_beyond_the_ring_is_an_error(segment, stack, tail):
    worker = _bus.Segment.attach(segment.fd, 0)
    stack.callback(worker.close)
    os.pwrite(segment.fd, struct.pack("<Q", tail), 2 * PAGE + 2 * 512)
    with pytest.raises(ProtocolError, match="the writer claims"):
        worker.try_read()


@pytest.mark.parametrize("head", [17, 33, 2**64 - 1])
def test_a_head_ahead_of_the_writer_is_an_error(segment, head):
    for _ in range(16):
        assert segment.try_write(b"a", 0)
    os.pwrite(segment.fd, struct.pack("<Q", head), 2 * PAGE + 2 * 512 + 64)
    with pytest.raises(ProtocolError, match="reader 0 claims"):
        segment.try_write(b"a", 0)


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
            segment.try_write(b"a", 0)
        except BusError:
            segment.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert not worker.closed
    assert segment.try_write(b"still open", 0) and worker.try_read() == (0, b"still open")
