"""The programs that start an engine are not always tidy: closed streams, deleted folders, odd paths, no descriptors."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.procs import wait_for
from zmqexec import BusError, Engine, StartupError
from zmqexec.executor.spawn import Worker, WorkerGroup

TIMEOUT_S = 60.0

SYNC = """
from zmqexec import Engine, SamplingParams
with Engine(tensor_parallel_size=2) as engine:
    (output,) = engine.generate("12+30=", SamplingParams(max_tokens=8, temperature=0.0))
    text = output.outputs[0].text
"""
ASYNC = """
import asyncio
from zmqexec import AsyncEngine, SamplingParams
async def main():
    async with await AsyncEngine.start(tensor_parallel_size=2) as engine:
        async for output in engine.generate("12+30=", SamplingParams(max_tokens=8, temperature=0.0)):
            pass
    return output.outputs[0].text
text = asyncio.run(main())
"""
REPORT = """
with open({path!r}, "w") as report:
    report.write(text)
"""


def answer(script: str, folder: Path, before: str) -> str:
    """What the engine in `script` answered, after `sh` did `before`."""
    path = folder / "report"
    command = [sys.executable, "-c", script + REPORT.format(path=str(path))]
    subprocess.run(["sh", "-c", f'{before}; exec "$@"', "sh", *command], cwd=folder, timeout=TIMEOUT_S, check=True)
    return path.read_text()


@pytest.mark.parametrize("script", [SYNC, ASYNC], ids=["sync", "async"])
def test_a_program_without_standard_streams(script: str, tmp_path: Path) -> None:
    assert answer(script, tmp_path, "exec <&- >&- 2>&-") == "42"


def test_a_program_in_a_deleted_folder(tmp_path: Path) -> None:
    assert answer(SYNC, tmp_path, "mkdir gone && cd gone && rmdir ../gone") == "42"


def test_a_program_with_an_odd_import_path(tmp_path: Path) -> None:
    odd = "import sys, pathlib; sys.path[:0] = [pathlib.Path('x'), 'relative', '', '.', '/\\udcff']\n"
    assert answer(odd + SYNC, tmp_path, ":") == "42"


@pytest.fixture
def unlimited() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_running_out_of_file_descriptors_at_any_moment_of_the_start_is_an_error_and_leaves_nothing(
    unlimited: None,
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_files()
    num_refused = 0
    for spare in range(1, 40):
        # `before` counts the listing's own descriptor; those in use need not be the lowest ones.
        used = sorted(int(path.name) for path in Path("/proc/self/fd").iterdir())
        free = [number for number in range(used[-1] + 100) if number not in used]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare - 1] + 1, hard))
        try:
            Engine(tensor_parallel_size=2).close()
        except (StartupError, BusError) as error:
            assert "Too many open files" in str(error)
            num_refused += 1
        else:
            break
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            assert open_files() == before
            assert not [p for p in psutil.Process().children() if "_entry.py" in " ".join(p.cmdline())]
    assert 10 < num_refused < 39


def test_a_stderr_that_cannot_be_written_does_not_stop_the_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        read_end, write_end = os.pipe()
        os.write(write_end, b"last words\n")
        os.close(write_end)

        class Child:
            pid = 1

        worker = Worker(0, Child(), read_end)  # type: ignore[arg-type]
        assert worker.forward_output() and not worker.forward_output()
        assert worker.log_tail == "last words"
        os.close(read_end)


def test_a_group_may_be_closed_by_its_own_watcher() -> None:
    """The garbage collector runs in any thread, and closes the engine that it finds."""
    before, threads = open_files(), threading.active_count()
    buried = threading.Event()
    errors: list[object] = []

    def on_death() -> None:
        try:
            group.close()
        except BaseException as error:
            errors.append(error)
        buried.set()

    group = WorkerGroup(on_death)
    with Path(os.devnull).open("rb") as no_bus:
        group.spawn(0, {"rank": 0, "tp_size": 1, "epoch": 0, "collective_timeout_s": 1.0}, {"bus_fd": no_bus.fileno()})
        group.watch()
        assert buried.wait(TIMEOUT_S)
    assert not errors
    wait_for(lambda: threading.active_count() == threads, TIMEOUT_S, "the end of the group's threads")
    assert open_files() == before
