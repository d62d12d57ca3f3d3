"""Ends the benchmark's processes when it is killed: those that it had stopped would stay for ever.

Reads lines of process ids, the last of which counts. Runs in: a process of its own.
"""

import contextlib
import os
import signal
import sys
import time

GRACE_S = 2.0  # in which multiprocessing's trackers remove shared memory

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    below = ""
    for below in sys.stdin:  # noqa: B007
        pass
    for number, wait_s in ((signal.SIGCONT, GRACE_S), (signal.SIGKILL, 0.0)):
        for pid in below.split():
            with contextlib.suppress(OSError):
                os.kill(int(pid), number)
        time.sleep(wait_s if below.strip() else 0.0)
