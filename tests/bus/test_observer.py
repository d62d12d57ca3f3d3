"""Engines found through /proc, and nothing else taken for one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zmqexec.bus import observer
from zmqexec.bus.channel import DriverChannel
from zmqexec.bus.observer import Process, all_engines, ancestors_of, engines_of
from zmqexec.errors import BusError

DRIVER = """if True:
    import signal
    from zmqexec.bus.channel import DriverChannel
    driver = DriverChannel.create(1, epoch=0)
    print(driver.fd, flush=True)
    signal.pause()
"""
ODD_NAME = """if True:
    import ctypes, signal
    ctypes.CDLL(None).prctl(15, b") R 1 (x")
    print("named", flush=True)
    signal.pause()
"""
LAYOUT_VERSION_AT = 8  # csrc/bus/layout.h


@pytest.fixture
def engines(stack):
    """`engines_of` this process, closed at the end of the test."""

    def find(pid=None):
        found = engines_of(os.getpid() if pid is None else pid)
        for engine in found:
            stack.callback(engine.close)
        return found

    return find


def test_the_engines_of_a_process_are_those_it_drives_and_has_not_closed(stack, engines):
    before = {engine.inode for engine in engines()}
    first = stack.enter_context(DriverChannel.create(1, epoch=1, name="first"))
    second = stack.enter_context(DriverChannel.create(2, epoch=2, name="second"))
    stack.callback(os.close, os.dup(first.fd))  # the same segment again
    mine = [engine for engine in engines() if engine.inode not in before]
    assert [(engine.pid, engine.fd, engine.name) for engine in mine] == [
        (os.getpid(), first.fd, "first"), (os.getpid(), second.fd, "second")
    ]  # fmt: skip
    assert len(mine[1].snapshot().ranks) == 2 and not mine[1].has_ended
    second.close()
    assert mine[1].has_ended and not mine[0].has_ended
    assert mine[1].snapshot().name == "second", "what it came to can still be read"
    assert [engine.name for engine in engines() if engine.inode not in before] == ["first"]


def test_all_engines_of_this_user_are_found(stack):
    driver = stack.enter_context(DriverChannel.create(1, epoch=0, name="mine among all"))
    found = all_engines()
    for engine in found:
        stack.callback(engine.close)
    assert (os.getpid(), driver.fd) in [(engine.pid, engine.fd) for engine in found]


def test_a_fork_that_holds_the_memfd_is_no_engine(stack, engines):
    """A copy of the driver, as a data loader is, and a process that inherited the memfd, as a worker is at first."""
    driver = stack.enter_context(DriverChannel.create(1, epoch=0))
    hold = [sys.executable, "-c", "import sys; print(1, flush=True); sys.stdin.read()"]
    child = subprocess.Popen(hold, pass_fds=[driver.fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.callback(child.wait, 10)
    stack.callback(child.kill)
    child.stdout.readline()
    assert observer._bus_fds(child.pid) == [driver.fd]
    assert engines(child.pid) == []
    assert os.getpid() in ancestors_of(child.pid)


def test_a_driver_that_dies_is_noticed_at_once(stack, start, engines):
    process = start("-c", DRIVER)
    process.stdout.readline()
    (engine,) = engines(process.pid)
    assert engine.wait(0.0) == [] and not engine.has_ended
    process.send_signal(signal.SIGKILL)
    assert engine.wait(10.0) == []
    assert engine.has_ended
    process.wait(10)
    with pytest.raises(OSError):
        engines(process.pid)


def test_waiting_names_the_descriptors_that_are_readable(stack, engines):
    stack.enter_context(DriverChannel.create(1, epoch=0))
    engine = engines()[0]
    reader, writer = os.pipe()
    for end in (reader, writer):
        stack.callback(os.close, end)
    assert engine.wait(0.0, reader) == []
    os.write(writer, b"x")
    assert engine.wait(10.0, reader) == [reader]


def test_another_layout_is_an_error_only_where_there_is_nothing_else(stack, engines):
    assert engines() == []  # no test leaves one open
    driver = stack.enter_context(DriverChannel.create(1, epoch=0))
    os.pwrite(driver.fd, (99).to_bytes(4, "little"), LAYOUT_VERSION_AT)
    with pytest.raises(BusError, match="layout version 99, this process speaks"):
        engines()
    good = stack.enter_context(DriverChannel.create(1, epoch=0))
    assert [engine.fd for engine in engines()] == [good.fd]


def test_what_is_opened_is_closed(stack):
    driver = stack.enter_context(DriverChannel.create(1, epoch=0))
    before = set(Path("/proc/self/fd").iterdir())
    for engine in engines_of(os.getpid()):
        engine.close()
        engine.close()
    with pytest.raises(FileNotFoundError):
        observer.Observer(os.getpid(), 9999)
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert not driver.status(0).pid


def test_a_process_is_read_whatever_its_name(start):
    process = start("-c", ODD_NAME)
    process.stdout.readline()
    seen = Process.of(process.pid)
    assert (seen.pid, seen.parent) == (process.pid, os.getpid()) and seen.state in "SR" and seen.cpu_s >= 0
    assert Process.of(2**22 + 5) is None
