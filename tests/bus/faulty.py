"""Processes of test_faults.py, which are killed and stopped: readers, repliers, and whole groups with a driver.

Usage: faulty.py ROLE ARGUMENT...; each function below that takes arguments of the command line is a role.
"""

import contextlib
import ctypes
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zmqexec import _bus
from zmqexec.bus import ring
from zmqexec.bus.channel import WAIT_POLICIES, DriverChannel, WorkerChannel
from zmqexec.bus.link import BY_ZMQ, Inbox, Outbox
from zmqexec.errors import BusClosed, BusError, BusTimeout
from zmqexec.protocol import StepInput

SLOT_BYTES = 256
NOISE = random.Random(1).randbytes(8 << 20)


def make_segment(num_workers: int, ring_bytes: int = 8192, policy: str = "eco") -> _bus.Segment:
    """A driver's segment whose reply rings have the size of its ring."""
    return _bus.Segment.create(
        num_workers=num_workers,
        epoch=0,
        num_slots=ring.slots_for(ring_bytes, SLOT_BYTES),
        slot_bytes=SLOT_BYTES,
        reply_num_slots=ring.slots_for(ring_bytes, SLOT_BYTES),
        reply_slot_bytes=SLOT_BYTES,
        wait_policy=WAIT_POLICIES.index(policy),
        cores=len(os.sched_getaffinity(0)),
        has_checksums=True,
    )


def message(number: int) -> bytes:
    """Message `number` of a stream, one to four slots: a CRC-32 of the rest, the number, then noise."""
    body = number.to_bytes(4, "little") + NOISE[number % 4096 :][: number * 37 % 800]
    return zlib.crc32(body).to_bytes(4, "little") + body


class Stream:
    """What came of such a stream."""

    def __init__(self) -> None:
        self.intact = 0
        self.wrong = 0

    def take(self, payload: memoryview) -> bool:
        if bytes(payload) == message(self.intact):
            self.intact += 1
        else:
            self.wrong += 1
        return True


def reader(fd: str, rank: str, timeout_s: str, stop_at: str) -> None:
    """Reads to the end in waits of `timeout_s`, and stops itself inside the decoder of message `stop_at`."""
    stream = Stream()

    def take(payload: memoryview) -> bool:
        if stream.intact == int(stop_at):
            os.kill(os.getpid(), signal.SIGSTOP)
        return stream.take(payload)

    segment = _bus.Segment.attach(int(fd), int(rank), 64)
    try:
        while True:
            segment.read((take,), float(timeout_s))
    except BusClosed:
        print(json.dumps(vars(stream)))


def replier(fd: str, rank: str, num_messages: str) -> None:
    """Replies with a stream."""
    segment = _bus.Segment.attach(int(fd), int(rank))
    for number in range(int(num_messages)):
        assert segment.write(message(number), 0, 60.0)


# ── a driver and two partners that answer everything ────────────────────────────────────────────────────────────────

WAIT_S = 0.02
"""How long each wait of theirs is; a process is stopped for longer."""

END = b"end"


def party(stop_fd: str) -> None:
    """The driver: publishes a stream until the pipe `stop_fd` is closed, and checks that every answer came."""
    segment = make_segment(2)
    command = [sys.executable, __file__, "partner", str(segment.fd)]
    partners = [
        subprocess.Popen([*command, str(rank)], pass_fds=[segment.fd], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    answers = [Stream(), Stream()]
    waited = 0

    def take_answers() -> None:
        while (answer := segment.read((bytes,), 0.0)) is not None:
            answers[answer[0]].take(memoryview(answer[1]))

    def publish(payload: bytes) -> None:
        nonlocal waited
        take_answers()
        while True:
            try:
                return ring.RingWriter(segment).write(payload, WAIT_S, check=take_answers)
            except BusTimeout:
                waited += 1

    print(json.dumps({"partner 0": partners[0].pid, "partner 1": partners[1].pid}), flush=True)
    number = 0
    while number % 64 or not select.select([int(stop_fd)], [], [], 0)[0]:
        publish(message(number))
        number += 1
    publish(END)
    deadline = time.monotonic() + 30.0
    while min(answer.intact for answer in answers) < number and time.monotonic() < deadline:
        answer = segment.read((bytes,), WAIT_S)
        if answer is not None:
            answers[answer[0]].take(memoryview(answer[1]))
    seen = [json.loads(partner.communicate(timeout=30)[0]) for partner in partners]
    print(json.dumps({"sent": number, "waited": waited, "answers": [vars(one) for one in answers], "seen": seen}))


def partner(fd: str, rank: str) -> None:
    """Sends back what it reads, until the end."""
    segment = _bus.Segment.attach(int(fd), int(rank))
    stream, waited = Stream(), 0
    while (payload := segment.read((bytes,), WAIT_S)) != END:
        if payload is None:
            waited += 1
            continue
        stream.take(memoryview(payload))
        while not segment.write(payload, 0, WAIT_S):
            waited += 1
    print(json.dumps({**vars(stream), "waited": waited}))


# ── drivers that are killed ─────────────────────────────────────────────────────────────────────────────────────────

PR_SET_CHILD_SUBREAPER = 36
LARGE = [bytearray(NOISE[: size << 10]) for size in (64, 300, 1000, 2500)]
TIMEOUT_S = 10.0


def nursery(how: str, rounds: str, seed: str) -> None:
    """Forks a driver, which forks two workers; kills it at a random moment; sees to it that the workers end.

    how  "ring": it publishes large records; "zmq": payloads larger than its ring; "marker": it stops between an
         announcement and its payload

    Forks of a process that has everything imported, and opens nothing itself, so that a round takes milliseconds.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    choose = random.Random(int(seed))
    said, exit_codes, gone_s, half_written = b"", [], [], 0
    for _ in range(int(rounds)):
        outcome = one_round(how, 0.0 if how == "marker" else choose.uniform(0.0, 0.02))
        said += outcome["said"]
        exit_codes += outcome["exit_codes"]
        gone_s.append(outcome["gone_s"])
        half_written += outcome["half_written"]
    said_of_errors = sorted({chr(one) for one in said} - {"r"})
    print(
        json.dumps(
            {
                "errors": said_of_errors,
                "exit_codes": sorted(set(exit_codes)),
                "workers": len(exit_codes),
                "slowest_s": max(gone_s),
                "half_written": half_written,
            }
        )
    )


def one_round(how: str, delay_s: float) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    driver = os.fork()
    if driver == 0:
        os.close(read_end)
        in_fork(lambda: driver_of(how, write_end))
    os.close(write_end)
    segment_fd = int(os.read(read_end, 4))
    memory = os.open(f"/proc/{driver}/fd/{segment_fd}", os.O_RDONLY)
    time.sleep(delay_s)  # a random moment of its publishing, which is what is tested
    begin = time.monotonic()
    os.kill(driver, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1]) == -signal.SIGKILL
    workers = [wait_for_a_child(), wait_for_a_child()]
    outcome = {
        "gone_s": time.monotonic() - begin,
        "exit_codes": [os.waitstatus_to_exitcode(status) for status in workers],
        "half_written": is_half_written(memory),
        "said": b"".join(iter(lambda: os.read(read_end, 4096), b"")),
    }
    os.close(memory)
    os.close(read_end)
    return outcome


def wait_for_a_child() -> int:
    """Its wait status. A worker that does not end fails the test, and is then ended with its session."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            return status
        if time.monotonic() > deadline:
            print(f"a worker has outlived its driver by {TIMEOUT_S} s", flush=True)
            os.killpg(0, signal.SIGKILL)
        time.sleep(0.001)


def in_fork(run: Any) -> None:
    """Run it and end the process; a fork must not return into its parent's code."""
    code = 3
    try:
        run()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def driver_of(how: str, report: int) -> None:
    segment = make_segment(2, ring_bytes=8 << 20 if how == "ring" else 64 << 10)
    outbox = Outbox(segment)
    lifeline, held = os.pipe()
    parent = os.getpid()
    for rank in range(2):
        if os.fork() == 0:
            os.close(held)
            in_fork(lambda rank=rank: worker_of(segment.fd, rank, parent, lifeline, report))
    while not all(segment.status(rank)[1] for rank in range(2)):
        time.sleep(0.001)
    if how == "marker":
        assert segment.write(outbox._zmq.announce(len(LARGE[0])), BY_ZMQ, TIMEOUT_S)
        while segment.holding_back(segment.max_payload_bytes):  # until both have read it, and wait for the payload
            time.sleep(0.001)
        os.write(report, b"%4d" % segment.fd)
        signal.pause()
    os.write(report, b"%4d" % segment.fd)
    number = 0
    while True:
        payload = LARGE[number % len(LARGE)]
        payload[:8] = payload[-8:] = number.to_bytes(8, "little")
        outbox.send(payload, TIMEOUT_S)
        number += 1


def worker_of(fd: int, rank: int, parent: int, lifeline: int, report: int) -> None:
    """Says "t" for a torn message, "o" for one out of order, "c" for a closed bus."""
    _bus.arm_death_watch(parent, lifeline)
    segment = _bus.Segment.attach(fd, rank)
    inbox = Inbox(segment, bytes)
    segment.set_status(1, 0)
    number = 0
    try:
        while True:
            payload = inbox.receive(TIMEOUT_S)
            if payload is None:
                continue
            if payload[:8] != payload[-8:] or len(payload) != len(LARGE[number % len(LARGE)]):
                os.write(report, b"t")
            if int.from_bytes(payload[:8], "little") != number:
                os.write(report, b"o")
            number += 1
    except BusClosed:
        os.write(report, b"c")


def is_half_written(memory: int) -> bool:
    """Whether the ring holds a record that was begun and not published: its header is the first thing written."""
    cursors = ring.PAGE_BYTES * (2 + 3)  # header, bells; the driver, two ranks
    tail = int.from_bytes(os.pread(memory, 8, cursors), "little")
    header = os.pread(memory, ring.PAGE_BYTES, 0)
    num_slots, slot_bytes, reply_slots, reply_slot_bytes = (
        int.from_bytes(header[at : at + 4], "little") for at in (40, 44, 48, 52)
    )
    begin = os.fstat(memory).st_size - num_slots * slot_bytes - 2 * reply_slots * reply_slot_bytes
    position = os.pread(memory, 8, begin + tail % num_slots * slot_bytes)
    return tail > 0 and int.from_bytes(position, "little") == tail


# ── a process whose file descriptors are all in use ─────────────────────────────────────────────────────────────────


def without_descriptors(who: str, num_needed: str) -> None:
    """A `who` ("sender" or "receiver") of a large message has fewer descriptors than it needs, then enough."""
    step = StepInput(0, 1, prefills=bytes(10_000))
    for spare in range(int(num_needed)):
        with contextlib.ExitStack() as stack:
            driver = stack.enter_context(DriverChannel.create(2, epoch=0, ring_bytes=4096))
            workers = [stack.enter_context(WorkerChannel.attach(driver.fd, rank)) for rank in range(2)]
            threads = ThreadPoolExecutor(3)
            if who == "sender":
                assert_refused(lambda driver=driver: driver.publish(step, TIMEOUT_S), spare)
                publishing = threads.submit(driver.publish, step, TIMEOUT_S)
            else:
                publishing = threads.submit(driver.publish, step, TIMEOUT_S)
                while not driver._outbox._broken:
                    time.sleep(0.001)
                assert_refused(lambda workers=workers: workers[0].receive(TIMEOUT_S), spare)
            reading = [threads.submit(worker.receive, TIMEOUT_S) for worker in workers]
            assert [one.result() for one in reading] == [step, step]
            publishing.result()
            threads.shutdown()
    print("all refused, and then delivered")


def assert_refused(use: Callable[[], object], spare: int) -> None:
    """`use` meets a limit that leaves `spare` descriptors: it says so, and opens none."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = open_fds()
    free = [fd for fd in range(1000) if fd not in held]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], before[1]))
    try:
        use()
    except BusError as error:
        assert "Too many open files" in str(error) and "ulimit -n" in str(error)
    else:
        raise AssertionError(f"{spare} descriptors were enough")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert open_fds() == held


def open_fds() -> list[int]:
    """Descriptors in use; those of the listing itself are not any more."""
    return sorted(int(fd.name) for fd in list(Path("/proc/self/fd").iterdir()) if fd.is_symlink())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
