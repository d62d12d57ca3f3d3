"""Typed channels: every message arrives whole at the ranks it is for, and every wait can be ended."""

import gc
import os
import threading
import time

import msgspec
import pytest

from zmqexec import _bus
from zmqexec.bus.channel import FROM_DRIVER, FROM_WORKER, DriverChannel, WorkerChannel, rehearsal
from zmqexec.errors import BusClosed, BusTimeout, ProtocolError
from zmqexec.protocol import CacheReady, ErrorInfo, Failure, InitCache, StepInput, StepOutput, ToDriver, ToWorker


def test_every_worker_gets_every_message(make_bus):
    driver, workers = make_bus(3)
    messages = [InitCache(7, 100), StepInput(7, 1, decodes=b"\x07"), InitCache(7, 5)]
    for message in messages:
        driver.publish(message, timeout_s=1)
    for worker in workers:
        assert [worker.receive(timeout_s=1) for _ in messages] == messages
        assert worker.try_receive() is None


def test_replies_come_with_their_rank_and_ranks_take_turns(make_bus):
    driver, workers = make_bus(3)
    for step_id in range(2):
        for worker in workers:
            worker.reply(StepOutput(7, step_id, b""), timeout_s=1)
    replies = [driver.receive(timeout_s=1) for _ in range(6)]
    assert [rank for rank, _ in replies] == [0, 1, 2, 0, 1, 2]
    assert [reply.step_id for _, reply in replies] == [0, 0, 0, 1, 1, 1]
    assert driver.try_receive() is None


def test_what_each_end_rehearses_are_messages_that_it_gets_and_sends():
    for received, sent, kinds in ((FROM_DRIVER, FROM_WORKER, ToWorker), (FROM_WORKER, FROM_DRIVER, ToDriver)):
        rehearsal(msgspec.msgpack.Decoder(kinds).decode, received, sent)()


def test_an_error_crosses_whole(make_bus):
    driver, (worker,) = make_bus(1)
    failure = Failure(7, -1, "LOADING", ErrorInfo("WorkerFailed", "Traceback ...\n" * 1000))
    worker.reply(failure, timeout_s=1)
    assert driver.receive(timeout_s=1) == (0, failure)


def test_a_driver_that_waits_for_room_takes_the_large_reply_that_its_worker_cannot_deliver(make_bus, in_thread):
    driver, (worker,) = make_bus(1, ring_bytes=4096, reply_ring_bytes=4096)
    step = StepInput(7, 1, prefills=bytes(3000))
    reply = StepOutput(7, 0, bytes(10_000))
    waits = threading.Event()
    received = []

    def check():
        waits.set()
        received.append(driver.try_receive())

    def work():
        assert waits.wait(10)
        worker.reply(reply, timeout_s=5)
        return [worker.receive(timeout_s=5) for _ in range(2)]

    working = in_thread(work)
    driver.publish(step, timeout_s=5)
    driver.publish(step, timeout_s=5, check=check)
    assert working() == [step, step]
    replies = [one for one in received if one is not None] or [driver.receive(timeout_s=5)]
    assert replies == [(0, reply)]


def test_messages_larger_than_their_ring_arrive_in_order(make_bus, in_thread):
    driver, (worker, other) = make_bus(2, ring_bytes=4096, reply_ring_bytes=4096)
    steps = [StepInput(7, step_id, prefills=bytes(10_000 if step_id % 3 == 0 else 10)) for step_id in range(30)]

    def echo():
        for _ in steps:
            step = worker.receive(timeout_s=10)
            worker.reply(StepOutput(7, step.step_id, step.prefills), timeout_s=10)

    echoing = in_thread(echo)
    receiving = in_thread(lambda: [driver.receive(timeout_s=10) for _ in steps])
    reading = in_thread(lambda: [other.receive(timeout_s=10) for _ in steps])
    for step in steps:
        driver.publish(step, timeout_s=10)
    echoing()
    assert reading() == steps
    assert receiving() == [(0, StepOutput(7, step.step_id, step.prefills)) for step in steps]


def test_receiving_gives_up_at_the_deadline(make_bus):
    driver, (worker,) = make_bus(1)
    assert driver.receive(timeout_s=0.01) is None
    assert worker.receive(timeout_s=0.01) is None


def test_publish_names_the_ranks_that_hold_it_back(make_bus):
    driver, (reads, _) = make_bus(2, ring_bytes=4096)
    step = StepInput(7, 1, prefills=bytes(3000))
    driver.publish(step, timeout_s=1)
    assert reads.receive(timeout_s=1) == step
    with pytest.raises(BusTimeout, match=r"rank 1$"):
        driver.publish(step, timeout_s=0.01)


def test_a_reply_that_the_driver_does_not_read_times_out(make_bus):
    _, (worker,) = make_bus(1, reply_ring_bytes=4096)
    reply = StepOutput(7, 1, bytes(3000))
    worker.reply(reply, timeout_s=1)
    with pytest.raises(BusTimeout, match="the driver"):
        worker.reply(reply, timeout_s=0.01)


def test_wake_ends_a_receive_whether_it_comes_before_or_during(make_bus, in_thread):
    driver, _ = make_bus(1)
    begin = time.monotonic()
    driver.wake()
    assert driver.receive(timeout_s=60) is None

    waiting = in_thread(lambda: driver.receive(timeout_s=60))
    driver.wake()
    assert waiting() is None
    assert time.monotonic() - begin < 30
    assert driver.receive(timeout_s=0.01) is None  # used up


def test_wake_does_not_hide_a_reply(make_bus):
    driver, (worker,) = make_bus(1)
    worker.reply(CacheReady(7), timeout_s=1)
    driver.wake()
    assert driver.receive(timeout_s=1) == (0, CacheReady(7))
    assert driver.receive(timeout_s=60) is None


def test_wake_makes_a_waiting_publish_check(make_bus, in_thread):
    driver, _ = make_bus(1, ring_bytes=4096)
    step = StepInput(7, 1, prefills=bytes(3000))
    driver.publish(step, timeout_s=1)
    dead = []

    def check():
        if dead:
            raise InterruptedError

    publishing = in_thread(lambda: driver.publish(step, timeout_s=60, check=check))
    dead.append("rank 0")
    driver.wake()
    with pytest.raises(InterruptedError):
        publishing()


def test_closing_ends_every_wait_and_delivers_what_was_published(make_bus, in_thread):
    driver, (first, second) = make_bus(2)
    waits = [in_thread(lambda: first.receive(timeout_s=60)), in_thread(lambda: driver.receive(timeout_s=60))]
    driver.publish(InitCache(7, 5), timeout_s=1)
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
    with pytest.raises(BusClosed):
        second.reply(CacheReady(7), timeout_s=60)
    with pytest.raises(BusClosed):
        driver.publish(InitCache(7, 5), timeout_s=60)
    driver.wake()  # a watcher thread may still do that


def test_a_worker_that_closes_does_not_close_the_others(make_bus):
    driver, (first, second) = make_bus(2)
    first.close()
    with pytest.raises(BusClosed):
        first.receive(timeout_s=60)
    driver.publish(InitCache(7, 5), timeout_s=1)
    assert second.receive(timeout_s=1) == InitCache(7, 5)


def test_dropping_the_driver_channel_closes_it():
    driver = DriverChannel.create(1, epoch=7)
    worker = WorkerChannel.attach(driver.fd, 0)
    fd = driver.fd
    del driver
    gc.collect()
    with pytest.raises(BusClosed):
        worker.receive(timeout_s=60)
    with pytest.raises(OSError):
        os.fstat(fd)
    worker.close()


@pytest.mark.parametrize(
    "garbage", [b"", b"\xc1", b"\x91\x63", b"\x94\x03\x07", b"\x91" * 100_000, b"\x92\x04\x07\x00", b"\xa2\xff\xfe"]
)
def test_bytes_that_are_no_message_are_a_protocol_error(stack, garbage):
    segment = _bus.Segment.create(
        num_workers=1, epoch=7, num_slots=4096, slot_bytes=64, reply_num_slots=4096, reply_slot_bytes=64
    )
    driver = stack.enter_context(DriverChannel(segment))
    peer = _bus.Segment.attach(driver.fd, 0)
    worker = stack.enter_context(WorkerChannel(peer))
    segment.write(garbage, 0, 0.0)
    peer.write(garbage, 0, 0.0)
    with pytest.raises(ProtocolError, match="no message of this version"):
        worker.receive(timeout_s=1)
    with pytest.raises(ProtocolError, match="rank 0"):
        driver.receive(timeout_s=1)


def test_both_ends_know_epoch_and_size(make_bus):
    driver, workers = make_bus(2)
    assert (driver.epoch, driver.num_workers) == (7, 2)
    assert [(w.epoch, w.num_workers, w.rank) for w in workers] == [(7, 2, 0), (7, 2, 1)]
