"""The status page: readable at any time, whatever its writer is doing."""

import os
import time

import pytest

from zmqexec.bus.channel import DriverChannel
from zmqexec.bus.status import Phase


def test_a_rank_that_never_attached_says_so(stack):
    driver = stack.enter_context(DriverChannel.create(1, epoch=0))
    assert driver.status(0).pid == 0
    assert driver.status(0).where() == "phase STARTING, not yet attached to the bus"


def test_the_driver_sees_what_each_rank_last_set(make_bus):
    driver, (first, second) = make_bus(2)
    before = time.monotonic_ns()
    second.set_status(Phase.COLLECTIVE, 2**55 - 1)
    second.set_error("out of memory")
    status = driver.status(1)
    assert (status.rank, status.pid, status.phase, status.step_id) == (1, os.getpid(), Phase.COLLECTIVE, 2**55 - 1)
    assert before <= status.heartbeat_ns <= time.monotonic_ns()
    assert status.error == "out of memory"
    assert (driver.status(0).phase, driver.status(0).step_id, driver.status(0).error) == (Phase.STARTING, -1, "")

    first.set_status(Phase.IDLE, -1)
    assert driver.status(0).where().startswith("phase IDLE for 0.0 s")
    assert "phase COLLECTIVE of step" in driver.status(1).where()
    assert driver.status(1).where().endswith("its last error: out of memory")


@pytest.mark.parametrize("text", ["", "x" * 1000, "ü" * 200, "a" + "€" * 200, "\ud800 lone surrogate"])
def test_an_error_text_is_cut_at_a_character(make_bus, text):
    driver, (worker,) = make_bus(1)
    worker.set_error(text)
    kept = driver.status(0).error
    assert text.encode("utf-8", "replace").decode().startswith(kept)
    assert len(kept.encode()) >= min(len(text.encode("utf-8", "replace")), 229)


@pytest.mark.parametrize(("phase", "step_id"), [(-1, 0), (256, 0), (0, 2**55), (0, -(2**55) - 1)])
def test_values_that_do_not_fit_their_bits_are_refused(make_bus, phase, step_id):
    _, (worker,) = make_bus(1)
    with pytest.raises(OverflowError):
        worker.set_status(phase, step_id)


def test_a_rank_out_of_range_is_refused(make_bus):
    driver, _ = make_bus(1)
    with pytest.raises(IndexError):
        driver.status(1)


WRITER = """if True:
    import sys
    from zmqexec import _bus
    worker = _bus.Segment.attach(int(sys.argv[1]), 0)
    texts = [letter * 200 for letter in "abc"]
    step = 0
    while not worker.closed:
        worker.set_status(step % 10, step)
        worker.set_error(texts[step % 3])
        step += 1
"""


def test_a_status_is_never_torn(stack, start, eventually):
    """Phase and step change together, and an error text is one of those that were set, while another process sets."""
    driver = stack.enter_context(DriverChannel.create(1, epoch=0))
    process = start("-c", WRITER, str(driver.fd), pass_fds=[driver.fd])
    eventually(lambda: driver.status(0).step_id > 0)
    for _ in range(20_000):
        status = driver.status(0)
        assert status.phase == status.step_id % 10
        assert status.error in ("a" * 200, "b" * 200, "c" * 200)
    driver.close()
    assert process.wait(10) == 0


def test_a_writer_that_is_killed_leaves_a_readable_status(stack, start, eventually):
    for _ in range(5):
        driver = stack.enter_context(DriverChannel.create(1, epoch=0))
        process = start("-c", WRITER, str(driver.fd), pass_fds=[driver.fd])
        eventually(lambda driver=driver: driver.status(0).step_id > 100)
        process.kill()
        process.wait(10)
        status = driver.status(0)
        assert status == driver.status(0)
        assert status.phase == status.step_id % 10 and len(set(status.error)) == 1
