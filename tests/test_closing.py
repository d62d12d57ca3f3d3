"""However an engine is let go, its workers go with it; and it starts from anywhere, with the installed files."""

from __future__ import annotations

import contextlib
import gc
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import zmqexec
from tests.procs import roles, wait_for, wait_gone
from zmqexec import Engine, EngineClosed, SamplingParams

SLACK = 5
GONE_S = 1.0
SMALL: dict[str, Any] = {"kv_cache_memory_bytes": 16 << 20, "max_model_len": 64, "num_threads": 1}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
ENDLESS = SamplingParams(max_tokens=50, ignore_eos=True)

Record = Callable[[str, Any], None]


def workers() -> list[psutil.Process]:
    return [process for role, process in roles(psutil.Process()).items() if role.startswith("worker")]


def answer(engine: Engine) -> str:
    return engine.generate("12+30=", GREEDY, use_tqdm=False)[0].outputs[0].text


# ── in this process ─────────────────────────────────────────────────────────────────────────────────────────────────


def open_things() -> set[str]:
    """The threads and file descriptors of this process, each with what tells it from a later one of the same number.

    Other tests' fixtures live in it too, and close theirs when they like: compare with `-`.
    """
    gc.collect()
    found = {f"thread {thread.name} {thread.ident}" for thread in threading.enumerate()}
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            found.add(f"fd {fd.name} {fd.readlink()}")
    return found


def leave_the_block(engine: Engine) -> None:
    with engine:
        assert answer(engine) == "42"


def close_twice(engine: Engine) -> None:
    assert answer(engine) == "42"
    engine.close()
    engine.close()


def close_while_another_thread_generates(engine: Engine) -> None:
    errors: list[Exception] = []

    def generate() -> None:
        try:
            engine.generate(["The"] * 100, [ENDLESS] * 100, use_tqdm=False)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    wait_for(lambda: engine.stats.generation_tokens > 3, 60.0, "tokens")
    engine.close()
    thread.join(GONE_S * SLACK)
    assert [type(error) for error in errors] == [EngineClosed]


def test_closing_in_any_way_ends_the_workers_and_leaks_neither_descriptors_nor_threads(
    record_property: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    before: set[str] | None = None
    for close in (leave_the_block, close_twice, close_while_another_thread_generates):
        engine = Engine(tensor_parallel_size=2, **SMALL)
        group = workers()
        assert len(group) == 2
        start = time.monotonic()
        close(engine)
        wait_gone(group, GONE_S * SLACK)
        record_property(f"{close.__name__}_s", time.monotonic() - start)
        for call in (
            lambda engine=engine: engine.generate("1+1=", use_tqdm=False),
            lambda engine=engine: engine.add_request("a", "1+1="),
            lambda engine=engine: engine.step(),
        ):
            with pytest.raises(EngineClosed, match="the engine has been closed"):
                call()
        del engine
        # What the first engine of a process imports and keeps is no leak.
        before = before or open_things()
    assert before is not None and open_things() - before == set()
    assert "(rank" not in capsys.readouterr().err, "workers leave without a word"
    assert workers() == []


def test_an_error_in_the_block_closes_too() -> None:
    with pytest.raises(ZeroDivisionError), Engine(**SMALL) as engine:
        group = workers()
        assert len(group) == 1
        raise ZeroDivisionError
    wait_gone(group, GONE_S * SLACK)
    with pytest.raises(EngineClosed):
        engine.step()


def drop(engine_in: list[Engine]) -> None:
    del engine_in[:]


def drop_in_a_cycle(engine_in: list[Engine]) -> None:
    holder: dict[str, Any] = {"engine": engine_in.pop()}
    holder["self"] = holder
    del holder
    gc.collect()


@pytest.mark.parametrize("let_go", [drop, drop_in_a_cycle])
@pytest.mark.parametrize("has_open_requests", [False, True], ids=["idle", "with open requests"])
def test_the_workers_end_with_the_last_reference(
    record_property: Record, let_go: Callable[[list[Engine]], None], has_open_requests: bool
) -> None:
    engine_in = [Engine(**SMALL)]
    group = workers()
    assert len(group) == 1
    if has_open_requests:
        engine_in[0].add_request("open", "The", ENDLESS)
        engine_in[0].step()
    let_go(engine_in)
    record_property("gone_s", wait_gone(group, GONE_S * SLACK))


# ── in a program of its own ─────────────────────────────────────────────────────────────────────────────────────────

PRELUDE = f"""
import psutil, sys, threading
from zmqexec import Engine, SamplingParams
greedy = SamplingParams(temperature=0.0, max_tokens=8)
def ask(engine):
    return engine.generate("12+30=", greedy, use_tqdm=False)[0].outputs[0].text
def workers():
    return [child.pid for child in psutil.Process().children() if "_entry.py" in " ".join(child.cmdline())]
settings = {SMALL!r}
"""


def run(arguments: list[str], cwd: Path, stdin: str = "", timeout_s: float = 100.0) -> tuple[str, str, int]:
    """(stdout, stderr, exit code) of Python with these arguments."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=timeout_s
    )
    return done.stdout, done.stderr, done.returncode


def assert_gone(pids: str, record_property: Record) -> None:
    """`pids` as a program printed them."""
    group = []
    for pid in pids.strip("[]").split(","):
        try:
            process = psutil.Process(int(pid))
            if any("_entry.py" in word for word in process.cmdline()):  # and not a later process with the same id
                group.append(process)
        except psutil.NoSuchProcess:  # or a zombie, while nobody has reaped it yet
            continue
    record_property("gone_s", wait_gone(group, GONE_S * SLACK))


@pytest.mark.parametrize("how", ["by itself", "by an exception", "by os._exit"])
def test_a_program_without_guard_or_close_leaves_nothing_when_it_ends(
    tmp_path: Path, record_property: Record, how: str
) -> None:
    # Two engines at once, one of them made and used in a thread.
    end = {"by itself": "", "by an exception": "raise KeyError('oops')", "by os._exit": "import os; os._exit(3)"}[how]
    script = tmp_path / "script.py"
    script.write_text(f"""{PRELUDE}
first = Engine(**settings)
found = []
thread = threading.Thread(target=lambda: found.append(Engine(**settings)) or found.append(ask(found[0])))
thread.start()
thread.join()
print(ask(first), found[1], ask(found[0]), ask(first))
print(workers())
first.add_request("open", "The", SamplingParams(max_tokens=50, ignore_eos=True))
first.step()
sys.stdout.flush()
{end}
""")
    out, err, code = run([str(script)], tmp_path)
    answers, pids = out.splitlines()
    assert answers == "42 42 42 42" and pids.count(",") == 1, err
    assert code == {"by itself": 0, "by an exception": 1, "by os._exit": 3}[how]
    assert ("KeyError: 'oops'" in err) == (how == "by an exception") and "(rank" not in err
    assert_gone(pids, record_property)


def test_it_works_from_an_interactive_python(tmp_path: Path, record_property: Record) -> None:
    typed = "engine = Engine(**settings)\nprint(ask(engine))\nprint(workers())\nengine.nonsense\nprint(ask(engine))\n"
    (tmp_path / "prelude.py").write_text(PRELUDE)
    out, err, code = run(["-i", str(tmp_path / "prelude.py")], tmp_path, stdin=typed)
    first, pids, second = out.splitlines()
    assert (first, second, code) == ("42", "42", 0), err
    assert "nonsense" in err and "(rank" not in err
    assert_gone(pids, record_property)


def test_a_fork_of_the_users_process_does_not_end_its_engine(tmp_path: Path, record_property: Record) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""{PRELUDE}
import gc, os
engine = Engine(**settings)
for leave in ("exit", "close", "_exit", "exec"):
    print(ask(engine), flush=True)
    pid = os.fork()
    if pid == 0:
        if leave == "_exit":
            os._exit(0)
        if leave == "exec":
            os.execv(sys.executable, [sys.executable, "-c", ""])
        if leave == "close":
            engine.close()
            del engine
            gc.collect()
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    print(ask(engine), flush=True)
print(workers())
""")
    out, err, code = run([str(script)], tmp_path)
    *answers, pids = out.splitlines() or [""]
    assert answers == ["42"] * 8 and code == 0, err
    assert_gone(pids, record_property)


def hostile_folder(path: Path, *strays: str) -> Path:
    """A folder with an uncompiled copy of zmqexec, and modules that shall not be imported."""
    source = Path(zmqexec.__path__[0])
    shutil.copytree(source, path / "zmqexec", ignore=lambda folder, names: [
        name for name in names if not name.endswith(".py") and not (Path(folder) / name).is_dir()
    ])  # fmt: skip
    for name in strays:
        (path / f"{name}.py").write_text(f"raise SystemExit('a hostile {name} was imported')\n")
    return path


def test_neither_the_current_directory_nor_the_scripts_folder_is_imported_from(tmp_path: Path) -> None:
    hostile = hostile_folder(tmp_path / "hostile", "msgspec", "torch", "numpy", "zmq")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "torch.py").write_text("raise SystemExit('a stray torch was imported')\n")
    script = elsewhere / "script.py"
    script.write_text(f"{PRELUDE}\nprint(ask(Engine(**settings)))\n")
    assert run([str(script)], hostile)[:1] == ("42\n",)
    code = f"{PRELUDE}\nprint(ask(Engine(**settings)))\n"
    assert run(["-P", "-c", code], hostile)[:1] == ("42\n",)


def test_where_python_prefers_an_uncompiled_copy_the_error_says_what_to_do(tmp_path: Path) -> None:
    folder = hostile_folder(tmp_path)
    # An editable installation has an import hook of its own, which would find the compiled module all the same.
    unhook = "import sys; sys.meta_path = [hook for hook in sys.meta_path if 'editable' not in repr(hook).lower()]"
    _, err, code = run(["-c", f"{unhook}; import zmqexec; zmqexec.Engine"], folder)
    assert code == 1 and "ImportError" in err.splitlines()[-1]
    assert f"{folder / 'zmqexec'} is a source tree" in err
    assert "pip install -e ." in err and "leave that folder" in err  # `pip install .` would change nothing here
