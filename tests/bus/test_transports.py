"""What every transport of the bus promises, tried on each: order, wholeness, bounded waits, an orderly end."""

import gc
import random
import time
import zlib
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from zmqexec.bus.echo_worker import Echo
from zmqexec.bus.status import Phase
from zmqexec.bus.zeromq.driver_channel import ZmqDriverChannel
from zmqexec.bus.zeromq.worker_channel import ZmqWorkerChannel
from zmqexec.errors import BusClosed, BusTimeout
from zmqexec.protocol import CacheReady, ErrorInfo, Failure, InitCache, StepInput, StepOutput

with suppress(ImportError):  # where the extension module cannot be built, ZeroMQ is all there is
    from zmqexec.bus.channel import DriverChannel, WorkerChannel

READER = Path(__file__).with_name("bus_reader.py")
MIB = 1 << 20


class Ring:
    """Shared memory."""

    name = "ring"

    @staticmethod
    def create(num_workers, is_small=False):
        """is_small: full after one message of more than half a page."""
        settings = {"ring_bytes": 4096, "reply_ring_bytes": 4096} if is_small else {}
        return DriverChannel.create(num_workers, epoch=7, **settings)

    @staticmethod
    def attach(driver, rank):
        return WorkerChannel.attach(driver.fd, rank)

    @staticmethod
    def reader(driver):
        """What a process needs to attach, and the file descriptors it inherits."""
        return str(driver.fd), [driver.fd]


class Zmq:
    """ZeroMQ alone."""

    name = "zmq"

    @staticmethod
    def create(num_workers, is_small=False):
        return ZmqDriverChannel.create(num_workers, epoch=7, window_messages=1 if is_small else 64)

    @staticmethod
    def attach(driver, rank):
        return ZmqWorkerChannel.connect(driver.endpoints[rank], rank, timeout_s=10)

    @staticmethod
    def reader(driver):
        return "", []


@pytest.fixture(params=[Ring, Zmq], ids=lambda transport: transport.name)
def transport(request):
    if request.param is Ring and "DriverChannel" not in globals():
        pytest.skip("needs the extension module")
    return request.param


@pytest.fixture
def make(transport, stack):
    """A driver's channel and those of all its workers, in this process."""

    def make_bus(num_workers=1, is_small=False):
        driver = stack.enter_context(transport.create(num_workers, is_small))
        return driver, [stack.enter_context(transport.attach(driver, rank)) for rank in range(num_workers)]

    return make_bus


BIG_STEP = StepInput(7, 1, prefills=bytes(3000))


def test_every_worker_gets_every_message_in_order(make):
    driver, workers = make(3)
    messages = [InitCache(7, 100), StepInput(7, 1, decodes=b"\x07"), *(InitCache(7, n) for n in range(40))]
    for message in messages:
        driver.publish(message, timeout_s=10)
    for worker in workers:
        assert [worker.receive(timeout_s=10) for _ in messages] == messages
        assert worker.try_receive() is None


def test_replies_come_with_their_rank_and_each_ranks_in_order(make):
    driver, workers = make(3)
    for step_id in range(5):
        for worker in workers:
            worker.reply(StepOutput(7, step_id, b""), timeout_s=10)
    replies = [driver.receive(timeout_s=10) for _ in range(15)]
    for rank in range(3):
        assert [reply.step_id for from_rank, reply in replies if from_rank == rank] == [0, 1, 2, 3, 4]
    assert driver.try_receive() is None


def test_an_error_crosses_whole(make):
    driver, (worker,) = make(1)
    failure = Failure(7, -1, "LOADING", ErrorInfo("WorkerFailed", "Traceback ...\n" * 1000))
    worker.reply(failure, timeout_s=10)
    assert driver.receive(timeout_s=10) == (0, failure)


def test_large_messages_cross_whole_and_in_order_both_ways(make, in_thread):
    driver, (worker, other) = make(2)
    noise = random.Random(1).randbytes(MIB)
    lengths = [0, 64 * MIB, 1, MIB, 100, 16 * MIB, 65 * MIB, 3]
    steps = [StepInput(7, n, prefills=(noise * 65)[:length]) for n, length in enumerate(lengths)]

    def echo():
        for _ in steps:
            step = worker.receive(timeout_s=30)
            worker.reply(StepOutput(7, step.step_id, step.prefills), timeout_s=30)

    echoing = in_thread(echo)
    receiving = in_thread(lambda: [driver.receive(timeout_s=30)[1].token_ids for _ in steps])
    reading = in_thread(lambda: [other.receive(timeout_s=30) for _ in steps])
    for step in steps:
        driver.publish(step, timeout_s=30)
    echoing()
    assert reading() == steps
    assert receiving() == [step.prefills for step in steps]


def test_a_driver_that_waits_for_room_takes_the_reply_that_its_worker_cannot_deliver(make, in_thread):
    driver, (worker,) = make(1, is_small=True)
    replies = [StepOutput(7, step_id, bytes(3000)) for step_id in range(4)]
    received = []

    def check():
        received.append(driver.try_receive())

    def work():
        for reply in replies:
            worker.reply(reply, timeout_s=10)
        return [worker.receive(timeout_s=10) for _ in range(2)]

    working = in_thread(work)
    driver.publish(BIG_STEP, timeout_s=10)
    driver.publish(BIG_STEP, timeout_s=10, check=check)
    assert working() == [BIG_STEP] * 2
    replies_seen = [one[1] for one in received if one is not None]
    assert replies_seen + [driver.receive(10)[1] for _ in range(4 - len(replies_seen))] == replies


def test_receiving_gives_up_at_the_deadline(make):
    driver, (worker,) = make(1)
    for end in (driver, worker):
        begin = time.monotonic()
        assert end.receive(timeout_s=0.05) is None
        assert 0.05 <= time.monotonic() - begin < 5


def test_a_slow_reader_holds_the_writer_back_and_is_named(make):
    driver, (reads, _) = make(2, is_small=True)
    driver.publish(BIG_STEP, timeout_s=10)
    assert reads.receive(timeout_s=10) == BIG_STEP
    with pytest.raises(BusTimeout, match=r"held back by rank 1$"):
        driver.publish(BIG_STEP, timeout_s=0.5)
    assert reads.receive(timeout_s=0.05) is None  # nothing was sent to anybody


def test_after_a_slow_reader_has_caught_up_the_writer_goes_on(make, in_thread):
    driver, (worker,) = make(1, is_small=True)
    publishing = in_thread(lambda: [driver.publish(BIG_STEP, timeout_s=10) for _ in range(20)])
    assert [worker.receive(timeout_s=10) for _ in range(20)] == [BIG_STEP] * 20
    publishing()


def test_a_reply_that_the_driver_does_not_read_times_out(make):
    _, (worker,) = make(1, is_small=True)
    reply = StepOutput(7, 1, bytes(3000))
    worker.reply(reply, timeout_s=10)
    with pytest.raises(BusTimeout, match="the driver"):
        worker.reply(reply, timeout_s=0.05)


def test_wake_ends_a_receive_whether_it_comes_before_or_during(make, in_thread):
    driver, _ = make(1)
    begin = time.monotonic()
    driver.wake()
    assert driver.receive(timeout_s=60) is None
    waiting = in_thread(lambda: driver.receive(timeout_s=60))
    driver.wake()
    assert waiting() is None
    assert time.monotonic() - begin < 30
    assert driver.receive(timeout_s=0.01) is None  # used up


def test_wake_does_not_hide_a_reply(make, eventually):
    driver, (worker,) = make(1)
    worker.reply(CacheReady(7), timeout_s=10)
    received = []
    eventually(lambda: received.append(driver.try_receive()) or received[-1])
    worker.reply(CacheReady(7), timeout_s=10)
    driver.wake()
    results = [driver.receive(timeout_s=10), driver.receive(timeout_s=10)]
    assert sorted(results, key=lambda one: one is None) == [(0, CacheReady(7)), None]


def test_wake_makes_a_waiting_publish_check(make, in_thread):
    driver, _ = make(1, is_small=True)
    driver.publish(BIG_STEP, timeout_s=10)
    dead = []

    def check():
        if dead:
            raise InterruptedError

    publishing = in_thread(lambda: driver.publish(BIG_STEP, timeout_s=60, check=check))
    dead.append("rank 0")
    driver.wake()
    with pytest.raises(InterruptedError):
        publishing()


def test_closing_ends_every_wait_and_delivers_what_was_published(make, in_thread):
    driver, (first, second) = make(2)
    waits = [in_thread(lambda: first.receive(timeout_s=60)), in_thread(lambda: driver.receive(timeout_s=60))]
    driver.publish(InitCache(7, 5), timeout_s=10)
    assert waits[0]() == InitCache(7, 5)
    waits[0] = in_thread(lambda: first.receive(timeout_s=60))
    driver.close()
    driver.close()
    for wait in waits:
        with pytest.raises(BusClosed):
            wait()
    assert second.receive(timeout_s=60) == InitCache(7, 5)
    with pytest.raises(BusClosed):
        second.receive(timeout_s=60)
    assert second.closed
    with pytest.raises(BusClosed):
        second.reply(CacheReady(7), timeout_s=60)
    with pytest.raises(BusClosed):
        driver.publish(InitCache(7, 5), timeout_s=60)
    driver.wake()  # a watcher thread may still do that


def test_all_that_was_published_before_the_close_is_delivered(make):
    driver, (worker,) = make(1)
    steps = [StepInput(7, step_id, prefills=bytes(200_000)) for step_id in range(60)]
    for step in steps:
        driver.publish(step, timeout_s=10)
    driver.close()
    assert [worker.receive(timeout_s=10) for _ in steps] == steps
    with pytest.raises(BusClosed):
        worker.receive(timeout_s=10)


def test_closing_ends_a_publish_and_a_reply_that_wait_for_room(make, in_thread):
    driver, (worker,) = make(1, is_small=True)
    driver.publish(BIG_STEP, timeout_s=10)
    worker.reply(StepOutput(7, 1, bytes(3000)), timeout_s=10)
    publishing = in_thread(lambda: driver.publish(BIG_STEP, timeout_s=60))
    replying = in_thread(lambda: worker.reply(StepOutput(7, 1, bytes(3000)), timeout_s=60))
    driver.close()
    for wait in (publishing, replying):
        with pytest.raises(BusClosed):
            wait()


def test_a_worker_that_closes_does_not_close_the_others(make):
    driver, (first, second) = make(2)
    first.close()
    with pytest.raises(BusClosed):
        first.receive(timeout_s=60)
    driver.publish(InitCache(7, 5), timeout_s=10)
    assert second.receive(timeout_s=10) == InitCache(7, 5)


def test_dropping_the_driver_channel_closes_it(transport):
    driver = transport.create(1)
    worker = transport.attach(driver, 0)
    del driver
    gc.collect()
    with pytest.raises(BusClosed):
        worker.receive(timeout_s=60)
    worker.close()


def test_the_driver_sees_what_a_rank_is_doing_and_its_last_error(make, eventually):
    driver, (first, second) = make(2)
    first.set_status(Phase.DECODE, 17)
    second.set_status(Phase.FAILED, -1)
    second.set_error("out of memory " * 100)
    assert (driver.status(0).phase, driver.status(0).step_id, driver.status(0).error) == (Phase.DECODE, 17, "")
    assert driver.status(1).phase == Phase.FAILED
    eventually(lambda: driver.status(1).error)
    assert "out of memory out of" in driver.status(1).where()
    assert len(driver.status(1).error) <= 232
    assert abs(time.monotonic_ns() - driver.status(0).heartbeat_ns) < 60e9


def test_both_ends_know_epoch_and_size(make):
    driver, workers = make(2)
    assert (driver.epoch, driver.num_workers) == (7, 2)
    assert [(w.epoch, w.num_workers, w.rank) for w in workers] == [(7, 2, 0), (7, 2, 1)]


def test_a_long_stream_reaches_eight_processes_whole_and_in_order(transport, stack, start):
    num_messages, num_workers = 20_000, 8
    driver = stack.enter_context(transport.create(num_workers))
    where, pass_fds = transport.reader(driver)
    readers = [
        start(
            str(READER), transport.name, where or driver.endpoints[rank], str(rank), str(num_messages),
            pass_fds=pass_fds,
        )
        for rank in range(num_workers)
    ]  # fmt: skip

    def check():
        assert all(process.poll() is None for process in readers), "a reader ended early"

    choose = random.Random(42)
    noise = choose.randbytes(MIB)
    encode = msgspec.msgpack.Encoder().encode
    crc32 = 0
    for step_id in range(num_messages):
        length = choose.randrange(300_000) if choose.random() < 0.005 else choose.randrange(600)
        begin = choose.randrange(1000)
        step = StepInput(7, step_id, prefills=noise[begin : begin + length])
        driver.publish(step, timeout_s=60, check=check)
        crc32 = zlib.crc32(encode(step), crc32)
    replies = [driver.receive(timeout_s=60) for _ in readers]
    assert sorted(Echo.unpack(reply.token_ids) for _, reply in replies) == [
        (rank, crc32) for rank in range(num_workers)
    ]
    assert {reply.step_id for _, reply in replies} == {-1}  # nothing came after the last
    assert [process.wait(10) for process in readers] == [0] * num_workers
