"""What a rank reports about its failure, as the error that the caller sees."""

from __future__ import annotations

import pytest

from zmqexec.errors import CheckpointError, WorkerFailed
from zmqexec.executor.multiproc import _failed
from zmqexec.protocol import ErrorInfo, Failure


def test_the_users_mistake_keeps_its_class_and_words() -> None:
    error = _failed(1, Failure(0, -1, "LOADING", ErrorInfo("CheckpointError", "no tensor 'x'")))
    assert isinstance(error, CheckpointError) and str(error) == "no tensor 'x'"


@pytest.mark.parametrize("kind", ["RuntimeError", "InternalError", "ProtocolError", "BusTimeout", "WorkerFailed"])
def test_any_other_failure_names_rank_phase_and_step(kind: str) -> None:
    error = _failed(3, Failure(0, 17, "DECODE", ErrorInfo(kind, "Traceback ...")))
    assert isinstance(error, WorkerFailed) and error.rank == 3
    assert str(error) == "worker 3 failed in phase DECODE of step 17: Traceback ..."
