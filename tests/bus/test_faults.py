"""Whoever is killed, stopped, forked or closed on the bus, whenever: the others go on or learn of it, in time.

Real processes and real signals; `faulty.py` is what they run.
"""

import importlib.util
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.procs import is_stopped, leftovers, wait_for
from zmqexec.bus import ring, zmq_path
from zmqexec.bus.link import BY_ZMQ
from zmqexec.errors import BusClosed, BusError, BusTimeout
from zmqexec.protocol import CacheReady, StepInput, StepOutput

FAULTY = Path(__file__).with_name("faulty.py")
WORKER_BELL, SPACE_BELL, DRIVER_BELL, REPLY_SPACE_BELL = range(4)
SLACK = 5
GONE_S = 2.0
WAITS = 7  # index into a rank's statistics


@pytest.fixture(scope="module")
def faulty():
    spec = importlib.util.spec_from_file_location("faulty", FAULTY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(start):
    """Start a role of faulty.py."""

    def start_role(role: str, *args: object, **options) -> subprocess.Popen[str]:
        return start(str(FAULTY), role, *map(str, args), **options)

    return start_role


def num_waiters(segment, bell: int) -> int:
    """How many waiters a bell counts: the second word of its line on the page of bells."""
    return int.from_bytes(os.pread(segment.fd, 4, ring.PAGE_BYTES + 64 * bell + 4), "little")


def wait_read(segment, except_for: Sequence[int] = ()) -> None:
    """Wait until the readers have read everything and given it back."""
    largest = segment.max_payload_bytes
    wait_for(lambda: set(segment.holding_back(largest)) <= set(except_for), 30.0, "everything read")


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: is_stopped(pid), 10.0, "a stopped process")


# ── readers ─────────────────────────────────────────────────────────────────────────────────────────────────────────

FIRST = 10  # messages before the fault


def stop_while_parked(segment, victim: subprocess.Popen[str]) -> None:
    wait_for(lambda: num_waiters(segment, WORKER_BELL) == 3, 10.0, "three parked readers")


def stop_while_spinning(segment, victim: subprocess.Popen[str]) -> None:
    def spins() -> bool:
        """It spun since it was looked at last, and is not parked now."""
        before = segment.statistics()[-1][1][WAITS]
        os.kill(victim.pid, signal.SIGCONT)
        time.sleep(0.002)  # some turns of its spinning
        stop(victim.pid)
        spun_ns = segment.statistics()[-1][1][WAITS][2] - before[2]
        return spun_ns > 0 and num_waiters(segment, WORKER_BELL) == 2

    wait_for(spins, 10.0, "a spinning reader")


def stop_in_the_decoder(segment, victim: subprocess.Popen[str]) -> None:
    wait_for(lambda: is_stopped(victim.pid), 10.0, "a reader that has stopped itself between taking and freeing")


@pytest.mark.parametrize("moment", [stop_while_parked, stop_while_spinning, stop_in_the_decoder])
def test_a_reader_killed_at_any_moment_holds_the_writer_back_by_name_and_takes_nothing_from_the_others(
    faulty, run, stack, moment
):
    segment = faulty.make_segment(3)
    if moment is stop_while_spinning:
        segment.close()
        segment = faulty.make_segment(3, policy="latency")
    stack.callback(segment.close)
    writer = ring.RingWriter(segment)
    for number in range(FIRST):
        writer.write(faulty.message(number), 1.0)
    timeout_s = 40e-6 if moment is stop_while_spinning else 60.0  # less than a first wait spins
    stop_at = FIRST - 1 if moment is stop_in_the_decoder else -1
    readers = [
        run("reader", segment.fd, rank, timeout_s if rank == 1 else 60.0, stop_at if rank == 1 else -1,
            pass_fds=[segment.fd])
        for rank in range(3)
    ]  # fmt: skip
    victim = readers[1]
    wait_read(segment, except_for=[1] if moment is stop_in_the_decoder else [])
    wait_for(lambda: num_waiters(segment, WORKER_BELL) >= 2, 10.0, "the others parked")
    moment(segment, victim)
    victim.kill()
    victim.wait(10)

    # One at a time: the others are parked for a minute each time, so only the bell can have woken them.
    sent = FIRST
    while writer.try_write(faulty.message(sent)):
        sent += 1
        wait_read(segment, except_for=[1])
        wait_for(lambda: num_waiters(segment, WORKER_BELL) >= 2, 10.0, "the others parked")
    assert sent > FIRST + 5
    begin = time.monotonic()
    with pytest.raises(BusTimeout, match=r"held back by rank 1$"):
        writer.write(faulty.message(sent), 0.1)
    assert 0.1 <= time.monotonic() - begin < 0.1 + SLACK
    segment.close()
    for reader in readers[::2]:
        assert json.loads(reader.communicate(timeout=20)[0]) == {"intact": sent, "wrong": 0}


def test_a_worker_killed_while_it_waits_to_reply_loses_what_it_did_not_publish_alone(faulty, run, stack):
    segment = faulty.make_segment(2)
    stack.callback(segment.close)
    total = 200
    repliers = [run("replier", segment.fd, rank, total, pass_fds=[segment.fd]) for rank in range(2)]
    wait_for(lambda: num_waiters(segment, REPLY_SPACE_BELL) == 2, 30.0, "both parked, with their rings full")
    repliers[0].kill()
    repliers[0].wait(10)
    streams = [faulty.Stream(), faulty.Stream()]
    while (reply := segment.read((bytes,), 10.0 if streams[1].intact < total else 0.0)) is not None:
        streams[reply[0]].take(memoryview(reply[1]))
    assert [stream.wrong for stream in streams] == [0, 0]
    assert 0 < streams[0].intact < total and streams[1].intact == total
    assert repliers[1].wait(10) == 0


def test_a_ring_that_was_full_for_longer_than_the_deadline_goes_on_in_order(faulty, run, stack):
    segment = faulty.make_segment(2)
    stack.callback(segment.close)
    writer = ring.RingWriter(segment)
    readers = [run("reader", segment.fd, rank, 60.0, -1, pass_fds=[segment.fd]) for rank in range(2)]
    wait_for(lambda: num_waiters(segment, WORKER_BELL) == 2, 30.0, "parked readers")
    sent = 0
    for _ in range(3):
        for reader in readers:
            stop(reader.pid)
        while writer.try_write(faulty.message(sent)):
            sent += 1
        with pytest.raises(BusTimeout, match=r"held back by ranks 0, 1$"):
            writer.write(faulty.message(sent), 0.05)
        for reader in readers:
            os.kill(reader.pid, signal.SIGCONT)
        writer.write(faulty.message(sent), 10.0)
        sent += 1
        wait_read(segment)
    segment.close()
    for reader in readers:
        assert json.loads(reader.communicate(timeout=20)[0]) == {"intact": sent, "wrong": 0}


def test_whoever_is_stopped_for_longer_than_a_wait_goes_on_and_nothing_is_lost(faulty, run, stack):
    read_end, write_end = os.pipe()
    stack.callback(os.close, read_end)
    driver = run("party", read_end, pass_fds=[read_end], start_new_session=True)
    stack.callback(lambda: driver.poll() is None and os.killpg(driver.pid, signal.SIGKILL))
    try:
        pids = {"driver": driver.pid, **json.loads(driver.stdout.readline())}
        for pid in [*pids.values(), *pids.values()]:
            stop(pid)
            time.sleep(faulty.WAIT_S * 10)  # the fault itself
            os.kill(pid, signal.SIGCONT)
    finally:
        os.close(write_end)
    result = json.loads(driver.communicate(timeout=60)[0])
    whole = {"intact": result["sent"], "wrong": 0}
    assert result["answers"] == [whole, whole] and result["sent"] > 0
    assert [{name: one[name] for name in whole} for one in result["seen"]] == [whole, whole]
    assert result["waited"] > 0 and all(one["waited"] > 0 for one in result["seen"]), "waits that ended without success"
    assert leftovers([], driver.pid) == []


# ── the driver ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("how", "rounds"), [("ring", 50), ("zmq", 50), ("marker", 3)])
def test_a_driver_killed_while_it_publishes_leaves_no_worker_and_no_torn_message(run, tmp_path, how, rounds):
    """ "marker": between the announcement of a payload and the payload."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    nursery = run("nursery", how, rounds, seed, start_new_session=True, cwd=tmp_path)
    result = json.loads(nursery.communicate(timeout=100)[0])
    print(result)
    assert result["errors"] == []
    assert result["workers"] == 2 * rounds and result["exit_codes"] == [1], "ended by the death watch"
    assert result["slowest_s"] < GONE_S * SLACK
    assert leftovers([tmp_path], nursery.pid) == []


# ── close, from another thread ──────────────────────────────────────────────────────────────────────────────────────

SMALL, LARGE = bytes(3000), bytes(10_000)  # of rings of 4096 bytes


def begin_publish(driver, worker, in_thread):
    driver.publish(StepInput(7, 0, prefills=SMALL), 1)
    join = in_thread(lambda: driver.publish(StepInput(7, 1, prefills=SMALL), 60))
    wait_for(lambda: num_waiters(driver._segment, SPACE_BELL) == 1, 10.0, "a waiting publish")
    return join


def begin_publish_large(driver, worker, in_thread):
    join = in_thread(lambda: driver.publish(StepInput(7, 0, prefills=LARGE), 60))
    wait_for(lambda: driver._outbox._broken, 10.0, "a payload on its way")
    return join


def begin_receive(driver, worker, in_thread):
    join = in_thread(lambda: worker.receive(60))
    wait_for(lambda: num_waiters(driver._segment, WORKER_BELL) == 1, 10.0, "a waiting receive")
    return join


def begin_fetch(driver, worker, in_thread):
    announcement = driver._outbox._zmq.announce(len(LARGE))
    assert driver._segment.write(announcement, BY_ZMQ, 1)
    join = in_thread(lambda: worker.receive(60))
    wait_for(lambda: worker._inbox._pending is not None, 10.0, "a waiting fetch")
    return join


def begin_reply(driver, worker, in_thread):
    worker.reply(StepOutput(7, 0, SMALL), 1)
    join = in_thread(lambda: worker.reply(StepOutput(7, 1, SMALL), 60))
    wait_for(lambda: num_waiters(driver._segment, REPLY_SPACE_BELL) == 1, 10.0, "a waiting reply")
    return join


def begin_reply_large(driver, worker, in_thread):
    join = in_thread(lambda: worker.reply(StepOutput(7, 0, LARGE), 60))
    wait_for(lambda: worker._outbox._broken, 10.0, "a payload on its way")
    return join


def begin_receive_replies(driver, worker, in_thread):
    join = in_thread(lambda: driver.receive(60))
    wait_for(lambda: num_waiters(driver._segment, DRIVER_BELL) == 1, 10.0, "a waiting receive")
    return join


def begin_fetch_of_a_reply(driver, worker, in_thread):
    assert worker._segment.write(worker._outbox._zmq.announce(len(LARGE)), BY_ZMQ, 1)
    join = in_thread(lambda: driver.receive(60))
    wait_for(lambda: driver._inbox._pending is not None, 10.0, "a waiting fetch")
    return join


DRIVERS = [begin_publish, begin_publish_large, begin_receive_replies, begin_fetch_of_a_reply]
WORKERS = [begin_receive, begin_fetch, begin_reply, begin_reply_large]


@pytest.mark.parametrize(
    ("begin", "closer"),
    [(begin, "driver") for begin in DRIVERS + WORKERS] + [(begin, "worker") for begin in WORKERS],
)
def test_closing_from_another_thread_ends_every_kind_of_wait(make_bus, in_thread, begin, closer):
    driver, (worker,) = make_bus(1, ring_bytes=4096, reply_ring_bytes=4096, wait_policy="eco")
    join = begin(driver, worker, in_thread)
    (driver if closer == "driver" else worker).close()
    with pytest.raises(BusClosed):
        join()


# ── bad use ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_process_cannot_take_a_rank_that_is_taken(make_bus, start):
    driver, (worker,) = make_bus(1)
    script = f"from zmqexec import _bus; _bus.Segment.attach({driver.fd}, 0)"
    intruder = start("-c", script, pass_fds=[driver.fd], stderr=subprocess.PIPE)
    assert (
        f"BusError: cannot attach to the bus: rank 0 was taken by process {os.getpid()} already"
        in (intruder.communicate(timeout=20)[1])
    )
    driver.publish(StepInput(7, 1), 1)
    assert worker.receive(1) == StepInput(7, 1)


@pytest.mark.parametrize("zmq_is_open", [False, True], ids=["", "with sockets open"])
def test_a_fork_is_refused_every_use_of_the_bus_and_disturbs_nothing(make_bus, in_thread, zmq_is_open):
    driver, (worker,) = make_bus(1, ring_bytes=4096, reply_ring_bytes=4096)
    large = StepInput(7, 0, prefills=LARGE)
    large_reply = StepOutput(7, 0, LARGE)

    def exchange() -> None:
        publishing = in_thread(lambda: driver.publish(large, 10))
        assert worker.receive(10) == large
        publishing()
        replying = in_thread(lambda: worker.reply(large_reply, 10))
        assert driver.receive(10) == (0, large_reply)
        replying()

    if zmq_is_open:
        exchange()
    uses = [
        lambda: driver.publish(StepInput(7, 1), 10),
        lambda: driver.publish(large, 10),
        lambda: driver.receive(10),
        lambda: worker.receive(10),
        lambda: worker.reply(CacheReady(7), 10),
        lambda: worker.reply(large_reply, 10),
    ]
    pid = os.fork()
    if pid == 0:
        refused = 0
        try:
            for use in uses:
                try:
                    use()
                except BusError as error:
                    refused += "belongs to the process that opened it" in str(error)
            driver.close()
            worker.close()
        finally:
            os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == len(uses)
    exchange()


# ── file descriptors ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("who", "num_fds"),
    [
        ("sender", zmq_path.CONTEXT_FDS + 2 * zmq_path.SENDER_FDS),
        ("receiver", zmq_path.CONTEXT_FDS + zmq_path.RECEIVER_FDS),
    ],
)
def test_a_large_message_that_finds_no_descriptors_is_refused_and_can_be_sent_again(run, who, num_fds):
    """Left alone, libzmq would abort the process."""
    said, _ = run("without_descriptors", who, num_fds).communicate(timeout=60)
    assert said == "all refused, and then delivered\n"
