"""A worker does not outlive its driver, whatever it is doing and however the driver ends."""

import json
import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from tests.procs import is_stopped

# The driver's part: starts a worker with a lifeline, says who is who, and waits to be killed.
DRIVER = """if True:
    import json, os, subprocess, sys, time
    worker, group, held = sys.argv[1:]
    read_end, write_end = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", worker, str(os.getpid()), str(read_end)], pass_fds=[read_end],
                               stdout=subprocess.PIPE, text=True, process_group=0 if group == "own" else None)
    os.close(read_end)
    process.stdout.readline()
    pids = {"worker": process.pid}
    if held == "held":
        pids["fork"] = os.fork()
        if pids["fork"] == 0:
            os.close(1)
            time.sleep(60)
            os._exit(0)
    print(json.dumps(pids), flush=True)
    if held == "let go":
        sys.stdin.read(1)
        os.close(write_end)
    time.sleep(60)
"""

WORKER = """if True:
    import sys, time
    from zmqexec import _bus
    _bus.arm_death_watch(int(sys.argv[1]), int(sys.argv[2]))
    print("armed", flush=True)
    {then}
"""

SLEEPS = WORKER.format(then="time.sleep(60)")
# A pattern that backtracks for ever keeps the GIL.
HOLDS_THE_GIL = WORKER.format(then="import re; re.match('(a*)*b', 'a' * 100)")


def ends(pidfd: int, timeout_s: float = 5.0) -> bool:
    """Whether the process ends in time; 2 s are promised."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


@pytest.fixture
def family(start, stack):
    """Start a driver with a worker; returns the driver and pidfds of the others. All are killed afterwards."""

    def begin(worker: str, group: str = "same", held: str = "") -> tuple[subprocess.Popen[str], dict[str, int]]:
        driver = start("-c", DRIVER, worker, group, held)
        pids = json.loads(driver.stdout.readline())
        pidfds = {}
        for name, pid in pids.items():
            pidfds[name] = os.pidfd_open(pid)
            stack.callback(os.close, pidfds[name])
            stack.callback(kill, pidfds[name])
        return driver, pidfds

    return begin


def pid_of(pidfd: int) -> int:
    info = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    return next(int(line.split()[1]) for line in info.splitlines() if line.startswith("Pid:"))


def kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.mark.parametrize("worker", [SLEEPS, HOLDS_THE_GIL], ids=["asleep", "holding the GIL"])
@pytest.mark.parametrize("held", ["", "held"], ids=["", "a fork holds the pipe"])
@pytest.mark.parametrize("cause", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_its_driver(family, worker, held, cause):
    driver, pidfds = family(worker, held=held)
    assert not ends(pidfds["worker"], 0)
    driver.send_signal(cause)
    assert ends(pidfds["worker"])
    if held:
        assert not ends(pidfds["fork"], 0)


def test_a_stopped_worker_ends_with_its_driver(family, eventually):
    """In a process group of its own it is continued by the kernel, for the group has lost its last outside parent."""
    driver, pidfds = family(SLEEPS, group="own")
    signal.pidfd_send_signal(pidfds["worker"], signal.SIGSTOP)
    eventually(lambda: is_stopped(pid_of(pidfds["worker"])))
    driver.kill()
    assert ends(pidfds["worker"])


def test_a_worker_ends_when_its_driver_lets_go_of_it(start, stack):
    read_end, write_end = os.pipe()
    stack.callback(os.close, read_end)
    worker = start("-c", SLEEPS, str(os.getpid()), str(read_end), pass_fds=[read_end])
    assert worker.stdout.readline() == "armed\n"
    os.write(write_end, b"bytes do not matter")
    assert worker.poll() is None
    os.close(write_end)
    assert worker.wait(5) == 1


def test_a_worker_whose_parent_is_another_process_ends_at_once(start, stack):
    read_end, write_end = os.pipe()
    stack.callback(os.close, read_end)
    stack.callback(os.close, write_end)
    other = start("-c", "import time; time.sleep(60)")
    worker = start("-c", SLEEPS, str(other.pid), str(read_end), pass_fds=[read_end])
    assert worker.communicate(timeout=20)[0] == ""
    assert worker.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("os.getppid(), -1", "lifeline"),
        ("-1, 0", "pidfd_open"),
    ],
)
def test_a_watch_that_cannot_be_armed_is_an_error(start, arguments, message):
    script = f"""if True:
        import os
        from zmqexec import _bus
        from zmqexec.errors import BusError
        try:
            _bus.arm_death_watch({arguments})
        except BusError as error:
            print(error)
    """
    assert message in start("-c", script).communicate(timeout=20)[0]


def test_a_watch_is_armed_once(start, stack):
    read_end, write_end = os.pipe()
    stack.callback(os.close, read_end)
    stack.callback(os.close, write_end)
    again = WORKER.format(then="_bus.arm_death_watch(int(sys.argv[1]), int(sys.argv[2]))")
    worker = start("-c", again, str(os.getpid()), str(read_end), pass_fds=[read_end], stderr=subprocess.PIPE)
    assert "armed already" in worker.communicate(timeout=20)[1]
