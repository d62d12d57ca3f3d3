"""What a worker's output thread says before it ends the process."""

from __future__ import annotations

import os

import pytest

from zmqexec.bus.status import Phase
from zmqexec.protocol import Failure
from zmqexec.worker.__main__ import Worker
from zmqexec.worker.outputs import PeerMissing


class Channel:
    closed = False

    def __init__(self):
        self.heard = []

    def set_status(self, phase, step_id):
        pass

    def set_error(self, text):
        pass

    def reply(self, message, timeout_s):
        self.heard.append(message)

    def close(self):
        self.heard.append("closed")


@pytest.mark.parametrize(("error", "phase"), [(PeerMissing("rank 1"), "COLLECTIVE"), (ValueError("no"), "DECODE")])
def test_a_failure_is_handed_over_before_the_process_ends(monkeypatch, error, phase):
    channel = Channel()
    monkeypatch.setattr(os, "_exit", channel.heard.append)
    worker = Worker(channel, {"rank": 0, "epoch": 3})
    worker._set_phase(Phase.DECODE)
    worker._fail_from_thread(error)
    failure, *rest = channel.heard
    assert isinstance(failure, Failure) and failure.phase == phase
    assert rest == ["closed", 1]
