"""Waiting: no wake-up is lost, no wait outlasts its deadline, and closing or a signal ends it."""

import contextlib
import gc
import os
import signal
import threading
import time

import msgspec
import pytest

from zmqexec import _bus
from zmqexec.bus import ring
from zmqexec.config import WAIT_POLICIES
from zmqexec.errors import BusClosed, BusError

AS_BYTES = (bytes,)
encode_into = msgspec.msgpack.Encoder().encode_into
WORKER_BELL, SPACE_BELL = 0, 1


@pytest.fixture
def make_pair(stack):
    """A driver's and a worker's segment with a broadcast ring of two slots."""

    def make(policy="eco", cores=0):
        driver = _bus.Segment.create(
            num_workers=1,
            epoch=0,
            num_slots=2,
            slot_bytes=ring.slot_bytes_for(2),
            reply_num_slots=2,
            reply_slot_bytes=ring.slot_bytes_for(2),
            wait_policy=WAIT_POLICIES.index(policy),
            cores=cores,
        )
        stack.callback(driver.close)
        worker = _bus.Segment.attach(driver.fd, 0, cores)
        stack.callback(worker.close)
        return driver, worker

    return make


@pytest.fixture
def pair(make_pair):
    return make_pair()


@pytest.mark.parametrize("policy", WAIT_POLICIES)
def test_a_wait_ends_at_its_deadline(make_pair, policy):
    driver, worker = make_pair(policy)
    for timeout_s in (0.05, 0.0003):  # also one within a spin
        begin = time.monotonic()
        assert worker.read(AS_BYTES, timeout_s) is None
        assert timeout_s <= time.monotonic() - begin < 5
    assert driver.write(b"a", 0, 0.0) and driver.write(b"b", 0, 0.0)
    begin = time.monotonic()
    assert not driver.write(b"c", 0, 0.05)
    assert 0.05 <= time.monotonic() - begin < 5


def test_a_wait_whose_deadline_comes_before_its_spin_parks_until_then(make_pair, in_thread):
    driver, worker = make_pair("latency", cores=64)

    def publish():
        for _ in range(30):
            time.sleep(0.01)
            driver.write(b"a", 0, 1)

    join = in_thread(publish)
    assert all(worker.read(AS_BYTES, 5) == b"a" for _ in range(30))  # it has learned to spin after some 10 ms
    join()
    parked = driver.statistics()[-1][0][7][1]
    for _ in range(5):
        assert worker.read(AS_BYTES, 0.004) is None
    assert driver.statistics()[-1][0][7][1] - parked <= 10


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), 1e9])
def test_a_wait_without_a_deadline_is_refused(pair, timeout_s):
    driver, worker = pair
    with pytest.raises(ValueError, match="timeout_s"):
        worker.read(AS_BYTES, timeout_s)
    assert driver.write(b"a", 0, 0.0) and driver.write(b"b", 0, 0.0)
    with pytest.raises(ValueError, match="timeout_s"):
        driver.write(b"c", 0, timeout_s)


@pytest.mark.parametrize("cores", [0, 64], ids=["crowded", "a core each"])
@pytest.mark.parametrize("policy", WAIT_POLICIES)
def test_no_wake_up_is_lost(make_pair, in_thread, policy, cores):
    """Each side waits for the other with a deadline that only a lost wake-up would reach."""
    rounds = 20_000
    driver, worker = make_pair(policy, cores)
    join = in_thread(lambda: sum(worker.read(AS_BYTES, 5) is not None for _ in range(rounds)))
    for _ in range(rounds):
        assert driver.write(b"ping", 0, 5)
    assert join() == rounds


@pytest.mark.parametrize("cores", [0, 64], ids=["crowded", "a core each"])
@pytest.mark.parametrize("policy", WAIT_POLICIES)
def test_no_wake_up_is_lost_between_those_who_herald_and_those_who_rehearse(make_pair, in_thread, policy, cores):
    rounds = 5_000
    driver, worker = make_pair(policy, cores)
    join = in_thread(lambda: sum(worker.read(AS_BYTES, 5, lambda: None) is not None for _ in range(rounds)))
    for _ in range(rounds):
        if not driver.encode(encode_into, "ping", 0):
            assert driver.write(b"ping", 0, 5)
    assert join() == rounds


def test_a_reader_rehearses_while_its_record_is_being_made(make_pair, in_thread):
    driver, worker = make_pair("balanced", cores=64)
    has_rehearsed = threading.Event()

    def slowly(message, buffer):
        assert has_rehearsed.wait(10)
        encode_into(message, buffer)

    join = in_thread(lambda: worker.read(AS_BYTES, 20, has_rehearsed.set))
    assert driver.encode(slowly, "a", 0)
    assert join() == b"\xa1a"


@pytest.mark.parametrize(("policy", "cores"), [("eco", 64), ("balanced", 0)])
def test_nobody_rehearses_where_it_would_be_in_the_way(make_pair, in_thread, policy, cores):
    driver, worker = make_pair(policy, cores)
    rehearsed = []
    for _ in range(20):
        join = in_thread(lambda: worker.read(AS_BYTES, 20, lambda: rehearsed.append(1)))
        assert driver.encode(encode_into, "a", 0) and join() == b"\xa1a"
    assert rehearsed == []


def test_what_a_rehearsal_raises_is_raised_and_no_record_is_lost(make_pair):
    driver, worker = make_pair("balanced", cores=64)

    def rehearse():
        assert worker.read(AS_BYTES, 0.0) is None  # as a signal handler might
        driver.write(b"just now", 0, 0.0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        worker.read(AS_BYTES, 20, rehearse)
    assert worker.read(AS_BYTES, 0.0) == b"just now"


def test_a_rehearsal_may_close_the_bus(make_pair):
    worker = make_pair("balanced", cores=64)[1]
    with pytest.raises(BusClosed):
        worker.read(AS_BYTES, 20, worker.close)


def test_a_signal_handler_runs_during_a_wait_and_may_end_it(pair):
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            pair[1].read(AS_BYTES, 60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_handler_that_returns_does_not_shorten_a_wait_and_may_use_the_bus(pair):
    worker = pair[1]
    calls = []
    before = signal.signal(signal.SIGALRM, lambda *_: calls.append(worker.read(AS_BYTES, 0.0)))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        begin = time.monotonic()
        assert worker.read(AS_BYTES, 0.1) is None
        assert time.monotonic() - begin >= 0.1 and calls
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("policy", ["balanced", "latency"])
def test_ctrl_c_during_a_spin_loses_no_record_and_is_heard_at_once(make_pair, policy):
    driver, worker = make_pair(policy, cores=64)
    for _ in range(20):  # so that the wait has learned to spin
        driver.write(b"ping", 0, 0.0)
        assert worker.read(AS_BYTES, 1) == b"ping"

    class Interrupted(Exception):
        """What Ctrl-C raises ends a test run; any exception will do."""

    def interrupt(signum, frame):
        driver.write(b"just now", 0, 0.0)
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(20):
            begin = time.monotonic()
            with pytest.raises(Interrupted):
                signal.setitimer(signal.ITIMER_REAL, 5e-5)
                worker.read(AS_BYTES, 20)
            assert time.monotonic() - begin < 10
            assert worker.read(AS_BYTES, 1) == b"just now"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_garbage_collection_that_closes_the_bus_while_figures_are_made_is_safe(make_pair):
    for at in range(1, 6):
        driver, worker = make_pair()
        driver.write(b"a", 0, 0.0)
        seen = []

        def close(phase, info, seen=seen, at=at, worker=worker):
            if phase == "start":
                seen.append(phase)
                if len(seen) == at:
                    worker.close()

        threshold = gc.get_threshold()
        gc.callbacks.append(close)
        gc.set_threshold(1)
        try:
            with contextlib.suppress(BusClosed):
                for _ in range(10):
                    worker.statistics()
                    worker.holding_back(10)
        finally:
            gc.set_threshold(*threshold)
            gc.callbacks.remove(close)


def num_waiters(segment, bell: int) -> int:
    """How many waiters a bell counts: the second word of its line on the page of bells."""
    return int.from_bytes(os.pread(segment.fd, 4, ring.PAGE_BYTES + 64 * bell + 4), "little")


def test_two_threads_that_read_or_write_at_once_are_told(pair, in_thread, eventually):
    driver, worker = pair
    assert driver.write(b"a", 0, 0.0) and driver.write(b"b", 0, 0.0)
    writing = in_thread(lambda: driver.write(b"c", 0, 60))
    eventually(lambda: num_waiters(driver, SPACE_BELL) == 1)
    with pytest.raises(BusError, match="two threads write"):
        driver.write(b"d", 0, 0.0)
    assert [worker.read(AS_BYTES, 5) for _ in range(3)] == [b"a", b"b", b"c"] and writing()
    reading = in_thread(lambda: worker.read(AS_BYTES, 60))
    eventually(lambda: num_waiters(driver, WORKER_BELL) == 1)
    with pytest.raises(BusError, match="two threads read"):
        worker.read(AS_BYTES, 0.0)
    assert driver.write(b"e", 0, 0.0) and reading() == b"e"


@pytest.mark.parametrize("who", ["driver", "worker"])
def test_closing_ends_the_wait_of_another_thread(pair, in_thread, eventually, who):
    driver, worker = pair
    join = in_thread(lambda: worker.read(AS_BYTES, 60))
    eventually(lambda: num_waiters(driver, WORKER_BELL) == 1)
    (worker if who == "worker" else driver).close()
    with pytest.raises(BusClosed, match="in this process" if who == "worker" else "the driver closed"):
        join()
    assert worker.closed


def test_closing_at_any_moment_of_a_wait_is_safe(stack):
    """The mapping must outlive the last thread inside it, however the two race."""
    for delay in range(200):
        writer, (reader,) = ring.make_ring(num_slots=2, num_readers=1)
        started = threading.Event()

        def wait(reader=reader, started=started):
            started.set()
            with contextlib.suppress(BusClosed):
                while True:
                    reader.read(timeout_s=5)

        thread = threading.Thread(target=wait)
        thread.start()
        started.wait(5)
        for _ in range(delay * 20):
            pass
        reader.close()
        thread.join(10)
        assert not thread.is_alive()
        writer.close()


def test_a_decoder_that_closes_the_bus_still_has_its_payload(pair):
    driver, worker = pair
    driver.write(b"the last", 0, 0.0)

    def close_and_copy(payload):
        worker.close()
        return bytes(payload)

    assert worker.read((close_and_copy,), 1) == b"the last"
    with pytest.raises(BusClosed):
        worker.read(AS_BYTES, 1)


def test_a_decoder_that_raises_loses_its_record_alone(pair):
    driver, worker = pair
    assert driver.write(b"bad", 0, 0.0) and driver.write(b"good", 0, 0.0)

    def refuse(payload):
        raise ValueError(bytes(payload))

    with pytest.raises(ValueError, match="bad"):
        worker.read((refuse,), 1)
    assert worker.read(AS_BYTES, 1) == b"good"


def test_a_payload_cannot_be_looked_at_after_its_decoder_has_returned(pair):
    driver, worker = pair
    driver.write(b"mine", 0, 0.0)
    kept = worker.read((lambda payload: payload,), 1)
    with pytest.raises(BufferError, match="only while it is decoded"):
        bytes(kept)


def test_a_decoder_that_keeps_a_view_is_told(pair):
    driver, worker = pair
    driver.write(b"mine", 0, 0.0)
    kept = []
    with pytest.raises(BufferError, match="kept a view"):
        worker.read((lambda payload: kept.append(memoryview(payload)[1:]),), 1)
    worker.close()
    assert bytes(kept.pop()) == b"ine"  # its memory stays


def test_what_a_decoder_returns_may_not_read_either_when_it_is_dropped(pair):
    driver, worker = pair
    assert driver.write(b"first", 0, 0.0) and driver.write(b"second", 0, 0.0)
    refused = []

    class Returned:
        def __init__(self, payload):
            self.view = memoryview(payload)

        def __del__(self):
            try:
                worker.read(AS_BYTES, 0.0)
            except BusError as error:
                refused.append(str(error))  # the error itself would keep the view

    with pytest.raises(BufferError, match="kept a view"):
        worker.read((Returned,), 0.0)
    assert len(refused) == 1 and worker.read(AS_BYTES, 0.0) == b"second"


def test_dropping_the_last_reference_closes(make_ring):
    writer, (reader,) = ring.make_ring(num_slots=2, num_readers=1)
    del writer
    assert reader.segment.closed
    with pytest.raises(BusClosed):
        reader.read(timeout_s=60)
    reader.close()
