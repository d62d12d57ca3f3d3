"""Processes whose absence, crash or hang costs nothing but their own results.

A child prints lines `RESULT {json}` among whatever its libraries print. What it had printed before it failed counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[1]
MARK = "RESULT "
TAIL_CHARS = 600
ERROR_LINES = 30
POLL_S = 0.25
GRACE_S = 3.0


def emit(result: dict[str, Any]) -> None:
    """In a child: hand one result to the parent."""
    print(MARK + json.dumps(result), flush=True)


def search_here_last() -> None:
    """In a child that imports libraries: `kernels`, say, is a script of ours, and a package that transformers uses."""
    sys.path.sort(key=lambda entry: Path(entry).resolve() == BENCH)


def run_child(
    arguments: Sequence[str],
    timeout_s: float,
    on_result: Callable[[dict[str, Any]], None],
    *,
    python: str = sys.executable,
    on_line: Callable[[str], None] = lambda line: None,
    pass_fds: Sequence[int] = (),
    grace_s: float = GRACE_S,
    env: Mapping[str, str] | None = None,
    shows_errors: bool = False,
) -> str | None:
    """Run `python *arguments` with this folder importable; None if it ended well, else why not.

    The end of its stderr is repeated on ours where it failed, and with `shows_errors` in any case. Its process group is
    gone when this returns: after SIGTERM it has `grace_s` to end children of its own.
    """
    paths = [str(BENCH), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [python, *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **own, **(env or {})},
                start_new_session=True,
                pass_fds=pass_fds,
            )
        except OSError as error:
            return f"cannot be started: {error.strerror}"
        try:
            finished = _read_lines(process, deadline, on_result, on_line)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s if finished else 0)
        finally:
            _end_group(process, grace_s)
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    code = process.returncode
    if shows_errors or code != 0 or not finished:
        print(*said.splitlines()[-ERROR_LINES:], sep="\n", end="\n" if said else "", file=sys.stderr, flush=True)
    if not finished:
        return f"took longer than {timeout_s:.0f} s"
    if code != 0:
        return f"{signal.Signals(-code).name if code < 0 else f'exit code {code}'}: {tail(said)}"
    return None


def tail(text: str) -> str:
    """The last words of `text` on one line, without folders."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[-1] if lines else "it said nothing"
    return " ".join(word.rpartition("/")[2] if word.startswith("/") else word for word in said.split())[:TAIL_CHARS]


def _read_lines(
    process: subprocess.Popen[bytes],
    deadline: float,
    on_result: Callable[[dict[str, Any]], None],
    on_line: Callable[[str], None],
) -> bool:
    """Pass on what the child prints until it closes its output; False at the deadline."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    pending = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        # A grandchild may hold the pipe open after the child's end: ask for both.
        has_ended = process.poll() is not None
        if not select.select([descriptor], [], [], min(left, 0.0 if has_ended else POLL_S))[0]:
            if has_ended:
                return True
            continue
        data = os.read(descriptor, 1 << 16)
        if not data:
            return True
        *lines, pending = (pending + data).split(b"\n")
        for raw in lines:
            line = raw.decode(errors="replace")
            if line.startswith(MARK):
                with contextlib.suppress(ValueError):
                    on_result(json.loads(line[len(MARK) :]))
            else:
                on_line(line)


def _end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    assert process.stdout is not None
    process.stdout.close()
