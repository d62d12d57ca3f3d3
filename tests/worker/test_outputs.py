"""Results are delivered in order, by a thread that says when it is done and what went wrong."""

from __future__ import annotations

import queue
import threading

from zmqexec.protocol import StepOutput
from zmqexec.worker.outputs import OutputThread


class Step:
    """A launched step, whose result comes when it is `let_go`."""

    def __init__(self, number, error=None):
        self.number = number
        self._error = error
        self._gate = threading.Event()

    def let_go(self):
        self._gate.set()

    def result(self):
        assert self._gate.wait(10)
        if self._error:
            raise self._error
        return StepOutput(1, self.number, b"")


class Heard:
    """What a thread under test told."""

    def __init__(self):
        self.events = queue.SimpleQueue()
        self.thread = OutputThread(
            lambda pending: self.events.put(pending.result().step_id),
            lambda error: self.events.put(error),
            lambda: self.events.put("idle"),
        )

    def put(self, step):
        self.thread.put(lambda: step)

    def next(self):
        return self.events.get(timeout=10)


def test_steps_are_delivered_in_order_and_the_last_leaves_it_idle():
    heard, steps = Heard(), [Step(number) for number in range(5)]
    assert not heard.thread.is_busy
    for step in steps:
        heard.put(step)
    assert heard.thread.is_busy
    for step in reversed(steps):
        step.let_go()
    assert [heard.next() for _ in range(6)] == [0, 1, 2, 3, 4, "idle"]
    assert not heard.thread.is_busy
    heard.thread.stop()


def test_the_first_error_is_told_and_nothing_after_it_is_delivered():
    heard, error = Heard(), RuntimeError("lost")
    for step in (Step(0), Step(1, error), Step(2)):
        step.let_go()
        heard.put(step)
    told = iter(heard.next, error)
    assert [event for event in told if event != "idle"] == [0]
    heard.thread.stop()
    assert heard.events.empty()


def test_stopping_delivers_what_was_put_in_first():
    heard, step = Heard(), Step(7)
    heard.put(step)
    threading.Timer(0.05, step.let_go).start()
    heard.thread.stop()
    assert heard.next() == 7


def test_nobody_is_idle_while_the_next_step_is_launched():
    heard, first = Heard(), Step(0)
    heard.put(first)

    def launch():
        first.let_go()
        assert heard.next() == 0
        assert heard.thread.is_busy
        return second

    second = Step(1)
    heard.thread.put(launch)
    second.let_go()
    assert [heard.next(), heard.next()] == [1, "idle"]
    heard.thread.stop()
