"""Waiting: no wake-up is lost, no wait outlasts its deadline, and closing or a signal ends it."""

import contextlib
import os
import signal
import threading
import time

import pytest

from zmqexec import _bus
from zmqexec.bus import ring
from zmqexec.errors import BusClosed


@pytest.fixture
def pair(make_ring):
    writer, (reader,) = make_ring(num_slots=2, num_readers=1)
    return writer.segment, reader.segment


@pytest.mark.parametrize("spin_us", [0.0, 30.0, 1e6])
def test_a_wait_ends_at_its_deadline(pair, spin_us):
    _, worker = pair
    begin = time.monotonic()
    assert not worker.wait(_bus.WORKER_BELL, worker.bell_value(_bus.WORKER_BELL), 0.05, spin_us)
    assert 0.05 <= time.monotonic() - begin < 5


def test_a_ring_before_the_wait_ends_it_at_once(pair):
    driver, worker = pair
    seen = worker.bell_value(_bus.WORKER_BELL)
    driver.ring_bell(_bus.WORKER_BELL)
    assert worker.wait(_bus.WORKER_BELL, seen, 60, 0.0)


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), 1e9])
def test_a_wait_without_a_deadline_is_refused(pair, timeout_s):
    with pytest.raises(ValueError, match="timeout_s"):
        pair[0].wait(_bus.SPACE_BELL, 0, timeout_s, 0.0)


@pytest.mark.parametrize("spin_us", [0.0, 20.0])
def test_no_wake_up_is_lost(make_ring, in_thread, spin_us):
    """Ping-pong: each side waits for the other with a deadline that only a lost wake-up would reach."""
    rounds = 20_000
    writer, (reader,) = make_ring(num_slots=2, num_readers=1)
    reader = ring.RingReader(reader.segment, spin_us=spin_us)
    writer = ring.RingWriter(writer.segment, spin_us)

    def read():
        return sum(reader.read(timeout_s=5) is not None for _ in range(rounds))

    join = in_thread(read)
    for _ in range(rounds):
        writer.write(b"ping", timeout_s=5)
    assert join() == rounds


def test_a_signal_handler_runs_during_a_wait_and_may_end_it(pair):
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            pair[1].wait(_bus.WORKER_BELL, pair[1].bell_value(_bus.WORKER_BELL), 60, 0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_handler_that_returns_does_not_shorten_a_wait(pair):
    calls = []
    before = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        begin = time.monotonic()
        assert not pair[1].wait(_bus.WORKER_BELL, pair[1].bell_value(_bus.WORKER_BELL), 0.1, 0.0)
        assert time.monotonic() - begin >= 0.1 and calls
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def waiting_threads(segment, bell: int) -> int:
    """How many waiters a bell counts: the second word of its line on the page of bells."""
    return int.from_bytes(os.pread(segment.fd, 4, ring.PAGE_BYTES + 64 * bell + 4), "little")


@pytest.mark.parametrize("who", ["driver", "worker"])
def test_closing_ends_the_waits_of_other_threads(pair, in_thread, eventually, who):
    driver, worker = pair
    joins = [in_thread(lambda: worker.wait(_bus.WORKER_BELL, 0, 60, 0.0)) for _ in range(3)]
    eventually(lambda: waiting_threads(driver, _bus.WORKER_BELL) == 3)
    if who == "worker":
        worker.close()
        for join in joins:
            with pytest.raises(BusClosed):
                join()
    else:
        driver.close()
        assert [join() for join in joins] == [True] * 3
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


def test_dropping_the_last_reference_closes(make_ring):
    writer, (reader,) = ring.make_ring(num_slots=2, num_readers=1)
    del writer
    assert reader.segment.closed
    with pytest.raises(BusClosed):
        reader.read(timeout_s=60)
    reader.close()
