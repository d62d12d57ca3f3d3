"""Payloads larger than the ring: in order with the rest, bounded in time, private to this user, nothing left behind."""

import gc
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.procs import own_descriptors, own_threads, wait_for_threads_to_end
from zmqexec.bus import ring, zmq_path
from zmqexec.bus.link import Inbox, Outbox
from zmqexec.errors import BusClosed, BusError, BusTimeout, ProtocolError


class Ends:
    """A broadcast link within this process."""

    def __init__(self, num_readers: int) -> None:
        writer, readers = ring.make_ring(16, num_readers)
        self.segments = [writer.segment, *(reader.segment for reader in readers)]
        self.outbox = Outbox(writer.segment)
        self.inboxes = [Inbox(reader.segment, bytes) for reader in readers]
        self.larger = bytes(writer.max_payload_bytes + 1)

    def close(self) -> None:
        for segment in self.segments:
            segment.close()
        for end in (self.outbox, *self.inboxes):
            end.close()


@pytest.fixture
def make_ends(stack):
    def make(num_readers: int = 1) -> Ends:
        ends = Ends(num_readers)
        stack.callback(ends.close)
        return ends

    return make


@pytest.mark.parametrize("num_readers", [1, 3])
def test_large_and_small_payloads_arrive_in_order(make_ends, in_thread, num_readers):
    ends = make_ends(num_readers)
    payloads = [b"%d " % i * (1 if i % 3 else 2000) for i in range(60)]
    joins = [in_thread(lambda inbox=inbox: [inbox.receive(10) for _ in payloads]) for inbox in ends.inboxes]
    for payload in payloads:
        ends.outbox.send(payload, timeout_s=10)
    assert [join() for join in joins] == [payloads] * num_readers


def test_nothing_of_zeromq_exists_before_it_is_needed(make_ends):
    before = own_threads()
    ends = make_ends()
    ends.outbox.send(b"small", timeout_s=1)
    assert ends.inboxes[0].receive(0.0) == b"small"
    assert own_threads() <= before


def test_closing_leaves_no_thread_and_no_file_descriptor(in_thread):
    def use_and_close():
        ends = Ends(2)
        joins = [in_thread(lambda inbox=inbox: inbox.receive(10)) for inbox in ends.inboxes]
        ends.outbox.send(ends.larger, timeout_s=10)
        assert [join() for join in joins] == [ends.larger] * 2
        ends.close()
        ends.close()

    use_and_close()  # whatever is opened once per process is open now
    gc.collect()
    before = own_descriptors(), own_threads()
    use_and_close()
    assert own_descriptors() <= before[0]
    wait_for_threads_to_end(before[1])


def test_a_payload_that_nobody_fetches_times_out_and_breaks_the_link(make_ends):
    ends = make_ends(2)
    with pytest.raises(BusTimeout, match=r"not fetched within .* by rank 0, 1$"):
        ends.outbox.send(ends.larger, timeout_s=0.05)
    with pytest.raises(BusError, match="cannot go on"):
        ends.outbox.send(b"small", timeout_s=1)


def test_check_ends_the_wait_for_a_reader(make_ends):
    ends = make_ends()

    def check():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        ends.outbox.send(ends.larger, timeout_s=60, check=check)


def test_closing_ends_a_send_and_a_receive(make_ends, in_thread, eventually):
    ends = make_ends(2)
    sending = in_thread(lambda: ends.outbox.send(ends.larger, timeout_s=60))
    receiving = in_thread(lambda: [ends.inboxes[0].receive(10) for _ in range(2)])
    eventually(lambda: ends.segments[0].holding_back(len(ends.larger) - 1) == [1])  # reader 0 has the announcement
    ends.close()
    for join in (sending, receiving):
        with pytest.raises(BusClosed):
            join()


def test_a_reader_learns_that_an_announced_payload_will_not_come(make_ends):
    ends = make_ends()
    with pytest.raises(BusTimeout):
        ends.outbox.send(ends.larger, timeout_s=0.01)
    ends.segments[0].close()
    ends.outbox.close()
    with pytest.raises(BusClosed, match="announced"):
        ends.inboxes[0].receive(10)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\xc1",
        b"\x93\x01",
        b"\x81" * 100_000,
        zmq_path.encode(zmq_path.Announcement(1, 10, "ipc://@zmqexec-0")),  # not the next
        zmq_path.encode(zmq_path.Announcement(0, 10, "tcp://192.0.2.1:1")),
    ],
)
def test_an_announcement_that_is_none_is_refused(record):
    receiver = zmq_path.ZmqReceiver(0)
    with pytest.raises(ProtocolError, match="announcement"):
        receiver.expect(record)
    assert receiver.pending is None


def test_a_record_of_unknown_kind_is_refused(make_ends):
    ends = make_ends()
    assert ends.segments[0].write(b"a", 77, 0.0)
    with pytest.raises(ProtocolError, match="kind 77"):
        ends.inboxes[0].receive(0.0)


@pytest.mark.parametrize(("number", "num_bytes"), [(1, 5), (0, 6)])
def test_a_payload_that_was_not_announced_is_refused(stack, in_thread, eventually, number, num_bytes):
    sender, receiver = zmq_path.ZmqSender(1), zmq_path.ZmqReceiver(0)
    stack.callback(sender.close)
    stack.callback(receiver.close)
    endpoint = zmq_path.decode_announcement(sender.announce(5)).endpoint
    receiver.expect(zmq_path.encode(zmq_path.Announcement(0, num_bytes, endpoint)))
    sender._number = number
    sending = in_thread(lambda: sender.send(b"hello", timeout_s=5))

    def refused():
        try:
            return receiver.receive(time.monotonic() + 1)
        except ProtocolError:
            return True

    eventually(refused)
    sending()


def greeting(endpoint: str) -> bytes:
    """What a listener sends to whoever connects: a ZMTP greeting, or nothing if it does not let them in."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(10)
        try:
            peer.connect("\0" + endpoint.removeprefix("ipc://@"))
            return peer.recv(1)
        except (ConnectionError, TimeoutError):
            return b""


@pytest.mark.skipif(os.getuid() != 0, reason="takes another user id, which root alone can have")
def test_only_this_users_processes_may_connect(stack):
    sender = zmq_path.ZmqSender(1)
    stack.callback(sender.close)
    endpoint = zmq_path.decode_announcement(sender.announce(1)).endpoint + "-0"
    assert greeting(endpoint) == b"\xff"

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            code = 0 if greeting(endpoint) == b"" else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_endpoints_are_abstract_and_leave_no_file(stack):
    sender = zmq_path.ZmqSender(2)
    stack.callback(sender.close)
    name = zmq_path.decode_announcement(sender.announce(1)).endpoint.removeprefix("ipc://@")
    bound = [line for line in Path("/proc/net/unix").read_text().splitlines() if name in line]
    assert len(bound) == 2 and all(f"@{name}-" in line for line in bound)
    sender.close()
    assert name not in Path("/proc/net/unix").read_text()


def test_a_fork_does_not_wait_for_its_parents_senders():
    sender = zmq_path.ZmqSender(1)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with sender._lock:
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    pid = os.fork()
    if pid == 0:
        sender.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    leave.set()
    thread.join(10)
    sender.close()
