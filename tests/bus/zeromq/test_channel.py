"""The bus over ZeroMQ on one machine: what it refuses, what it counts, what it names, and what it leaves behind."""

import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import zmq

import zmqexec
from tests.procs import is_stopped, own_descriptors, own_threads, wait_for_threads_to_end
from zmqexec.bus.echo_worker import Echo
from zmqexec.bus.status import Phase
from zmqexec.bus.zeromq import control, endpoints, frames
from zmqexec.bus.zeromq.driver_channel import ZmqDriverChannel
from zmqexec.bus.zeromq.frames import CLOSE, CREDIT, DATA, HEADER_BYTES
from zmqexec.bus.zeromq.worker_channel import ZmqWorkerChannel
from zmqexec.errors import BusClosed, BusError, BusTimeout, ConfigError, ProtocolError
from zmqexec.protocol import CacheReady, InitCache, StepInput, StepOutput

IMPORT_PATH = str(Path(zmqexec.__file__).parent.parent)


@pytest.fixture
def make(stack):
    def make_bus(num_workers=1, **settings):
        driver = stack.enter_context(ZmqDriverChannel.create(num_workers, epoch=7, **settings))
        workers = [ZmqWorkerChannel.connect(driver.endpoints[rank], rank, timeout_s=10) for rank in range(num_workers)]
        for worker in workers:
            stack.enter_context(worker)
        return driver, workers

    return make_bus


@pytest.fixture
def start_echo(start):
    """Echo workers in processes of their own, which have joined."""

    def start_all(driver):
        processes = [
            start("-m", "zmqexec.bus.echo_worker", "--connect", endpoint, "--rank", str(rank))
            for rank, endpoint in enumerate(driver.endpoints)
        ]
        for process in processes:
            assert "has joined" in process.stdout.readline()
        return processes

    return start_all


def inject(sender, frame):
    """Send raw bytes on a lane, as a peer with a bug would."""
    sender._end.outboxes[0].socket.send(frame) if isinstance(sender, ZmqDriverChannel) else (
        sender._end.outbox.socket.send(frame)
    )


# ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["driver", "worker"])
def ends(request, make):
    """(sender, receiver): each lane keeps the same promises."""
    driver, (worker,) = make(1)
    driver.publish(InitCache(7, 1), timeout_s=10)
    assert worker.receive(timeout_s=10) == InitCache(7, 1)
    worker.reply(CacheReady(7), timeout_s=10)
    assert driver.receive(timeout_s=10) == (0, CacheReady(7))
    return (driver, worker) if request.param == "driver" else (worker, driver)


@pytest.mark.parametrize(
    "garbage", [b"", b"\xc1", b"\x91\x63", b"\x94\x03\x07", b"\x91" * 100_000, b"\x92\x04\x07\x00", b"\xa2\xff\xfe"]
)
def test_payloads_that_are_no_message_are_a_protocol_error(ends, garbage):
    sender, receiver = ends
    inject(sender, frames.make(DATA, 7, 1, garbage))
    with pytest.raises(ProtocolError, match="no message of this version"):
        receiver.receive(timeout_s=10)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"GET / HTTP/1.0\r\n\r\n",
        bytes(HEADER_BYTES),
        frames.MAGIC + b"\x63" + bytes(100),
        frames.make(DATA, 7, 1, b"abc") + b"d",
        frames.make(DATA, 7, 1, b"abc")[:-1],
    ],
)
def test_bytes_that_are_no_frame_are_a_protocol_error(ends, frame):
    sender, receiver = ends
    inject(sender, frame)
    with pytest.raises(ProtocolError, match="no frame of this version"):
        receiver.receive(timeout_s=10)


@pytest.mark.parametrize("position", [3, 8, 15, 30, HEADER_BYTES, HEADER_BYTES + 2])
def test_a_damaged_frame_is_a_protocol_error_and_counted(ends, position):
    sender, receiver = ends
    frame = frames.make(DATA, 7, 1, b"abc")
    frame[position] ^= 0x10
    inject(sender, frame)
    with pytest.raises(ProtocolError, match="checksum"):
        receiver.receive(timeout_s=10)
    assert (receiver.checksum_failures, receiver.gaps, receiver.stale) == (1, 0, 0)


def test_a_lost_frame_is_a_protocol_error_and_counted(ends):
    sender, receiver = ends
    inject(sender, frames.make(DATA, 7, 3, b"abc"))
    with pytest.raises(ProtocolError, match=r"frame 3 .* where 1 was expected: frames were lost"):
        receiver.receive(timeout_s=10)
    assert receiver.gaps == 1


def test_a_frame_that_comes_twice_is_a_protocol_error_and_counted(ends):
    sender, receiver = ends
    inject(sender, frames.make(DATA, 7, 0, b"abc"))
    with pytest.raises(ProtocolError, match=r"frame 0 .* it came twice"):
        receiver.receive(timeout_s=10)
    assert receiver.gaps == 1


def test_frames_of_another_epoch_are_dropped_and_counted(ends):
    sender, receiver = ends
    for epoch in (6, 8, 0):
        inject(sender, frames.make(DATA, epoch, 1, b"abc"))
    inject(sender, frames.make(CLOSE, 6, 1))
    if isinstance(sender, ZmqDriverChannel):
        sender.publish(InitCache(7, 2), timeout_s=10)
        assert receiver.receive(timeout_s=10) == InitCache(7, 2)
    else:
        sender.reply(CacheReady(7), timeout_s=10)
        assert receiver.receive(timeout_s=10) == (0, CacheReady(7))
    assert (receiver.stale, receiver.gaps) == (4, 0)


def test_a_frame_of_unknown_kind_is_a_protocol_error(ends):
    sender, receiver = ends
    inject(sender, frames.make(77, 7, 1))
    with pytest.raises(ProtocolError, match="kind 77"):
        receiver.receive(timeout_s=10)


@pytest.mark.parametrize("credit", [(2, 0), (0, 1 << 40), (1 << 60, 1 << 60)])
def test_a_credit_for_what_was_never_sent_is_a_protocol_error(make, credit):
    driver, (worker,) = make(1, window_messages=1)
    driver.publish(InitCache(7, 1), timeout_s=10)
    payload = frames.CREDIT_PAYLOAD.pack(*credit)
    worker._end.inbox.socket.send(frames.make(CREDIT, 7, 1, payload))
    with pytest.raises(ProtocolError, match="rank 0 claims"):
        driver.publish(InitCache(7, 1), timeout_s=10)


# ── bounds ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_message_over_the_limit_is_refused_where_it_is_sent(make):
    driver, (worker,) = make(1, max_message_bytes=1000)
    with pytest.raises(ConfigError, match=r"10\d\d bytes exceeds max_message_bytes=1000"):
        driver.publish(StepInput(7, 1, prefills=bytes(1000)), timeout_s=10)
    with pytest.raises(ConfigError, match="max_message_bytes=1000"):
        worker.reply(StepOutput(7, 1, bytes(1000)), timeout_s=10)
    driver.publish(StepInput(7, 1, prefills=bytes(900)), timeout_s=10)
    assert worker.receive(timeout_s=10).step_id == 1  # nothing was sent, so that nothing is missing


def test_a_peer_that_ignores_the_limit_is_cut_off_and_named(make, eventually):
    driver, (worker,) = make(1, max_message_bytes=1000)
    inject(worker, bytes(1 << 20))
    eventually(lambda: driver.lost)
    assert "connection" in driver.lost[0]
    with pytest.raises(BusTimeout, match=r"rank 0 \(.*connection"):
        driver.publish(InitCache(7, 1), timeout_s=0.05)


def test_what_is_under_way_is_bounded_in_messages_and_in_bytes(make):
    driver, (worker,) = make(1, window_messages=5, window_bytes=100_000)
    for _ in range(5):
        driver.publish(InitCache(7, 1), timeout_s=10)
    with pytest.raises(BusTimeout, match="rank 0"):
        driver.publish(InitCache(7, 1), timeout_s=0.05)
    assert [worker.receive(timeout_s=10) for _ in range(5)] == [InitCache(7, 1)] * 5
    for _ in range(2):
        driver.publish(StepInput(7, 1, prefills=bytes(90_000)), timeout_s=10)
    with pytest.raises(BusTimeout, match="rank 0"):
        driver.publish(InitCache(7, 1), timeout_s=0.05)


def test_a_driver_waits_for_a_worker_that_has_not_joined_and_says_so(stack, in_thread):
    driver = stack.enter_context(ZmqDriverChannel.create(1, epoch=7))
    with pytest.raises(BusTimeout, match=r"rank 0 \(it has not joined"):
        driver.publish(InitCache(7, 1), timeout_s=0.05)
    publishing = in_thread(lambda: driver.publish(InitCache(7, 2), timeout_s=10))
    worker = stack.enter_context(ZmqWorkerChannel.connect(driver.endpoints[0], 0, timeout_s=10))
    assert worker.receive(timeout_s=10) == InitCache(7, 2)
    publishing()


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf")])
def test_a_wait_without_a_deadline_is_refused(make, timeout_s):
    driver, (worker,) = make(1)
    for wait in (
        driver.receive,
        worker.receive,
        lambda t: driver.publish(InitCache(7, 1), t),
        lambda t: worker.reply(CacheReady(7), t),
    ):
        with pytest.raises(ValueError, match="timeout_s"):
            wait(timeout_s)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"window_messages": 0}, "window_messages=0"),
        ({"max_message_bytes": 0}, "max_message_bytes=0"),
        ({"lost_after_s": 0.0}, "lost_after_s=0.0"),
        ({"num_workers": 0}, "0 workers"),
        ({"num_workers": 65}, "65 workers"),
        ({"listen": "tcp://127.0.0.1:0"}, "needs keys"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        ZmqDriverChannel.create(**{"num_workers": 1, "epoch": 7, **settings})


@pytest.mark.parametrize("limit", [6, 12, 30, 60, 200])
def test_too_few_file_descriptors_are_a_clear_error(start, limit):
    program = f"""if True:
        import resource
        from zmqexec.bus.zeromq.driver_channel import ZmqDriverChannel
        from zmqexec.errors import BusError
        resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
        try:
            ZmqDriverChannel.create(16, epoch=7)
        except BusError as error:
            print(error)
    """
    process = start("-c", program)
    assert "raise the limit (ulimit -n)" in process.communicate(timeout=60)[0]
    assert process.returncode == 0


# ── who joins ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rank_joins_once(make):
    driver, _ = make(2)
    with pytest.raises(BusTimeout, match="another connection of this rank"):
        ZmqWorkerChannel.connect(driver.endpoints[0], 0, timeout_s=0.2)
    driver.publish(InitCache(7, 1), timeout_s=10)


def test_a_rank_that_was_lost_cannot_come_back(make, eventually):
    driver, (worker,) = make(1)
    worker._end.service._socket.disconnect(driver.endpoints[0])  # as when a connection breaks
    eventually(lambda: driver.lost)
    with pytest.raises(BusError, match="joined before: a new one needs a new bus"):
        ZmqWorkerChannel.connect(driver.endpoints[0], 0, timeout_s=10)


def test_a_worker_at_another_ranks_endpoint_is_refused(stack):
    driver = stack.enter_context(ZmqDriverChannel.create(2, epoch=7))
    with pytest.raises(BusError, match="endpoint of rank 1, not of rank 0"):
        ZmqWorkerChannel.connect(driver.endpoints[1], 0, timeout_s=10)


def test_a_worker_of_another_version_is_refused(stack, monkeypatch):
    driver = stack.enter_context(ZmqDriverChannel.create(1, epoch=7))
    monkeypatch.setattr("zmqexec.bus.zeromq.worker_service.__version__", "0.0.1")
    with pytest.raises(BusError, match=r"the worker 0\.0\.1: install the same"):
        ZmqWorkerChannel.connect(driver.endpoints[0], 0, timeout_s=10)


def test_joining_gives_up_at_the_deadline():
    before = own_threads()
    with pytest.raises(BusTimeout, match="nobody listens there"):
        ZmqWorkerChannel.connect("ipc://@zmqexec-nobody", 0, timeout_s=0.1)
    wait_for_threads_to_end(before)


@pytest.mark.parametrize("garbage", [b"", b"\xc1", b"\x92\x09\x00", b"\x93\x01\x00\x00", b"\x91" * 60_000])
def test_a_rank_that_says_nonsense_is_lost_and_named(make, eventually, garbage):
    driver, (worker,) = make(1)
    service = worker._end.service

    def say_nonsense():
        control.encode, original = (lambda _: garbage), control.encode
        try:
            return control.say(service._socket, None)
        finally:
            control.encode = original

    assert say_nonsense()
    eventually(lambda: driver.lost)
    assert "no worker of this version says" in driver.lost[0]


@pytest.mark.skipif(os.getuid() != 0, reason="takes another user id, which root alone can have")
def test_only_this_users_processes_may_connect(stack, eventually):
    driver = stack.enter_context(ZmqDriverChannel.create(1, epoch=7))
    program = f"""if True:
        import os, sys
        sys.path.insert(0, {IMPORT_PATH!r})
        from zmqexec.bus.zeromq.worker_channel import ZmqWorkerChannel
        from zmqexec.errors import BusTimeout
        os.setgid(65534); os.setuid(65534)
        try:
            ZmqWorkerChannel.connect({driver.endpoints[0]!r}, 0, timeout_s=0.5)
        except BusTimeout:
            print("kept out")
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "kept out\n", done.stderr
    eventually(lambda: driver.refused_peers)
    with ZmqWorkerChannel.connect(driver.endpoints[0], 0, timeout_s=10):
        pass


# ── status ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rank_that_has_not_joined_has_the_status_of_none():
    with ZmqDriverChannel.create(1, epoch=7) as driver:
        assert "not yet attached" in driver.status(0).where()


def test_a_rank_that_does_not_answer_has_its_last_status_with_a_note(stack, start_echo, eventually):
    driver = stack.enter_context(ZmqDriverChannel.create(1, epoch=7))
    (process,) = start_echo(driver)
    eventually(lambda: driver.status(0).phase == Phase.IDLE)
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: is_stopped(process.pid))
    begin = time.monotonic()
    status = driver.status(0)
    assert time.monotonic() - begin < 2
    assert (status.pid, status.phase) == (process.pid, Phase.IDLE)
    assert "it has not answered for 0.2 s" in status.where()
    process.send_signal(signal.SIGCONT)
    eventually(lambda: "not answered" not in driver.status(0).where())
    assert not driver.lost  # a process of this machine that is stopped is not lost


def test_saying_what_one_does_is_cheap(make):
    """Nothing is sent: the time is printed, and a system call per step would be seen here."""
    _, (worker,) = make(1)
    begin = time.thread_time()
    for step_id in range(100_000):
        worker.set_status(Phase.DECODE, step_id)
    used_s = time.thread_time() - begin
    print(f"set_status takes {used_s * 10:.2f} us")
    assert used_s < 1.0


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_worker_is_named_and_what_it_said_last_is_received(stack, start_echo, eventually):
    driver = stack.enter_context(ZmqDriverChannel.create(2, epoch=7))
    first, second = start_echo(driver)
    step = StepInput(7, 3)
    driver.publish(step, timeout_s=10)
    replies = [driver.receive(timeout_s=10) for _ in range(2)]
    assert sorted(Echo.unpack(reply.token_ids) for _, reply in replies) == [Echo.of(0, step), Echo.of(1, step)]
    second.kill()
    eventually(lambda: driver.lost)
    assert list(driver.lost) == [1]
    assert driver.receive(timeout_s=60) is None  # woken: whoever started the process sees to it
    with pytest.raises(BusTimeout, match=r"rank 1 \(its connection ended\)"):
        driver.publish(step, timeout_s=0.05)
    assert "its connection ended" in driver.status(1).where()
    driver.close()
    assert first.wait(10) == 0
    assert "the driver closed the bus" in first.stdout.read()


def test_a_killed_driver_ends_its_workers_waits(stack, start):
    program = """if True:
        import time
        from zmqexec.bus.zeromq.driver_channel import ZmqDriverChannel
        from zmqexec.protocol import InitCache
        driver = ZmqDriverChannel.create(1, epoch=7)
        print(driver.endpoints[0], flush=True)
        driver.publish(InitCache(7, 1), timeout_s=30)
        time.sleep(60)
    """
    process = start("-c", program)
    worker = stack.enter_context(ZmqWorkerChannel.connect(process.stdout.readline().strip(), 0, timeout_s=10))
    assert worker.receive(timeout_s=30) == InitCache(7, 1)
    process.kill()
    with pytest.raises(BusClosed, match="connection to the driver ended"):
        worker.receive(timeout_s=30)
    with pytest.raises(BusClosed):
        worker.reply(CacheReady(7), timeout_s=30)
    assert worker.closed


def test_closing_leaves_no_thread_and_no_file_descriptor():
    def use_and_close():
        with ZmqDriverChannel.create(2, epoch=7) as driver:
            workers = [ZmqWorkerChannel.connect(driver.endpoints[rank], rank, timeout_s=10) for rank in range(2)]
            driver.publish(StepInput(7, 1, prefills=bytes(1 << 20)), timeout_s=10)
            for worker in workers:
                worker.receive(timeout_s=10)
                worker.reply(CacheReady(7), timeout_s=10)
            assert len(own_threads() - before[1]) == 3 * 3 if before else True
            driver.status(0)
        for worker in workers:
            worker.close()
            worker.close()
        driver.close()

    before = None
    use_and_close()  # whatever is opened once per process is open now
    gc.collect()
    before = own_descriptors(), own_threads()
    use_and_close()
    assert own_descriptors() <= before[0]
    wait_for_threads_to_end(before[1])


def test_what_a_worker_replied_before_it_closed_is_received(stack, start):
    """A failing worker's last words: it replies, closes and exits at once."""
    driver = stack.enter_context(ZmqDriverChannel.create(1, epoch=7))
    program = f"""if True:
        import os
        from zmqexec.bus.zeromq.worker_channel import ZmqWorkerChannel
        from zmqexec.protocol import StepOutput
        worker = ZmqWorkerChannel.connect({driver.endpoints[0]!r}, 0)
        for step_id in range(8):
            worker.reply(StepOutput(7, step_id, bytes(8 << 20)), timeout_s=10)
        worker.close()
        os._exit(3)
    """
    process = start("-c", program)
    received = [driver.receive(timeout_s=30) for _ in range(8)]
    assert [reply.step_id for _, reply in received] == list(range(8))
    assert process.wait(10) == 3
    assert not driver.lost  # it said goodbye


def test_a_program_that_ends_without_closing_ends_at_once(start):
    program = """if True:
        import contextlib, threading
        from zmqexec.bus.zeromq.driver_channel import ZmqDriverChannel
        from zmqexec.bus.zeromq.worker_channel import ZmqWorkerChannel
        from zmqexec.errors import BusClosed
        driver = ZmqDriverChannel.create(2, epoch=7)
        worker = ZmqWorkerChannel.connect(driver.endpoints[0], 0)
        def wait():
            with contextlib.suppress(BusClosed):
                worker.receive(timeout_s=60)
        threading.Thread(target=wait, daemon=True).start()
        print(driver.endpoints[1], flush=True)
        driver.receive(timeout_s=60)
    """
    process = start("-c", program, stderr=subprocess.PIPE)
    with ZmqWorkerChannel.connect(process.stdout.readline().strip(), 1, timeout_s=30) as worker:
        begin = time.monotonic()
        worker.reply(CacheReady(7), timeout_s=10)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 0
        assert time.monotonic() - begin < 10
        with pytest.raises(BusClosed, match="the driver closed the bus"):
            worker.receive(timeout_s=10)


def test_closing_is_quick_although_a_worker_does_not_read(stack, start_echo, eventually):
    driver = stack.enter_context(ZmqDriverChannel.create(1, epoch=7, linger_s=0.2, window_bytes=1 << 30))
    (process,) = start_echo(driver)
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: is_stopped(process.pid))
    for _ in range(10):
        driver.publish(StepInput(7, 1, prefills=bytes(10 << 20)), timeout_s=10)
    begin = time.monotonic()
    driver.close()
    assert time.monotonic() - begin < 5


def test_closing_at_any_moment_of_a_wait_is_safe():
    for delay in range(60):
        driver = ZmqDriverChannel.create(1, epoch=7)
        worker = ZmqWorkerChannel.connect(driver.endpoints[0], 0, timeout_s=10)
        started = threading.Barrier(4)

        def use(attempt, started=started):
            started.wait(10)
            with suppress(BusClosed):
                while True:
                    attempt()

        attempts = [
            lambda worker=worker: worker.receive(timeout_s=10),
            lambda driver=driver: driver.publish(InitCache(7, 1), timeout_s=10),
            lambda driver=driver: driver.receive(timeout_s=10),
        ]
        users = [threading.Thread(target=use, args=(attempt,)) for attempt in attempts]
        for user in users:
            user.start()
        started.wait(10)
        for _ in range(delay * 50):
            pass
        for end in (worker, driver) if delay % 2 else (driver, worker):
            end.close()
        for user in users:
            user.join(10)
            assert not user.is_alive()


def test_a_thread_inside_a_call_closes_what_its_check_closed(make):
    driver, _ = make(1, window_messages=1)
    driver.publish(InitCache(7, 1), timeout_s=10)
    with pytest.raises(BusClosed):
        driver.publish(InitCache(7, 1), timeout_s=10, check=driver.close)


def test_a_fork_can_neither_use_nor_close_its_parents_bus(make):
    driver, (worker,) = make(1)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for use in (lambda: driver.try_receive(), lambda: worker.reply(CacheReady(7), 1)):
                try:
                    use()
                except BusError as error:
                    code = 0 if "forks" in str(error) else 2
            driver.close()
            worker.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    driver.publish(InitCache(7, 1), timeout_s=10)
    assert worker.receive(timeout_s=10) == InitCache(7, 1)


def test_waiting_takes_no_cpu(stack, start_echo):
    driver = stack.enter_context(ZmqDriverChannel.create(2, epoch=7))
    processes = start_echo(driver)

    def cpu_s(pid):
        return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9

    assert driver.receive(timeout_s=0.2) is None
    pids = [os.getpid(), *(process.pid for process in processes)]
    before = sum(map(cpu_s, pids))
    assert driver.receive(timeout_s=1.0) is None
    used_s = sum(map(cpu_s, pids)) - before
    print(f"an idle driver and 2 workers used {used_s * 1e3:.2f} ms of CPU time in 1 s")
    assert used_s < 0.02


# ── platforms ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_it_runs_without_the_extension_module_and_without_what_only_linux_has(start, platform):
    """No Mac is at hand: this shows that nothing of Linux alone is used, not how libzmq behaves there."""
    program = f"""if True:
        import os, sys
        sys.modules["zmqexec._bus"] = None  # any import of it fails
        sys.platform = {platform!r}
        if sys.platform != "linux":
            del os.memfd_create, os.eventfd, os.pidfd_open, os.sched_getaffinity, os.pipe2
        from zmqexec.bus.zeromq.driver_channel import ZmqDriverChannel
        from zmqexec.bus.zeromq.worker_channel import ZmqWorkerChannel
        from zmqexec.protocol import CacheReady, InitCache
        with ZmqDriverChannel.create(1, epoch=7) as driver:
            with ZmqWorkerChannel.connect(driver.endpoints[0], 0) as worker:
                driver.publish(InitCache(7, 5), timeout_s=10)
                print(worker.receive(timeout_s=10).num_blocks)
    """
    process = start("-c", program)
    assert process.communicate(timeout=60)[0] == "5\n"
    assert process.returncode == 0


@pytest.fixture
def in_directory(monkeypatch, tmp_path_factory):
    """As on a platform without abstract sockets. The parent directory of the sockets' own."""
    parent = Path("/tmp") / f"zx{os.getpid()}"  # pytest's own directories have long names
    parent.mkdir()
    monkeypatch.setattr(endpoints, "AbstractPlace", lambda: endpoints.DirectoryPlace(parent))
    yield parent
    parent.rmdir()  # fails unless everything in it has been removed


def test_where_there_are_no_abstract_sockets_a_private_directory_holds_them(in_directory, make):
    driver, (worker,) = make(1)
    (directory,) = in_directory.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert len(list(directory.iterdir())) == 3
    driver.publish(InitCache(7, 5), timeout_s=10)
    assert worker.receive(timeout_s=10) == InitCache(7, 5)
    driver.close()
    assert not directory.exists()


def test_the_directory_goes_with_a_forgotten_driver_but_not_with_a_fork(in_directory):
    driver = ZmqDriverChannel.create(1, epoch=7)
    (directory,) = in_directory.iterdir()
    pid = os.fork()
    if pid == 0:
        driver.close()
        del driver
        gc.collect()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert directory.exists()
    del driver
    gc.collect()
    assert not directory.exists()


def test_a_directory_whose_name_is_too_long_for_a_socket_is_refused(tmp_path):
    parent = tmp_path / ("x" * 90)
    parent.mkdir()
    with pytest.raises(ConfigError, match="TMPDIR"):
        endpoints.DirectoryPlace(parent)
    assert not list(parent.iterdir())


def test_a_socket_is_refused_by_name_where_its_address_is_taken(in_directory):
    context = zmq.Context()
    with pytest.raises(ConfigError, match="cannot be bound"):
        endpoints.bind(context.socket(zmq.PAIR), "ipc:///nowhere/at/all", 0, None)
    context.destroy(linger=0)
