"""The park handshake on two real cores, a million times: csrc/bus/litmus.c."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc/bus/litmus.c"
ROUNDS = 1_000_000
SECONDS_PER_VARIANT = 20  # a second suffices, unless others keep the cores busy
ENOUGH = 20_000  # rounds in which x86 shows the reordering surely: it does so in 1 to 40 of 1000


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """Per variant: wake-ups lost, and in how many rounds."""
    program = tmp_path_factory.mktemp("litmus") / "litmus"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *flags, "-o", str(program), str(SOURCE)], check=True, timeout=60)
    command = [str(program), str(ROUNDS), str(SECONDS_PER_VARIANT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    print(f"\n{done.stdout}{done.stderr}")
    assert done.returncode in (0, 1), done.stderr
    lines = re.findall(r"^(.+): lost (\d+) of (\d+) in", done.stdout, re.MULTILINE)
    return {name: (int(lost), int(rounds)) for name, lost, rounds in lines}


def test_with_both_fences_no_wake_up_is_lost(lost) -> None:
    count, rounds = lost["both fences"]
    assert count == 0
    assert rounds > 0


def test_without_the_ringers_fence_x86_loses_wake_ups(lost) -> None:
    count, rounds = lost["no ringer fence"]
    if platform.machine() != "x86_64":
        pytest.skip(f"{platform.machine()} may reorder here or not: {count} lost of {rounds}")
    if rounds < ENOUGH:
        pytest.skip(f"the cores were too busy: {count} lost of {rounds}")
    assert count > 0
