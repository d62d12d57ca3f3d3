"""Compiling what needs no Python: the bus as it is, or with one thing taken away, to see a check find that out."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUS = ROOT / "csrc" / "bus"
FUZZ = BUS / "fuzz"
PORTABLE = tuple(BUS / f"{name}.c" for name in ("segment", "ring", "wait", "status", "checksum"))
STRESS = tuple(BUS / f"{name}.c" for name in ("stress", "stress_content", "stress_roles"))
FLAGS = ("-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")


def compile_c(
    output: Path, sources: Sequence[Path], *flags: str, compiler: str = "gcc", changed: Path | None = None
) -> Path:
    """Compile and link `sources`; `changed` takes the place of the bus's file of its name."""
    if changed is not None:
        sources = [changed if source == BUS / changed.name else source for source in sources]
        assert changed in sources
    command = [compiler, *FLAGS, *flags, "-I", str(BUS), "-o", str(output), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return output


def change(folder: Path, source: str, old: str, new: str) -> Path:
    """A copy in `folder` of one of the bus's sources, with `old`, which occurs once, replaced."""
    text = (BUS / source).read_text()
    assert text.count(old) == 1, f"{source} has {text.count(old)} times {old!r}"
    (folder / source).write_text(text.replace(old, new))
    return folder / source


def orders_of(source: str) -> list[tuple[str, int]]:
    """(label, line) of each labelled acquire or release in a source; the order stands in the line after the label."""
    lines = (BUS / source).read_text().splitlines()
    return [
        (match[1], number) for number, line in enumerate(lines) if (match := re.search(r"SYNC: ([\w ]+) \*/", line))
    ]


def relax(folder: Path, source: str, line: int) -> Path:
    """A copy of a source with the order relaxed that the label in `line` is about."""
    lines = (BUS / source).read_text().splitlines()
    relaxed = re.sub("memory_order_(acquire|release|seq_cst)", "memory_order_relaxed", lines[line + 1])
    assert relaxed != lines[line + 1]
    lines[line + 1] = relaxed
    (folder / source).write_text("\n".join(lines) + "\n")
    return folder / source
