"""Runs one of `tests.fuzzing.TARGETS` under atheris: `fuzz_python.py TARGET CORPUS [libFuzzer options]`.

Not a test by itself: test_fuzz.py starts it. `unchecked` is `steps` without the checks that `Batch.begin` relies on,
for a test that must find that out.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["zmqexec"], enable_loader_override=False):
    from tests import fuzzing
    from zmqexec.worker.batch import Batch

NUM_MARKS = 2048
VALUES = re.compile(r"\d+|'.*'|`.*`", re.DOTALL)


def _mark() -> Callable[[], None]:
    return atheris.instrument_func(lambda: None)


def main() -> None:
    name, corpus, *options = sys.argv[1:]
    if name == "unchecked":
        name = "steps"
        Batch._check = lambda *_: None
    target = fuzzing.TARGETS[name]
    for index, seed in enumerate(fuzzing.seeds(name)):
        Path(corpus, f"seed-{index}").write_bytes(seed)
    # msgspec is not instrumented, but its error says what it found, and where: what is new in that counts as coverage.
    marks = [_mark() for _ in range(NUM_MARKS)]

    def run(data: bytes) -> None:
        error, _, where = target(data).partition(" - at ")
        outcome = VALUES.sub("", error) + where
        marks[zlib.crc32(outcome.encode(errors="replace")) % NUM_MARKS]()

    atheris.Setup([sys.argv[0], *options, corpus], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
