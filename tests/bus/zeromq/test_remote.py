"""Workers on another host: order holds, a vanished host is named in time, and strangers neither read nor disturb."""

import contextlib
import json
import os
import random
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
import zmq

import zmqexec
from tests.bus.zeromq import hosts
from tests.procs import is_stopped, own_descriptors, own_threads, wait_for_threads_to_end
from zmqexec.bus.echo_worker import Echo
from zmqexec.bus.status import Phase
from zmqexec.bus.zeromq import frames
from zmqexec.bus.zeromq.driver_channel import ZmqDriverChannel
from zmqexec.bus.zeromq.keys import new_keys, read_keys, write_keys
from zmqexec.bus.zeromq.worker_channel import ZmqWorkerChannel
from zmqexec.errors import BusClosed, BusError, BusTimeout, ConfigError
from zmqexec.protocol import CacheReady, InitCache, StepInput, StepOutput

LOST_AFTER_S = 1.0
NO_NAMESPACES = hosts.why_no_namespaces()


@pytest.fixture(params=["loopback", "namespaces"])
def two_hosts(request):
    if request.param == "loopback":
        yield hosts.Loopback()
        return
    if NO_NAMESPACES:
        pytest.skip(NO_NAMESPACES)
    with contextlib.closing(hosts.Namespaces()) as namespaces:
        yield namespaces


@pytest.fixture
def make_driver(two_hosts, stack):
    """A driver that listens on its host, and its workers' keys."""

    def make(num_workers=1, **settings):
        driver_keys, worker_keys = new_keys(num_workers)
        with two_hosts.at_driver():
            driver = ZmqDriverChannel.create(
                num_workers,
                epoch=7,
                listen=f"tcp://{two_hosts.driver_side}:0",
                keys=driver_keys,
                **{"lost_after_s": LOST_AFTER_S, **settings},
            )
        return stack.enter_context(driver), worker_keys

    return make


@pytest.fixture
def connect(two_hosts, stack):
    """Join from the workers' host, in this process."""

    def join(driver, keys, **settings):
        with two_hosts.at_worker():
            channel = ZmqWorkerChannel.connect(
                driver.endpoints[keys.rank], keys.rank, keys=keys,
                **{"timeout_s": 10, "lost_after_s": LOST_AFTER_S, **settings},
            )  # fmt: skip
        return stack.enter_context(channel)

    return join


@pytest.fixture
def start_echo(two_hosts, start, tmp_path):
    """Echo workers in processes of their own on the workers' host, which have joined."""

    def start_all(driver, worker_keys):
        processes = []
        for keys in worker_keys:
            path = tmp_path / f"keys-{keys.rank}"
            write_keys(path, keys)
            program = ["-m", "zmqexec.bus.echo_worker", "--connect", driver.endpoints[keys.rank], "--keys", str(path)]
            processes.append(start(*program, "--lost-after", str(LOST_AFTER_S), prefix=two_hosts.prefix))
        for process in processes:
            assert "has joined" in process.stdout.readline()
        return processes

    return start_all


@pytest.fixture
def start(stack):
    """Like the fixture of the same name for one host, with a command before the interpreter."""

    def start_python(*args, prefix=(), **options):
        env = {**os.environ, "PYTHONPATH": str(Path(zmqexec.__file__).parent.parent)}
        process = subprocess.Popen(
            [*prefix, sys.executable, *args], env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            **options,
        )  # fmt: skip
        stack.callback(process.wait, 10)
        stack.callback(process.kill)
        return process

    return start_python


class Stream:
    """Steps to echo workers and their answers, checked one by one."""

    def __init__(self, driver, num_workers=1):
        self._driver = driver
        self._num_workers = num_workers
        self._choose = random.Random(42)
        self._noise = self._choose.randbytes(1 << 20)
        self.step_id = 0

    def exchange(self, num_steps, timeout_s=10.0):
        for _ in range(num_steps):
            self.step_id += 1
            length = self._choose.randrange(300_000) if self._choose.random() < 0.01 else self._choose.randrange(600)
            step = StepInput(7, self.step_id, prefills=self._noise[:length])
            self._driver.publish(step, timeout_s=timeout_s)
            replies = [self._driver.receive(timeout_s=timeout_s) for _ in range(self._num_workers)]
            assert sorted((rank, reply.step_id, Echo.unpack(reply.token_ids)) for rank, reply in replies) == [
                (rank, self.step_id, Echo.of(rank, step)) for rank in range(self._num_workers)
            ]


# ── order ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_echo_workers_on_another_host_answer_every_message_in_order(make_driver, start_echo):
    driver, keys = make_driver(2)
    processes = start_echo(driver, keys)
    Stream(driver, 2).exchange(1000)
    driver.close()
    assert [process.wait(10) for process in processes] == [0, 0]
    assert "answered 1000 messages: the driver closed the bus" in processes[0].stdout.read()


def test_a_stream_with_many_messages_under_way_arrives_in_order(make_driver, start_echo, in_thread):
    driver, keys = make_driver(1)
    start_echo(driver, keys)
    steps = [StepInput(7, step_id, prefills=bytes(step_id % 3000)) for step_id in range(5000)]
    receiving = in_thread(lambda: [driver.receive(timeout_s=10)[1] for _ in steps])
    for step in steps:
        driver.publish(step, timeout_s=10)
    replies = receiving()
    assert [(reply.step_id, Echo.unpack(reply.token_ids)) for reply in replies] == [
        (step.step_id, Echo.of(0, step)) for step in steps
    ]


def test_a_large_message_crosses_whole(make_driver, connect):
    driver, keys = make_driver(1)
    worker = connect(driver, keys[0])
    step = StepInput(7, 1, prefills=random.Random(1).randbytes(64 << 20))
    driver.publish(step, timeout_s=10)
    assert worker.receive(timeout_s=60) == step


def test_the_status_of_a_remote_rank_is_in_the_drivers_time(make_driver, connect):
    driver, keys = make_driver(1)
    worker = connect(driver, keys[0])
    worker.set_status(Phase.DECODE, 17)
    status = driver.status(0)
    assert (status.pid, status.phase, status.step_id) == (os.getpid(), Phase.DECODE, 17)
    assert 0 <= time.monotonic_ns() - status.heartbeat_ns < 30e9


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def named_within(attempt, rank, begin, deadline_s):
    """`attempt` until the driver says that `rank` is lost; how long it took."""
    with pytest.raises(BusError, match=f"rank {rank} is lost"):
        while time.monotonic() < begin + 5 * deadline_s + 5:
            attempt()
    took_s = time.monotonic() - begin
    print(f"named after {took_s:.2f} s")
    assert took_s < 5 * deadline_s
    return took_s


def test_a_reader_killed_in_mid_stream_is_named(make_driver, start_echo):
    driver, keys = make_driver(2)
    _, victim = start_echo(driver, keys)
    stream = Stream(driver, 2)
    stream.exchange(50)
    victim.kill()
    named_within(lambda: stream.exchange(1), 1, time.monotonic(), LOST_AFTER_S)
    assert list(driver.lost) == [1]
    named_within(lambda: driver.receive(timeout_s=10), 1, time.monotonic(), LOST_AFTER_S)  # after rank 0's last reply


def test_what_a_lost_rank_had_sent_is_received_first(make_driver, connect, eventually):
    driver, keys = make_driver(1)
    worker = connect(driver, keys[0])
    replies = [StepOutput(7, step_id, bytes(1000)) for step_id in range(20)]
    for reply in replies:
        worker.reply(reply, timeout_s=10)
    received = [driver.receive(timeout_s=10)]
    eventually(lambda: len(driver._end.inboxes) and driver._end.inboxes[0].socket.getsockopt(zmq.EVENTS) & zmq.POLLIN)
    worker._end.service._socket.disconnect(driver.endpoints[0])  # as when the connection breaks
    eventually(lambda: driver.lost)
    received += [driver.receive(timeout_s=10) for _ in replies[1:]]
    assert [reply for _, reply in received] == replies
    with pytest.raises(BusError, match="rank 0 is lost"):
        driver.receive(timeout_s=10)


def test_a_stopped_host_is_named_within_the_deadline_and_with_its_last_status(make_driver, start_echo, eventually):
    driver, keys = make_driver(1)
    (process,) = start_echo(driver, keys)
    Stream(driver).exchange(5)
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: is_stopped(process.pid))
    named_within(lambda: driver.receive(timeout_s=10), 0, time.monotonic(), LOST_AFTER_S)
    assert "not heard of for 1 s" in driver.status(0).where()


@pytest.mark.parametrize("two_hosts", ["namespaces"], indirect=True)
def test_a_cut_cable_is_noticed_at_both_ends_within_the_deadline(two_hosts, make_driver, start_echo):
    driver, keys = make_driver(2)
    processes = start_echo(driver, keys)
    Stream(driver, 2).exchange(20)
    begin = time.monotonic()
    two_hosts.cut()
    with pytest.raises(BusError, match=r"rank \d is lost: .* not heard of for 1 s"):
        while True:
            driver.receive(timeout_s=10 * LOST_AFTER_S)
    took_s = time.monotonic() - begin
    print(f"named after {took_s:.2f} s")
    assert took_s < 5 * LOST_AFTER_S
    outputs = [process.communicate(timeout=10 * LOST_AFTER_S)[0] for process in processes]
    assert all("not heard of for 1 s" in output for output in outputs)
    begin = time.monotonic()
    driver.close()
    assert time.monotonic() - begin < 5


def test_a_reader_that_is_slow_for_longer_than_the_deadline_is_not_lost(make_driver, connect):
    driver, keys = make_driver(1, window_bytes=1 << 30, lost_after_s=0.3)
    worker = connect(driver, keys[0], lost_after_s=0.3)
    steps = [StepInput(7, step_id, prefills=bytes(8 << 20)) for step_id in range(20)]
    for step in steps:
        driver.publish(step, timeout_s=10)
    assert driver.receive(timeout_s=1.0) is None
    assert not driver.lost
    assert [worker.receive(timeout_s=10) for _ in steps] == steps


def test_a_vanished_driver_ends_the_workers_waits(two_hosts, start, stack, tmp_path):
    driver_keys, (worker_keys,) = new_keys(1)
    path = tmp_path / "driver"
    path.write_bytes(msgspec.json.encode(driver_keys))
    program = f"""if True:
        import pathlib, time
        import msgspec
        from zmqexec.bus.zeromq.driver_channel import ZmqDriverChannel
        from zmqexec.bus.zeromq.keys import DriverKeys
        keys = msgspec.json.decode(pathlib.Path({str(path)!r}).read_bytes(), type=DriverKeys)
        driver = ZmqDriverChannel.create(1, epoch=7, listen="tcp://{two_hosts.worker_side}:0", keys=keys)
        print(driver.endpoints[0], flush=True)
        time.sleep(60)
    """
    process = start("-c", program, prefix=two_hosts.prefix)
    endpoint = process.stdout.readline().strip()
    with two_hosts.at_driver():
        worker = ZmqWorkerChannel.connect(endpoint, 0, keys=worker_keys, timeout_s=10, lost_after_s=LOST_AFTER_S)
    stack.enter_context(worker)
    process.send_signal(signal.SIGSTOP)  # says nothing more, and its kernel keeps the connection
    with pytest.raises(BusClosed, match="not heard of for 1 s"):
        worker.receive(timeout_s=10 * LOST_AFTER_S)
    with pytest.raises(BusClosed):
        worker.reply(CacheReady(7), timeout_s=10)


# ── strangers ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def undisturbed(stream):
    """Exchanges go on while the block runs, each with the deadline of a healthy bus."""
    stop = threading.Event()
    errors = []

    def run():
        try:
            while not stop.is_set():
                stream.exchange(1, timeout_s=5.0)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    begin = stream.step_id
    thread.start()
    try:
        yield
        reached = stream.step_id
        deadline = time.monotonic() + 10
        while stream.step_id <= reached and not errors:
            assert time.monotonic() < deadline, "the stream stands still"
            time.sleep(0.005)
    finally:
        stop.set()
        thread.join(10)
    assert not errors and not thread.is_alive()
    assert stream.step_id > begin


@contextlib.contextmanager
def stranger(endpoint, public=None, secret=None, driver_public=None):
    """A ZeroMQ peer of our own making."""
    context = zmq.Context()
    peer = context.socket(zmq.PAIR)
    peer.linger = 0
    peer.reconnect_ivl = 3_600_000
    if public is not None:
        peer.curve_publickey, peer.curve_secretkey, peer.curve_serverkey = (
            key.encode() for key in (public, secret, driver_public)
        )
    peer.connect(endpoint)
    for _ in range(5):
        peer.send(b"let me in")
    try:
        yield peer
    finally:
        peer.close(linger=0)
        context.term()


def lanes(driver, rank):
    """All three endpoints of a rank."""
    sockets = [driver._end.outboxes[rank].socket, driver._end.inboxes[rank].socket]
    return [driver.endpoints[rank], *(one.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode() for one in sockets)]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["control", "down", "up"])
@pytest.mark.parametrize("who", ["another key", "another rank's key", "no key", "another driver's key"])
def test_a_wrong_key_is_refused_and_counted_and_disturbs_nobody(
    two_hosts, make_driver, start_echo, eventually, who, kind
):
    driver, keys = make_driver(2)
    start_echo(driver, keys)
    stream = Stream(driver, 2)
    stream.exchange(5)
    assert driver.refused_peers == 0
    endpoint = lanes(driver, 0)[kind]
    other = new_keys(2)[1][0]
    credentials = {
        "another key": (other.public, other.secret, keys[0].driver_public),
        "another rank's key": (keys[1].public, keys[1].secret, keys[1].driver_public),
        "no key": (),
        "another driver's key": (keys[0].public, keys[0].secret, other.driver_public),
    }[who]
    with undisturbed(stream), two_hosts.at_worker(), stranger(endpoint, *credentials) as peer:
        eventually(lambda: driver.refused_peers == 1)
        assert peer.poll(200) == 0, "a stranger reads"
    assert driver.refused_peers == 1
    assert (driver.stale, driver.gaps, driver.lost) == (0, 0, {})


def test_a_second_peer_with_a_ranks_own_key_reads_nothing_and_disturbs_nobody(two_hosts, make_driver, start_echo):
    driver, keys = make_driver(1)
    start_echo(driver, keys)
    stream = Stream(driver)
    stream.exchange(5)
    with undisturbed(stream), two_hosts.at_worker(), contextlib.ExitStack() as opened:
        own = (keys[0].public, keys[0].secret, keys[0].driver_public)
        peers = [opened.enter_context(stranger(endpoint, *own)) for endpoint in lanes(driver, 0)]
        assert [peer.poll(200) for peer in peers] == [0, 0, 0]
    assert (driver.gaps, driver.lost) == (0, {})


def plain(endpoint):
    host, port = endpoint.removeprefix("tcp://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["control", "down", "up"])
@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n" * 10, bytes(100_000), b"\xff" * 10 + b"\x7f" * 1000])
def test_a_peer_that_talks_garbage_is_refused_and_counted_and_disturbs_nobody(
    two_hosts, make_driver, start_echo, eventually, garbage, kind
):
    driver, keys = make_driver(1)
    start_echo(driver, keys)
    stream = Stream(driver)
    stream.exchange(5)
    with undisturbed(stream):
        with two_hosts.at_worker():
            peer = plain(lanes(driver, 0)[kind])
        with peer, contextlib.suppress(ConnectionError):
            peer.sendall(garbage)
        eventually(lambda: driver.refused_peers == 1)
    assert driver.lost == {}


def test_peers_that_connect_and_say_nothing_disturb_nobody(two_hosts, make_driver, start_echo, eventually):
    driver, keys = make_driver(1)
    start_echo(driver, keys)
    stream = Stream(driver)
    stream.exchange(5)
    with undisturbed(stream), contextlib.ExitStack() as opened:
        with two_hosts.at_worker():
            peers = [opened.enter_context(plain(endpoint)) for endpoint in lanes(driver, 0) for _ in range(20)]
        greeting = [peer.recv(4096) for peer in peers]
        assert all(len(data) <= 64 for data in greeting)  # a ZMTP greeting, which says nothing about anybody
        opened.close()
        eventually(lambda: driver.refused_peers == len(peers))
    assert driver.lost == {}


def test_a_worker_joins_while_silent_strangers_hold_connections_open(two_hosts, make_driver, start_echo):
    driver, keys = make_driver(1)
    with contextlib.ExitStack() as opened:
        with two_hosts.at_worker():
            for endpoint in lanes(driver, 0):
                for _ in range(5):
                    opened.enter_context(plain(endpoint))
        start_echo(driver, keys)
        Stream(driver).exchange(50)


class Proxy:
    """Stands between worker and driver, keeps what the worker sent on each connection, and may change a byte."""

    def __init__(self, target):
        self.recorded: list[bytes] = []
        self.flip = threading.Event()
        self._target = target
        self._stop, self._stopped = os.pipe()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        pairs = {}
        records = {}
        while True:
            ready, _, _ = select.select([self._listener, self._stop, *pairs], [], [], 30)
            if not ready or self._stop in ready:
                break
            for one in ready:
                if one is self._listener:
                    client, server = self._listener.accept()[0], socket.create_connection(self._target)
                    pairs.update({client: server, server: client})
                    records[client] = len(self.recorded)
                    self.recorded.append(b"")
                    continue
                if one not in pairs:
                    continue
                data = b""
                with contextlib.suppress(ConnectionError):
                    data = one.recv(65536)
                if one in records:
                    self.recorded[records[one]] += data
                if self.flip.is_set() and data:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                if data:
                    pairs[one].sendall(data)
                else:
                    other = pairs.pop(one)
                    pairs.pop(other)
                    one.close()
                    other.close()
        for one in pairs:
            one.close()
        self._listener.close()

    def close(self):
        os.close(self._stopped)
        self._thread.join(10)
        os.close(self._stop)


@pytest.fixture
def proxies(monkeypatch, stack, make_driver, two_hosts):
    """A driver, and proxies for the three endpoints of rank 0, through which its worker will connect."""
    driver, keys = make_driver(1)
    ports = [int(endpoint.rpartition(":")[2]) for endpoint in lanes(driver, 0)]
    proxies = [stack.enter_context(contextlib.closing(Proxy((two_hosts.driver_side, port)))) for port in ports]
    replaced = {f":{port}": f":{proxy.port}" for port, proxy in zip(ports, proxies, strict=True)}
    monkeypatch.setattr(
        "zmqexec.bus.zeromq.worker_end.lane_endpoint",
        lambda control, lane: control.rpartition(":")[0] + replaced[lane],
    )
    return driver, keys[0], proxies


@pytest.mark.parametrize("two_hosts", ["loopback"], indirect=True)
def test_a_recorded_connection_cannot_be_replayed(proxies, stack, eventually):
    driver, keys, between = proxies
    worker = ZmqWorkerChannel.connect(f"tcp://127.0.0.1:{between[0].port}", 0, keys=keys, timeout_s=10)
    stack.enter_context(worker)
    for step_id in range(10):
        worker.reply(StepOutput(7, step_id, b"secret" * 10), timeout_s=10)
        assert driver.receive(timeout_s=10) == (0, StepOutput(7, step_id, b"secret" * 10))
    recorded = between[2].recorded[0]
    assert len(recorded) > 600 and b"secret" not in recorded
    with plain(lanes(driver, 0)[2]) as again:
        with contextlib.suppress(ConnectionError):
            again.sendall(recorded)
        eventually(lambda: driver.refused_peers == 1)
    assert driver.receive(timeout_s=0.1) is None
    worker.reply(CacheReady(7), timeout_s=10)
    assert driver.receive(timeout_s=10) == (0, CacheReady(7))
    assert (driver.gaps, driver.stale) == (0, 0)


@pytest.mark.parametrize("two_hosts", ["loopback"], indirect=True)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["control", "down", "up"])
def test_a_changed_byte_ends_the_connection_and_the_rank_is_named(proxies, stack, kind):
    driver, keys, between = proxies
    worker = ZmqWorkerChannel.connect(f"tcp://127.0.0.1:{between[0].port}", 0, keys=keys, timeout_s=10)
    stack.enter_context(worker)
    driver.publish(InitCache(7, 1), timeout_s=10)
    assert worker.receive(timeout_s=10) == InitCache(7, 1)
    worker.reply(CacheReady(7), timeout_s=10)
    assert driver.receive(timeout_s=10) == (0, CacheReady(7))
    between[kind].flip.set()
    if kind == 0:
        worker.set_error("anything")
    elif kind == 1:
        driver.publish(InitCache(7, 1), timeout_s=10)
    else:
        worker.reply(CacheReady(7), timeout_s=10)
    named_within(lambda: driver.receive(timeout_s=10), 0, time.monotonic(), LOST_AFTER_S)


def test_a_worker_of_an_earlier_epoch_is_not_taken_for_one_of_this(two_hosts, make_driver, connect, eventually):
    old, keys = make_driver(1)
    worker = connect(old, keys[0])
    with two_hosts.at_driver():
        new = ZmqDriverChannel.create(
            1, epoch=8, listen=f"tcp://{two_hosts.driver_side}:0", keys=old._end._keys, lost_after_s=LOST_AFTER_S
        )
    with new:
        # As if its messages, still under way, came out at the new driver's end.
        with two_hosts.at_worker():
            own = (keys[0].public, keys[0].secret, keys[0].driver_public)
            context = zmq.Context()
            peer = context.socket(zmq.PAIR)
            peer.curve_publickey, peer.curve_secretkey, peer.curve_serverkey = (key.encode() for key in own)
            peer.connect(lanes(new, 0)[2])
        for sequence in range(3):
            peer.send(frames.make(frames.DATA, 7, sequence, b"\x92\x04\x07"))
        eventually(lambda: new.try_receive() is None and new.stale == 3)
        peer.close(linger=0)
        context.term()
        up = new._end.inboxes[0].socket
        eventually(lambda: not up.getsockopt(zmq.EVENTS) & zmq.POLLOUT)  # the connection is gone
        successor = connect(new, keys[0])
        successor.reply(CacheReady(8), timeout_s=10)
        assert new.receive(timeout_s=10) == (0, CacheReady(8))
    assert not worker.closed


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tcp_without_keys_is_refused_at_both_ends():
    driver_keys, (worker_keys,) = new_keys(1)
    with pytest.raises(ConfigError, match="needs keys"):
        ZmqDriverChannel.create(1, epoch=7, listen="tcp://127.0.0.1:0")
    with pytest.raises(ConfigError, match="needs keys"):
        ZmqWorkerChannel.connect("tcp://127.0.0.1:1", 0)
    with pytest.raises(ConfigError, match="keys are for tcp"):
        ZmqDriverChannel.create(1, epoch=7, keys=driver_keys)
    with pytest.raises(ConfigError, match="2 workers need as many different keys"):
        ZmqDriverChannel.create(2, epoch=7, listen="tcp://127.0.0.1:0", keys=driver_keys)
    with pytest.raises(ConfigError, match="keys of rank 0, not of rank 1"):
        ZmqWorkerChannel.connect("tcp://127.0.0.1:1", 1, keys=worker_keys)


@pytest.mark.parametrize("listen", ["tcp://", "tcp://127.0.0.1", "udp://1.2.3.4:5", "tcp://h:99999", "tcp://h:65534"])
def test_an_address_that_is_none_is_refused(listen):
    with pytest.raises(ConfigError, match=r"tcp://HOST:PORT|65535"):
        ZmqDriverChannel.create(1, epoch=7, listen=listen, keys=new_keys(1)[0])


def test_a_port_in_use_is_refused_by_name_and_nothing_is_left():
    before = own_threads()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be bound"):
            ZmqDriverChannel.create(1, epoch=7, listen=f"tcp://127.0.0.1:{port}", keys=new_keys(1)[0])
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be bound"):
            ZmqDriverChannel.create(1, epoch=7, listen=f"tcp://127.0.0.1:{port - 2}", keys=new_keys(1)[0])
    wait_for_threads_to_end(before)


def test_keys_come_from_a_private_file_or_a_descriptor_and_are_on_no_command_line(tmp_path):
    _, (keys,) = new_keys(1)
    path = tmp_path / "keys"
    write_keys(path, keys)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_keys(path) == keys
    with path.open() as file:
        assert read_keys(file.fileno()) == keys
    receiver, sender = os.pipe()
    os.write(sender, path.read_bytes())
    os.close(sender)
    assert read_keys(receiver) == keys
    os.close(receiver)
    assert keys.secret not in repr(keys)
    with pytest.raises(FileExistsError):
        write_keys(path, keys)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 0640"):
        read_keys(path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b"{" * 5000, json.dumps({"rank": 0, "driver_public": "x", "public": "x",
                                                                     "secret": "s3cret"}).encode()]
)  # fmt: skip
def test_a_file_that_holds_no_keys_is_refused_without_repeating_it(tmp_path, content):
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert str(path) in str(caught.value) and "s3cret" not in str(caught.value)


def test_a_worker_whose_key_is_refused_says_so(make_driver, two_hosts):
    driver, keys = make_driver(2)
    impostor = type(keys[0])(0, keys[1].driver_public, keys[1].public, keys[1].secret)
    with two_hosts.at_worker(), pytest.raises(BusError, match="does not admit this key as that of rank 0"):
        ZmqWorkerChannel.connect(driver.endpoints[0], 0, keys=impostor, timeout_s=10)
    stranger_keys = type(keys[0])(0, new_keys(1)[0].public, keys[0].public, keys[0].secret)
    with two_hosts.at_worker(), pytest.raises(BusTimeout, match="no answer"):
        ZmqWorkerChannel.connect(driver.endpoints[0], 0, keys=stranger_keys, timeout_s=0.5)
    assert driver.refused_peers >= 2


def test_ipv6_addresses_are_taken_in_brackets(stack):
    if not socket.has_ipv6:
        pytest.skip("needs IPv6")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    driver_keys, (worker_keys,) = new_keys(1)
    driver = stack.enter_context(ZmqDriverChannel.create(1, epoch=7, listen="tcp://[::1]:0", keys=driver_keys))
    worker = stack.enter_context(ZmqWorkerChannel.connect(driver.endpoints[0], 0, keys=worker_keys, timeout_s=10))
    driver.publish(InitCache(7, 5), timeout_s=10)
    assert worker.receive(timeout_s=10) == InitCache(7, 5)


def test_closing_leaves_no_thread_no_descriptor_and_no_port(make_driver, connect):
    def use_and_close():
        driver, keys = make_driver(2)
        workers = [connect(driver, one) for one in keys]
        driver.publish(InitCache(7, 5), timeout_s=10)
        assert [worker.receive(timeout_s=10) for worker in workers] == [InitCache(7, 5)] * 2
        driver.close()
        for worker in workers:
            worker.close()

    use_and_close()  # whatever is opened once per process is open now
    before = own_descriptors(), own_threads()
    use_and_close()
    assert own_descriptors() <= before[0]
    wait_for_threads_to_end(before[1])
