"""What a worker tells the driver while it starts."""

from __future__ import annotations

import pytest

from zmqexec.errors import BusClosed
from zmqexec.protocol import CacheReady, CaptureProgress, Hello, InitCache
from zmqexec.worker.__main__ import PROGRESS_STEPS, Worker

EPOCH = 3


class Channel:
    """A bus on which one message comes, and then the end."""

    closed = False

    def __init__(self, message):
        self._messages = [message]
        self.replies = []

    def receive(self, timeout_s):
        if not self._messages:
            raise BusClosed("the end")
        return self._messages.pop()

    def reply(self, message, timeout_s):
        self.replies.append(message)

    def set_status(self, phase, step_id):
        pass


class Runner:
    """One that captures `num_graphs`."""

    def __init__(self, num_graphs):
        self._num_graphs = num_graphs

    def init_cache(self, num_blocks, on_progress):
        for done in range(self._num_graphs + 1 if self._num_graphs else 0):
            on_progress(done, self._num_graphs)


@pytest.mark.parametrize("num_graphs", [0, 1, 12, PROGRESS_STEPS, 1000])
def test_captured_graphs_are_reported_on_the_way_and_never_too_often(num_graphs):
    channel = Channel(InitCache(EPOCH, 10))
    worker = Worker(channel, {"rank": 0, "epoch": EPOCH})
    worker._runner = Runner(num_graphs)
    assert worker.run() == 0
    hello, *progress, ready = channel.replies
    assert isinstance(hello, Hello) and ready == CacheReady(EPOCH)
    assert len(progress) == (min(num_graphs, PROGRESS_STEPS) + 1 if num_graphs else 0)
    done = [one.done for one in progress]
    assert progress == [CaptureProgress(EPOCH, number, num_graphs) for number in sorted(set(done))]
    assert not done or (done[0], done[-1]) == (0, num_graphs)
