"""The bus's patterns in the C11 memory model (csrc/bus/model), and the checker itself on known litmus tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "csrc/bus/model"
sys.path.insert(0, str(MODEL))

from c11_handshake import CASES, is_allowed  # noqa: E402
from rc11 import ACQ, ACQ_REL, REL, RLX, SC, add, fence, load, outcomes, store  # noqa: E402


@pytest.mark.parametrize(("threads", "bad", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_bad_outcome_is_forbidden_as_written_and_allowed_when_weakened(threads, bad, expected) -> None:
    allowed, executions = is_allowed(threads, bad)
    assert executions > 0
    assert allowed == expected


def _thread(*accesses):
    """A thread that does these in order and returns what its loads and additions read."""

    def run():
        seen = []
        for access in accesses:
            value = yield access
            if access.kind in "RU":
                seen.append(value)
        return tuple(seen)

    return run


def _store_buffering(store_order, load_order, fence_order=None):
    fences = [fence(fence_order)] if fence_order else []
    return [_thread(store(a, 1, store_order), *fences, load(b, load_order)) for a, b in ("xy", "yx")]


def _message_passing(store_order, load_order):
    writer = _thread(store("x", 1, RLX), store("y", 1, store_order))
    return [writer, _thread(load("y", load_order), load("x", RLX))]


def _load_buffering(load_order, store_order):
    return [_thread(load(a, load_order), store(b, 1, store_order)) for a, b in ("xy", "yx")]


def _independent_reads(load_order, fence_order=None):
    fences = [fence(fence_order)] if fence_order else []
    readers = [_thread(load(a, load_order), *fences, load(b, load_order)) for a, b in ("xy", "yx")]
    return [_thread(store("x", 1, REL)), _thread(store("y", 1, REL)), *readers]


def _write_to_read_causality(store_order, load_order):
    middle = _thread(load("x", load_order), store("y", 1, store_order))
    return [_thread(store("x", 1, RLX)), middle, _thread(load("y", load_order), load("x", RLX))]


@pytest.mark.parametrize(
    ("threads", "outcome", "expected"),
    [
        pytest.param(_store_buffering(SC, SC), ((0,), (0,)), False, id="SB, seq_cst"),
        pytest.param(_store_buffering(RLX, RLX, SC), ((0,), (0,)), False, id="SB, seq_cst fences"),
        pytest.param(_store_buffering(REL, ACQ), ((0,), (0,)), True, id="SB, release and acquire"),
        pytest.param(_store_buffering(REL, ACQ, ACQ_REL), ((0,), (0,)), True, id="SB, acq_rel fences"),
        pytest.param(_message_passing(REL, ACQ), ((), (1, 0)), False, id="MP, release and acquire"),
        pytest.param(_message_passing(RLX, ACQ), ((), (1, 0)), True, id="MP, relaxed store"),
        pytest.param(_message_passing(REL, RLX), ((), (1, 0)), True, id="MP, relaxed load"),
        pytest.param(_load_buffering(RLX, RLX), ((1,), (1,)), True, id="LB, relaxed, as on Arm and POWER"),
        pytest.param(_load_buffering(ACQ, REL), ((1,), (1,)), False, id="LB, acquire and release"),
        pytest.param(_independent_reads(ACQ), ((), (), (1, 0), (1, 0)), True, id="IRIW, acquire"),
        pytest.param(_independent_reads(ACQ, SC), ((), (), (1, 0), (1, 0)), False, id="IRIW, seq_cst fences"),
        pytest.param(_write_to_read_causality(REL, ACQ), ((), (1,), (1, 0)), False, id="WRC, release and acquire"),
        pytest.param(_write_to_read_causality(RLX, RLX), ((), (1,), (1, 0)), True, id="WRC, relaxed"),
        pytest.param(
            [_thread(store("x", 1, RLX)), _thread(load("x", RLX), load("x", RLX))], ((), (1, 0)), False, id="CoRR"
        ),
        pytest.param([_thread(add("x", 1, RLX))] * 2, ((0,), (0,)), False, id="two additions are atomic"),
        pytest.param([_thread(add("x", 1, RLX))] * 2, ((0,), (1,)), True, id="one addition after the other"),
    ],
)
def test_the_checker_agrees_with_the_literature(threads, outcome, expected) -> None:
    assert (outcome in outcomes(threads)[0]) == expected
