"""The patterns the bus consists of, in the C11 memory model: what can go wrong as written, and with an order weakened.

python c11_handshake.py    # a table; exit status 1 if an outcome is not as expected
"""

import sys
from collections.abc import Generator
from typing import Any

from rc11 import ACQ, ACQ_REL, NA, REL, RLX, SC, Access, Thread, add, fence, load, outcomes, store


def handshake(ringer_fence: str | None = SC, waiter_fence: str | None = SC, seen: str = ACQ) -> list[Thread]:
    """A ringer changes a word while a waiter parks. Each returns what it saw."""

    def ringer() -> Generator[Access, int, str]:
        yield store("word", 1, REL)
        if ringer_fence:
            yield fence(ringer_fence)
        if (yield load("waiters", RLX)) == 0:
            return "nobody waits"
        yield add("value", 1, REL)
        return "woke"

    def waiter() -> Generator[Access, int, str]:
        yield add("waiters", 1, RLX)
        if waiter_fence:
            yield fence(waiter_fence)
        value = yield load("value", seen)
        if (yield load("word", ACQ)) == 1:
            return "sees the change"
        return "sleeps unless rung" if value == 0 else "sleeps though rung"

    return [ringer, waiter]


def publish(publish_order: str = REL, look_order: str = ACQ) -> list[Thread]:
    """A record is copied in and published; a reader that sees it published copies it out."""

    def writer() -> Generator[Access, int, None]:
        yield store("slot", 1, NA)
        yield store("tail", 1, publish_order)

    def reader() -> Generator[Access, int, str]:
        if (yield load("tail", look_order)) == 0:
            return "empty"
        return "record" if (yield load("slot", NA)) == 1 else "torn"

    return [writer, reader]


def free(free_order: str = REL, look_order: str = ACQ) -> list[Thread]:
    """A reader copies a slot out and frees it; a writer that sees it free overwrites it."""

    def reader() -> Generator[Access, int, str]:
        record = yield load("slot", NA)
        yield store("head", 1, free_order)
        return "record" if record == 0 else "overwritten"

    def writer() -> Generator[Access, int, None]:
        if (yield load("head", look_order)) == 1:
            yield store("slot", 1, NA)

    return [reader, writer]


def close(closed_first: bool = True, closed_order: str = REL) -> list[Thread]:
    """The driver publishes, then closes; a worker gives up when it is closed and the ring is empty."""

    def driver() -> Generator[Access, int, None]:
        yield store("tail", 1, REL)
        yield store("closed", 1, closed_order)

    def worker() -> Generator[Access, int, str]:
        looks = ["closed", "tail"] if closed_first else ["tail", "closed"]
        saw = {}
        for word in looks:
            saw[word] = yield load(word, ACQ)
        return "lost" if saw["closed"] == 1 and saw["tail"] == 0 else "fine"

    return [driver, worker]


LOST = ("nobody waits", "sleeps unless rung")
MISLED = ("woke", "sleeps though rung")

# pattern, threads, the bad outcome (results of the threads), whether C11 allows it
CASES: list[tuple[str, list[Thread], tuple[Any, ...], bool]] = [
    ("handshake as written: both miss", handshake(), LOST, False),
    ("handshake without the ringer's fence: both miss", handshake(ringer_fence=None), LOST, True),
    ("handshake without the waiter's fence: both miss", handshake(waiter_fence=None), LOST, True),
    ("handshake with an acq_rel fence for the ringer: both miss", handshake(ringer_fence=ACQ_REL), LOST, True),
    ("handshake with an acq_rel fence for the waiter: both miss", handshake(waiter_fence=ACQ_REL), LOST, True),
    ("handshake as written: sees the ring, not the change", handshake(), MISLED, False),
    ("bell's value loaded relaxed: sees the ring, not the change", handshake(seen=RLX), MISLED, True),
    ("publish as written: torn record", publish(), (None, "torn"), False),
    ("publish as written: race", publish(), (None, "record", "race"), False),
    ("tail stored relaxed: torn record", publish(publish_order=RLX), (None, "torn", "race"), True),
    ("tail loaded relaxed: torn record", publish(look_order=RLX), (None, "torn", "race"), True),
    ("free as written: overwritten before it is read", free(), ("overwritten", None), False),
    ("free as written: race", free(), ("record", None, "race"), False),
    ("head stored relaxed: overwritten before it is read", free(free_order=RLX), ("overwritten", None, "race"), True),
    ("head loaded relaxed: overwritten before it is read", free(look_order=RLX), ("overwritten", None, "race"), True),
    ("close as written: a record is lost", close(), (None, "lost"), False),
    ("tail looked at before closed: a record is lost", close(closed_first=False), (None, "lost"), True),
    ("closed stored relaxed: a record is lost", close(closed_order=RLX), (None, "lost"), True),
]


def is_allowed(threads: list[Thread], bad: tuple[Any, ...]) -> tuple[bool, int]:
    """Whether an execution has the outcome, and how many executions there are."""
    found, count = outcomes(threads)
    return any(outcome[: len(bad)] == bad for outcome in found), count


def main() -> int:
    wrong = 0
    for name, threads, bad, expected in CASES:
        allowed, count = is_allowed(threads, bad)
        wrong += allowed != expected
        verdict = "allowed" if allowed else "forbidden"
        print(f"{name}: {verdict} ({count} executions){'' if allowed == expected else ' -- NOT AS EXPECTED'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
