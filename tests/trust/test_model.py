"""The model of the bus, csrc/bus/model/bus.pml, exhausted by spin: nothing goes wrong, and what is broken is found.

Needs spin and a C compiler; on Debian: apt-get install spin gcc. `-s` shows states and CPU seconds.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "csrc/bus/model/bus.pml"

# Every step of the model touches what others see: partial-order reduction finds nothing to leave out, and does not go
# with a death that is a rendezvous. The search is exhaustive: collapsed states are whole ones, stored in less memory.
COMPILE = ["gcc", "-DNOREDUCE", "-DCOLLAPSE", "-DMEMLIM=3000", "-o", "pan", "pan.c"]
MAX_DEPTH = 20_000  # a search that gets there fails; runs are some 600 steps long
SMALL = "RECORDS=2 SLOTS=1"  # the least that makes the writer wait and reuse a slot


@dataclass
class Verdict:
    error: str | None  # pan's words, up to the depth
    states: int
    unreached: set[str]  # lines of the model no run came to


@pytest.fixture
def check(tmp_path: Path):
    """Runs spin on the model with these macros; `formula` checks termination as LTL, else safety and end states."""
    for tool in ("spin", "gcc"):
        assert shutil.which(tool), f"{tool} is missing; on Debian: apt-get install {tool}"

    def run(macros: str, *, formula: bool = False, fair: bool = False) -> Verdict:
        start = _cpu_s()
        defines = [f"-D{macro}" for macro in macros.split()]
        _run(["spin", *defines, "-a", str(MODEL)], tmp_path)
        level = "-O0" if "READERS=1" in macros else "-O2"  # two seconds of optimizing buy a small model nothing
        _run([*COMPILE, level, *(["-DNFAIR=3"] if formula else ["-DSAFETY", "-DNOCLAIM"])], tmp_path)
        said = _run(["./pan", f"-m{MAX_DEPTH}", *["-a"] * formula, *["-f"] * fair], tmp_path)
        assert "max search depth too small" not in said, said
        error = re.search(r"^pan:1: (.*?) \(at depth", said, re.MULTILINE)
        assert int(re.search(r"errors: (\d+)", said)[1]) == (error is not None), said
        assert (error is not None) == ("Search not completed" in said), said
        states = int(re.search(r"(\d+) states, stored", said)[1])
        result = error[1] if error else "no error"
        print(f"\n{macros}{' LTL' * formula}: {result}, {states} states, {_cpu_s() - start:.1f} s")
        unreached = set(re.findall(r"bus\.pml:(\d+), state \d+, \"(?!-end-)", said))
        return Verdict(error[1] if error else None, states, unreached)

    return run


def _cpu_s() -> float:
    """Used by programs that have ended: the same on a busy machine as on an idle one, nearly."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "macros",
    [
        pytest.param("READERS=1", id="1 reader"),
        pytest.param("READERS=1 PSO", id="1 reader, stores out of order"),
        pytest.param("READERS=1 PSO SPAN=2 SPURIOUS=2", id="1 reader, long record, spurious wake-ups"),
        pytest.param("READERS=1 PSO HERALD", id="1 reader, records heralded"),
        pytest.param("READERS=1 PSO READER_DIES", id="1 reader that is killed"),
        pytest.param("READERS=1 PSO WRITER_DIES", id="1 reader, writer killed"),
        pytest.param("READERS=2", id="2 readers"),
        pytest.param("READERS=2 PSO SPAN=2", id="2 readers, long record, stores out of order"),
        pytest.param(f"READERS=2 {SMALL} SPURIOUS=1", id="2 readers, spurious wake-up"),
        pytest.param(f"READERS=2 {SMALL} PSO HERALD", id="2 readers, records heralded"),
        pytest.param(f"READERS=2 {SMALL} PSO READER_DIES", id="2 readers, one killed"),
        pytest.param("READERS=2 PSO WRITER_DIES", id="2 readers, writer killed"),
        pytest.param(f"READERS=3 {SMALL} PSO", id="3 readers, stores out of order"),
    ],
)
def test_no_wake_up_is_lost_and_no_record_torn_overwritten_lost_or_doubled(check, macros: str) -> None:
    assert check(macros).error is None


@pytest.mark.parametrize(
    "macros",
    [
        pytest.param("READERS=1", id="1 reader"),
        pytest.param("READERS=1 READER_DIES", id="1 reader that is killed"),
        pytest.param("READERS=1 WRITER_DIES", id="1 reader, writer killed"),
        pytest.param("READERS=2", id="2 readers"),
        pytest.param(f"READERS=2 {SMALL} READER_DIES", id="2 readers, one killed"),
        pytest.param(f"READERS=2 {SMALL} WRITER_DIES", id="2 readers, writer killed"),
    ],
)
def test_every_run_ends_even_an_unfair_one(check, macros: str) -> None:
    assert check(macros, formula=True).error is None


@pytest.mark.parametrize(
    "macros",
    [
        pytest.param("READERS=1 SPIN", id="1 reader"),
        pytest.param("READERS=1 SPIN READER_DIES", id="1 reader that is killed"),
        pytest.param("READERS=1 SPIN WRITER_DIES", id="1 reader, writer killed"),
        pytest.param(f"READERS=2 {SMALL} SPIN", id="2 readers"),
    ],
)
def test_every_fair_run_ends_however_long_waiters_spin(check, macros: str) -> None:
    assert check(macros, formula=True, fair=True).error is None


def test_spinning_adds_no_state(check) -> None:
    assert check("READERS=1 SPIN").states == check("READERS=1").states


def test_an_unfair_run_may_spin_for_ever(check) -> None:
    assert check("READERS=1 SPIN", formula=True).error.startswith("acceptance cycle")


ASLEEP = "invalid end state"
TORN = "assertion violated (half=="
OVERWRITTEN = "assertion violated (((buffers"
LEFT_BEHIND = "assertion violated (position==published)"


@pytest.mark.parametrize(
    ("macros", "error"),
    [
        pytest.param("NO_RINGER_FENCE", ASLEEP, id="without the ringer's fence a wake-up is lost"),
        pytest.param("NO_WAITER_FENCE", ASLEEP, id="without the waiter's fence a wake-up is lost"),
        pytest.param("SEEN_LATE", ASLEEP, id="a bell looked at after the check loses a wake-up"),
        pytest.param("PUBLISH_EARLY", TORN, id="published before it is written, a record is torn"),
        pytest.param("PSO RELAXED_PUBLISH", TORN, id="published by a relaxed store, a record is torn"),
        pytest.param("FREE_EARLY", OVERWRITTEN, id="freed before it is read, a slot is overwritten"),
        pytest.param("CLOSED_LATE", LEFT_BEHIND, id="closed looked at after the ring, a record is left behind"),
        pytest.param("SILENT_CLOSE", ASLEEP, id="a close that does not ring leaves a reader asleep"),
        pytest.param("READER_DIES SILENT_WATCHER", ASLEEP, id="a death that does not ring leaves the writer asleep"),
    ],
)
def test_what_is_broken_is_found(check, macros: str, error: str) -> None:
    found = check(f"READERS=1 {macros}").error
    assert found is not None and found.startswith(error)


@pytest.mark.parametrize("fence", ["NO_RINGER_FENCE", "NO_WAITER_FENCE"])
@pytest.mark.parametrize("num_readers", [1, 2])
def test_without_a_fence_a_run_does_not_end(check, fence: str, num_readers: int) -> None:
    assert check(f"READERS={num_readers} {fence}", formula=True).error.startswith("acceptance cycle")


def test_relaxed_publishing_is_safe_where_stores_stay_in_order(check) -> None:
    """So it is PSO, and nothing else, that lets the model see what the release is for."""
    assert check("READERS=1 RELAXED_PUBLISH").error is None


def test_no_line_of_the_model_is_dead(check) -> None:
    """What no run reaches proves nothing."""
    runs = [check(f"READERS=1 PSO {death}") for death in ("READER_DIES", "WRITER_DIES")]
    assert all(run.states > 1000 for run in runs)
    assert set.intersection(*(run.unreached for run in runs)) == set()
