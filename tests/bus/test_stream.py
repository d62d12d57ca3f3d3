"""The bus between processes: under load nothing is lost, torn, doubled or reordered; at rest it costs nothing."""

import importlib.util
import json
import time
from pathlib import Path

import pytest

from zmqexec import _bus
from zmqexec.bus import ring
from zmqexec.bus.channel import DriverChannel
from zmqexec.bus.link import Outbox

READER = Path(__file__).with_name("stream_reader.py")


@pytest.fixture(scope="module")
def stream():
    spec = importlib.util.spec_from_file_location("stream_reader", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("num_readers", "num_messages"), [(1, 200_000), (2, 200_000), (4, 200_000), (8, 200_000)])
def test_a_long_stream_arrives_whole_and_in_order(stream, stack, start, num_readers, num_messages):
    """Reader 0 stops for a while at random, and so holds all others back."""
    segment = _bus.Segment.create(
        num_workers=num_readers,
        epoch=0,
        num_slots=ring.slots_for(stream.RING_BYTES, stream.SLOT_BYTES),
        slot_bytes=stream.SLOT_BYTES,
        reply_num_slots=2,
        reply_slot_bytes=ring.PAGE_BYTES,
    )
    stack.callback(segment.close)
    outbox = Outbox(segment)
    stack.callback(outbox.close)
    readers = [
        start(
            str(READER), str(segment.fd), str(rank), str(num_messages), "42", "0.002" if rank == 0 else "0",
            pass_fds=[segment.fd],
        )
        for rank in range(num_readers)
    ]  # fmt: skip

    def check():
        assert all(process.poll() is None for process in readers), "a reader ended early"

    num_large = 0
    for message in stream.messages(num_messages, 42):
        outbox.send(message, 30.0, check)
        num_large += len(message) > stream.RING_BYTES
    assert num_large > num_messages // 200
    for process in readers:
        seen = json.loads(process.communicate(timeout=60)[0])
        assert seen == {"intact": num_messages, "torn": 0, "out of order": 0, "large": num_large, "more": 0}
        assert process.returncode == 0


IDLE_WORKER = """if True:
    import sys
    from zmqexec.bus.channel import WorkerChannel
    from zmqexec.errors import BusClosed
    from zmqexec.protocol import CacheReady
    worker = WorkerChannel.attach(int(sys.argv[1]), int(sys.argv[2]))
    worker.reply(CacheReady(0), 10)
    try:
        worker.receive(60)
    except BusClosed:
        worker.close()
"""


def cpu_s(pid: int) -> float:
    """Seconds of CPU time that the threads of a process have used, to the nanosecond."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def test_an_idle_group_uses_no_cpu(stack, start):
    driver = stack.enter_context(DriverChannel.create(4, epoch=0))
    workers = [start("-c", IDLE_WORKER, str(driver.fd), str(rank), pass_fds=[driver.fd]) for rank in range(4)]
    ready = [driver.receive(timeout_s=30) for _ in workers]
    assert None not in ready
    assert driver.receive(timeout_s=0.2) is None  # they have parked

    before, driver_before = sum(cpu_s(worker.pid) for worker in workers), time.thread_time()
    assert driver.receive(timeout_s=1.0) is None
    used_s = sum(cpu_s(worker.pid) for worker in workers) - before + time.thread_time() - driver_before
    print(f"an idle group of 4 workers and a driver used {used_s * 1e3:.2f} ms of CPU time in 1 s")
    assert used_s < 0.01

    driver.close()
    assert [worker.wait(10) for worker in workers] == [0] * 4
