"""A worker process that does what no worker should, started in place of zmqexec's own `_entry.py`.

`ODD_WORKER` names the function that does a step; `ODD_WORKER_PACKAGE` is the folder of zmqexec.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

BLOCK_SIZE = 4
NUM_GRAPHS = 3


class Rank:
    """One of them: honest until the first step."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.rank: int = arguments["rank"]
        self.epoch: int = arguments["epoch"]
        self.channel = WorkerChannel.attach(arguments["bus_fd"], self.rank)
        self.do_step = globals()[os.environ["ODD_WORKER"]]
        self.model = FakeWorker(0, BLOCK_SIZE)

    def serve(self) -> None:
        if os.environ["ODD_WORKER"] == "answer_among_strays":
            self.reply(CacheReady(self.epoch - 1))
        self.reply(Hello(self.epoch, self.rank, os.getpid(), str(PACKAGE_DIR), __version__, _bus.BUILD_ID))
        while True:
            match self.channel.receive(60.0):
                case LoadModel():
                    self.reply(ModelLoaded(self.epoch, 1 << 20))
                case InitCache() as init:
                    self.model = FakeWorker(init.num_blocks, BLOCK_SIZE)
                    for done in range(NUM_GRAPHS + 1):
                        self.reply(CaptureProgress(self.epoch, done, NUM_GRAPHS))
                    self.reply(CacheReady(self.epoch))
                case StepInput() as step:
                    self.do_step(self, step)

    def reply(self, message: Any) -> None:
        self.channel.reply(message, 60.0)

    def fail(self, phase: str, text: str, epoch: int | None = None) -> None:
        self.reply(Failure(self.epoch if epoch is None else epoch, 0, phase, ErrorInfo("RuntimeError", text)))

    def wait_taken(self, rank: int) -> None:
        """Wait until `rank` has replied in this step, and the driver has taken all of it."""
        segment = self.channel._segment
        while segment.status(rank)[2] != 0 or segment.statistics()[-1][rank][6] > 0:
            time.sleep(0.001)


# ── what they do in a step ──────────────────────────────────────────────────────────────────────────────────────────


def answer_among_strays(self: Rank, step: Any) -> None:
    """Before its answer rank 0 sends `STRAYS_OF_RANK_0` replies that are none, with tokens that would be seen."""
    wrong = pack([49] * 4)
    if self.rank == 0:
        self.reply(StepOutput(self.epoch - 1, step.step_id, wrong))
        self.reply(StepOutput(self.epoch + 1, step.step_id, wrong))
        self.reply(StepOutput(self.epoch, step.step_id - 1, wrong))
        self.reply(StepOutput(self.epoch, step.step_id + 1, wrong))
        self.fail("DECODE", "of an epoch that is over", epoch=self.epoch - 1)
        self.reply(CacheReady(self.epoch))
        self.reply(self.model.run(step))
    else:
        self.reply(StepOutput(self.epoch, step.step_id, wrong))
    self.channel.set_status(Phase.IDLE, step.step_id)


def read_on(self: Rank, step: Any) -> None:
    """Never answers."""


def ignore(self: Rank, step: Any) -> None:
    """Reads nothing any more."""
    self.channel.set_status(Phase.DECODE, step.step_id)
    time.sleep(60.0)


def fail_and_leave_once_heard(self: Rank, step: Any) -> None:
    """Reads nothing any more; leaves only when the driver has taken its last words."""
    self.channel.set_status(Phase.FAILED, 0)
    self.fail("DECODE", "the cause")
    self.wait_taken(self.rank)
    os._exit(1)


def fail_after_a_failure_of_the_past(self: Rank, step: Any) -> None:
    """Rank 0 fails because it waited for rank 1, whose own failure comes after one of another epoch."""
    if self.rank == 0:
        self.fail("COLLECTIVE", "rank 1 did not come")
        self.channel.set_status(Phase.FAILED, 0)
        time.sleep(60.0)
    self.wait_taken(0)
    self.fail("DECODE", "of an epoch that is over", epoch=self.epoch - 1)
    self.fail("DECODE", "the cause")
    time.sleep(60.0)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[2])
    sys.path[:] = [
        str(Path(os.environ["ODD_WORKER_PACKAGE"]).parent),
        str(Path(__file__).parents[3]),
        *arguments["sys_path"],
    ]
    from tests.fakes import FakeWorker
    from zmqexec import _bus
    from zmqexec.bus.channel import WorkerChannel
    from zmqexec.bus.status import Phase
    from zmqexec.child import PACKAGE_DIR
    from zmqexec.errors import BusClosed
    from zmqexec.protocol import (
        CacheReady,
        CaptureProgress,
        ErrorInfo,
        Failure,
        Hello,
        InitCache,
        LoadModel,
        ModelLoaded,
        StepInput,
        StepOutput,
        pack,
    )
    from zmqexec.version import __version__

    _bus.arm_death_watch(arguments["parent_pid"], arguments["lifeline_fd"])
    try:
        Rank(arguments).serve()
    except BusClosed:
        os._exit(0)
