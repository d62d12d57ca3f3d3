"""Coverage-guided fuzzing of every decoder; and each kind of fuzzer, finding a check that was taken away.

ZMQEXEC_FUZZ_S is the time for all of it, in seconds. Debian: clang libclang-rt-dev; PyPI: atheris.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzzing import TARGETS
from tests.trust.builds import BUS, FUZZ, PORTABLE, ROOT, change, compile_c

BUS_TARGETS = ("attach", "read", "ring", "status")
SECONDS = float(os.environ.get("ZMQEXEC_FUZZ_S", "120"))
SECONDS_EACH = max(1, round(SECONDS / (len(BUS_TARGETS) + len(TARGETS))))
SECONDS_TO_FIND = 60  # a defect; a few are enough
FUZZER = ("-O1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")
LIMITS = ("-timeout=10", "-rss_limit_mb=1024", "-malloc_limit_mb=512", "-print_final_stats=1")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs for each of the bus's targets."""
    folder = tmp_path_factory.mktemp("seeds")
    for target in BUS_TARGETS:
        (folder / target).mkdir()
    program = compile_c(folder / "write-seeds", [FUZZ / "seeds.c", *PORTABLE])
    subprocess.run([str(program), str(folder)], check=True, timeout=60)
    return folder


def build(folder: Path, target: str, changed: Path | None = None) -> Path:
    sources = [FUZZ / f"{target}.c", *(source for source in PORTABLE if target != "read" or source.name != "ring.c")]
    return compile_c(folder / target, sources, *FUZZER, compiler="clang", changed=changed)


def fuzz(command: list[str], seconds: int, folder: Path) -> tuple[int, str]:
    """(exit status, what it said)"""
    options = [f"-max_total_time={seconds}", *LIMITS, f"-artifact_prefix={folder}/"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, errors="replace", timeout=seconds + 120, env=env
    )
    return done.returncode, done.stdout + done.stderr  # atheris reports on the one, libFuzzer on the other


def assert_found_nothing(outcome: tuple[int, str]) -> None:
    status, said = outcome
    assert status == 0, said
    runs = re.search(r"stat::number_of_executed_units: (\d+)", said)
    assert runs is not None and int(runs[1]) > 100, said
    print(said[said.rindex("stat::number") :])


@pytest.mark.parametrize("target", BUS_TARGETS)
def test_the_bus_survives_any_bytes(tmp_path: Path, seeds: Path, target: str) -> None:
    program = build(tmp_path, target)
    assert_found_nothing(fuzz([str(program), str(seeds / target)], SECONDS_EACH, tmp_path))


@pytest.mark.parametrize("target", TARGETS)
def test_python_decoders_survive_any_bytes(tmp_path: Path, target: str) -> None:
    (tmp_path / "corpus").mkdir()
    command = [sys.executable, str(ROOT / "tests/trust/fuzz_python.py"), target, str(tmp_path / "corpus")]
    assert_found_nothing(fuzz(command, SECONDS_EACH, tmp_path))


@pytest.mark.parametrize(
    ("target", "source", "check", "without"),
    [
        ("attach", "segment.c", "|| (uint64_t)file.st_size != layout->total", ""),
        ("attach", "ring.c", "slots_of(ring, record->length) > unread", "false"),
        ("ring", "ring.c", "if (writer->position - head > writer->position - slowest)", ""),
        ("ring", "ring.c", "writer->position - head > ring->num_slots", "false"),
        ("status", "status.c", "bucket >= BUS_NUM_BUCKETS", "false"),
    ],
)
def test_a_missing_check_of_the_bus_is_found(
    tmp_path: Path, seeds: Path, target: str, source: str, check: str, without: str
) -> None:
    program = build(tmp_path, target, change(tmp_path, source, check, without))
    status, said = fuzz([str(program), "-seed=1", str(seeds / target)], SECONDS_TO_FIND, tmp_path)
    assert status != 0 and re.search("AddressSanitizer|runtime error|not true", said), said


def test_a_header_that_is_read_twice_is_found(tmp_path: Path, seeds: Path) -> None:
    """The target includes ring.c, so the changed one has to stand where it looks for it."""
    (tmp_path / "fuzz").mkdir()
    for header in (BUS / "ring.h", BUS / "layout.h"):
        (tmp_path / header.name).symlink_to(header)
    for name in ("read.c", "fuzz.h"):
        (tmp_path / "fuzz" / name).write_text((FUZZ / name).read_text())
    use = "    *payload = at(&reader->ring, reader->position) + sizeof *record;\n"
    again = "    memcpy(record, at(&reader->ring, reader->position), sizeof *record);\n"
    change(tmp_path, "ring.c", use, again + use)
    sources = [tmp_path / "fuzz" / "read.c", *(source for source in PORTABLE if source.name != "ring.c")]
    program = compile_c(tmp_path / "read", sources, *FUZZER, compiler="clang")
    status, said = fuzz([str(program), "-seed=1", str(seeds / "read")], SECONDS_TO_FIND, tmp_path)
    assert status != 0 and re.search("AddressSanitizer|not true", said), said


def test_a_missing_check_of_a_python_decoder_is_found(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    script = str(ROOT / "tests/trust/fuzz_python.py")
    command = [sys.executable, script, "unchecked", str(tmp_path / "corpus"), "-seed=1"]
    status, said = fuzz(command, SECONDS_TO_FIND, tmp_path)
    assert status != 0 and "Uncaught Python exception" in said, said
