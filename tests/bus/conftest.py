"""Fixtures of the bus tests: whatever a test opens is closed, and whatever it starts is ended."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import zmqexec
from zmqexec.bus import ring
from zmqexec.bus.channel import DriverChannel, WorkerChannel


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def make_ring(stack):
    """`ring.make_ring`, closed at the end of the test."""

    def make(*args, **kwargs):
        writer, readers = ring.make_ring(*args, **kwargs)
        for end in (writer, *readers):
            stack.enter_context(end)
        return writer, readers

    return make


@pytest.fixture
def make_bus(stack):
    """A driver's channel and the channels of all its workers, in this process."""

    def make(num_workers: int = 1, **settings) -> tuple[DriverChannel, list[WorkerChannel]]:
        driver = stack.enter_context(DriverChannel.create(num_workers, epoch=7, **settings))
        workers = [WorkerChannel.attach(driver.fd, rank) for rank in range(num_workers)]
        for worker in workers:
            stack.enter_context(worker)
        return driver, workers

    return make


@pytest.fixture
def start(stack):
    """Start a Python process that can import zmqexec; killed at the end of the test if it still runs."""

    def start_python(*args: str, **options) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": str(Path(zmqexec.__file__).parent.parent)}
        process = subprocess.Popen(
            [sys.executable, *args], env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, **options
        )
        stack.callback(process.wait, 10)
        stack.callback(process.kill)
        return process

    return start_python


@pytest.fixture
def eventually():
    """Poll a condition until it holds; fails the test after `timeout_s`."""

    def poll(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"still not true after {timeout_s} s"
            time.sleep(0.001)

    return poll


@pytest.fixture
def in_thread():
    """Run a function in a thread; the value returned joins it and returns or raises what it did."""

    def run(function: Callable[[], object]) -> Callable[[], object]:
        outcome: list[object] = []

        def body() -> None:
            try:
                outcome.append(function())
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()

        def join() -> object:
            thread.join(10)
            assert not thread.is_alive(), "the thread still runs"
            if isinstance(outcome[0], BaseException):
                raise outcome[0]
            return outcome[0]

        return join

    return run
