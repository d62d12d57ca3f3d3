"""`zmqexec-top` beside a real engine: what it says is so, and the engine does not notice."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from tests.procs import is_stopped, roles, wait_for, wait_gone
from zmqexec import Engine, SamplingParams
from zmqexec.bus.channel import DriverChannel
from zmqexec.bus.observer import Observer, engines_of
from zmqexec.bus.status import Phase
from zmqexec.errors import UserError
from zmqexec.top import cli
from zmqexec.top.report import Report
from zmqexec.top.screen import printable

DEADLINE_S = 60.0
NOBODY = 65534
PARAMS = SamplingParams(max_tokens=32, ignore_eos=True, temperature=0.0)
VICTIM = Path(__file__).parent / "victims" / "engine_process.py"
COMMAND = [sys.executable, "-m", "zmqexec.top.cli"]


def top(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=DEADLINE_S)


def report(*arguments: object) -> Report:
    done = top(*arguments, "--once", "--json", "--interval", 0.3)
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=Report)


def busy_report(reference: object) -> Report:
    """One over an interval in which steps came back and both ranks took some."""

    def tried() -> Report | None:
        one = report(reference)
        return one if one.rates.steps_per_s > 0 and all(rank.pickup.count for rank in one.ranks) else None

    found = wait_for(tried, DEADLINE_S, "a busy interval")
    assert found is not None
    return found


class Live:
    """A `zmqexec-top` that goes on; its lines as they come."""

    def __init__(self, *arguments: object) -> None:
        self.popen = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline()

    def end(self) -> tuple[int, str]:
        """Exit code and what it said on stderr."""
        _, said = self.popen.communicate(timeout=DEADLINE_S)
        return self.popen.returncode, said

    def close(self) -> None:
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture(scope="module")
def name() -> str:
    """An engine name that no other test on this machine uses at the same time."""
    return f"watched-{uuid.uuid4()}"


@pytest.fixture(scope="module")
def engine(name: str) -> Iterator[Engine]:
    """In this process, which is its driver."""
    with Engine(tensor_parallel_size=2, name=name) as engine:
        yield engine


class Busy:
    """Keeps an engine generating, from a thread, until the block ends."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._engine.generate(["12+30=", "1+1="], PARAMS, use_tqdm=False)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


class Victim:
    """An engine in a process of its own, ready."""

    def __init__(self, kind: str, **settings: Any) -> None:
        command = [sys.executable, str(VICTIM), kind, json.dumps(settings)]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.popen.stdout is not None
        assert json.loads(self.popen.stdout.readline()) == {"ready": True}
        self.process = psutil.Process(self.popen.pid)
        self.roles = roles(self.process)

    def close(self) -> None:
        self.popen.kill()
        self.popen.communicate(timeout=DEADLINE_S)
        wait_gone(self.roles.values(), DEADLINE_S)


# ── what it says ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_report_of_a_busy_engine_says_what_is_so(engine: Engine, name: str) -> None:
    with Busy(engine):
        first = busy_report(os.getpid())
        second = busy_report(os.getpid())
    processes = roles(psutil.Process())
    for one in (first, second):
        assert one.name == name and one.driver.pid == os.getpid() and not one.has_ended
        assert one.stats["num_blocks"] == engine.info.num_blocks and one.interval_s >= 0.3
        assert [rank.rank for rank in one.ranks] == [0, 1]
        assert one.driver.cpu_share is not None and one.driver.state in ("running", "sleeping", "in the kernel")
        for rank in one.ranks:
            assert rank.pid == processes[f"worker {rank.rank}"].pid
            assert rank.phase in Phase.__members__ and rank.last_error == "" and rank.phase_s >= 0
            assert rank.uptime_s is not None and 0 < rank.uptime_s < one.uptime_s
            assert rank.cpu_share is not None and rank.cpu_share >= 0
            assert 0 <= rank.lag <= 2 and 0 <= rank.ring_occupancy <= 1
            assert 0 < rank.pickup.p50_s <= rank.pickup.p99_s
        assert one.ranks[0].reply.count > 0 and one.ranks[0].reply.p50_s > 0
        assert (one.ranks[1].reply.count, one.ranks[1].reply.p50_s) == (0, None), "rank 1 answers no steps"
    assert second.stats["steps"] > first.stats["steps"] and second.uptime_s > first.uptime_s
    assert second.stats["generation_tokens"] > first.stats["generation_tokens"]
    assert second.driver.published > first.driver.published
    assert second.driver.published_bytes > first.driver.published_bytes
    for before, after in zip(first.ranks, second.ranks, strict=True):
        assert after.received > before.received and after.step > before.step
        assert after.waits.spun >= before.waits.spun and after.waits.parked >= before.waits.parked
        assert after.waits.spun_s >= before.waits.spun_s and after.waits.parked_s >= before.waits.parked_s


def test_every_step_and_token_is_counted_once(engine: Engine) -> None:
    before = report(os.getpid())
    engine.generate(["12+30=", "1+1="], PARAMS, use_tqdm=False)
    after = report(os.getpid())
    assert after.stats == msgspec.structs.asdict(engine.stats)
    assert after.stats["generation_tokens"] - before.stats["generation_tokens"] == 2 * 32
    steps = after.stats["steps"] - before.stats["steps"]
    assert steps >= 32
    assert after.driver.published - before.driver.published == steps
    for rank in (0, 1):
        assert after.ranks[rank].received - before.ranks[rank].received == steps
        assert after.ranks[rank].step == after.stats["steps"] - 1 and after.ranks[rank].lag == 0
    assert after.ranks[0].replied - before.ranks[0].replied == steps
    assert after.ranks[0].waits.spun_share is None and after.rates.steps_per_s == 0, "nothing happened meanwhile"
    assert after.ranks[0].phase == "IDLE" and after.stats["num_running"] == 0


def test_text_has_a_line_for_each_rank_and_the_same_figures(engine: Engine, name: str) -> None:
    engine.generate("12+30=", PARAMS, use_tqdm=False)
    done = top(name, "--once", "--interval", 0.1)
    assert done.returncode == 0 and done.stderr == ""
    head, *lines = done.stdout.splitlines()
    assert head.startswith(f"{name}   pid {os.getpid()}   up 0:") and "2 workers" in head
    table = lines[lines.index("") + 1 :]
    assert table[0].split()[:4] == ["rank", "pid", "up", "state"]
    processes = roles(psutil.Process())
    for rank, row in enumerate(table[1:]):
        assert row.split()[:2] == [str(rank), str(processes[f"worker {rank}"].pid)]
        assert " IDLE " in row and f" {engine.stats.steps - 1} " in row
    assert len(table) == 3


def test_a_stopped_worker_is_shown_as_stopped(engine: Engine) -> None:
    worker = roles(psutil.Process())["worker 1"]
    worker.suspend()
    try:
        wait_for(lambda: is_stopped(worker.pid), 10.0, "a stopped worker")
        assert [rank.state for rank in report(os.getpid()).ranks] == ["sleeping", "stopped"]
    finally:
        worker.resume()


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    assert printable("a\x1b[2Jb\nc") == "a\ufffd[2Jb\ufffdc" and printable("ü€") == "ü€"


# ── the engine does not notice ──────────────────────────────────────────────────────────────────────────────────────


def test_watching_changes_nothing(engine: Engine, stack: ExitStack) -> None:
    """Not a byte of the shared memory, no file descriptor or mapping, and no process of the engine wakes up."""
    engine.generate("12+30=", PARAMS, use_tqdm=False)
    (observer,) = engines_of(os.getpid())
    stack.callback(observer.close)
    family = roles(psutil.Process())

    def switches() -> list[int]:
        return [family[role].num_ctx_switches().voluntary for role in sorted(family)]

    def seen() -> tuple[object, ...]:
        fds = {role: process.num_fds() for role, process in family.items()}
        maps = {role: len(process.memory_maps(grouped=False)) for role, process in family.items()}
        return os.pread(observer.fd, 1 << 16, 0), fds, maps, switches()

    wait_for(lambda: [rank.status.phase for rank in observer.snapshot().ranks] == [Phase.IDLE] * 2, 10.0, "idle")
    before = seen()
    live = Live(os.getpid(), "--json", "--interval", 0.02)
    stack.callback(live.close)
    for _ in range(20):
        assert live.line()
    assert seen() == before


def test_the_shared_memory_is_mapped_read_only_and_its_rings_not_at_all(
    engine: Engine, stack: ExitStack, name: str
) -> None:
    stack.enter_context(DriverChannel.create(64, epoch=0, name=f"other-{uuid.uuid4()}"))  # of which nothing is kept
    live = Live(name, "--json", "--interval", 0.05)
    stack.callback(live.close)
    assert live.line()
    lines = Path(f"/proc/{live.popen.pid}/maps").read_text().splitlines()
    maps = [line.split() for line in lines if "zmqexec-bus" in line]
    assert maps and {fields[1] for fields in maps} == {"r--s"}
    mapped = sum(int(end, 16) - int(begin, 16) for begin, end in (fields[0].split("-") for fields in maps))
    assert mapped < 1 << 16
    assert not [fd for fd in Path(f"/proc/{live.popen.pid}/fd").iterdir() if "zmqexec-bus" in str(fd.readlink())]


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_engine_that_closes_ends_the_display_with_a_word(stack: ExitStack) -> None:
    name = f"closing-{uuid.uuid4()}"
    with Engine(name=name) as engine:
        engine.generate("12+30=", PARAMS, use_tqdm=False)
        live = Live(name, "--json", "--interval", 0.05)
        stack.callback(live.close)
        assert json.loads(live.line())["has_ended"] is False
    code, said = live.end()
    assert (code, said) == (0, f"zmqexec-top: the engine {name!r} (pid {os.getpid()}) has ended\n")


def test_an_engine_that_is_killed_ends_it_too_and_nothing_keeps_its_memory(stack: ExitStack) -> None:
    victim = Victim("sync", tensor_parallel_size=2, name="killed")
    stack.callback(victim.close)
    live = Live(victim.popen.pid, "--json", "--interval", 0.05)
    once = Live(victim.popen.pid, "--once", "--interval", 3600)
    for one in (live, once):
        stack.callback(one.close)
    assert live.line()
    wait_for(lambda: "zmqexec-bus" in Path(f"/proc/{once.popen.pid}/maps").read_text(), 10.0, "both to watch")
    victim.popen.kill()
    assert live.end() == (0, f"zmqexec-top: the engine 'killed' (pid {victim.popen.pid}) has ended\n")
    assert once.end()[0] == 1
    wait_gone(victim.roles.values(), DEADLINE_S)


def test_a_reader_that_goes_away_ends_it_without_a_word(engine: Engine, stack: ExitStack) -> None:
    live = Live(os.getpid(), "--json", "--interval", 0.02)
    stack.callback(live.close)
    assert live.line() and live.popen.stdout is not None
    live.popen.stdout.close()
    assert live.popen.wait(DEADLINE_S) == 0
    assert live.popen.stderr is not None and live.popen.stderr.read() == ""


@pytest.mark.parametrize("how", ["q", "Ctrl-C", "SIGTERM"])
def test_on_a_terminal_it_draws_until_q_or_ctrl_c_and_leaves_the_terminal_as_it_was(
    engine: Engine, stack: ExitStack, name: str, how: str
) -> None:
    master, slave = pty.openpty()
    stack.callback(os.close, master)
    stack.callback(os.close, slave)
    settings = termios.tcgetattr(slave)
    process = subprocess.Popen(
        [*COMMAND, str(os.getpid()), "--interval", "0.05"], stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True, preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
    )  # fmt: skip
    stack.callback(process.wait, 10)
    stack.callback(process.kill)
    drawn = ""

    def draw() -> bool:
        nonlocal drawn
        if select.select([master], [], [], 0.1)[0]:
            drawn += os.read(master, 65536).decode()
        return drawn.count("\x1b[H") >= 4

    wait_for(draw, DEADLINE_S, "four pictures")
    assert name in drawn and "\x1b[J" in drawn
    assert termios.tcgetattr(slave) != settings, "keys are read one by one"
    if how == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        os.write(master, b"q" if how == "q" else b"\x03")
    wait_for(lambda: draw() and process.poll() is not None, DEADLINE_S, "its end")
    assert process.returncode == 0 and "Traceback" not in drawn
    assert termios.tcgetattr(slave) == settings


# ── which engine ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_engine_is_found_by_any_of_its_processes_and_by_name(stack: ExitStack) -> None:
    name = f"served-{uuid.uuid4()}"
    victim = Victim("async", tensor_parallel_size=2, name=name)
    stack.callback(victim.close)
    driver = victim.roles["driver"].pid
    for reference in (name, victim.popen.pid, driver, victim.roles["worker 0"].pid, victim.roles["worker 1"].pid):
        found = report(reference)
        assert (found.name, found.driver.pid) == (name, driver), reference
    listed = json.loads(top("--list", "--json").stdout)
    assert name in [one["name"] for one in listed if one["pid"] == driver]
    assert re.search(rf"^ *{driver} +{name}$", top("--list").stdout, re.MULTILINE)


@pytest.fixture
def observers(stack: ExitStack) -> list[Observer]:
    """Of three engines in this process, two of one name."""
    drivers = [stack.enter_context(DriverChannel.create(1, epoch=0, name=name)) for name in ("one", "two", "two")]
    fds = [driver.fd for driver in drivers]
    found = []
    for observer in engines_of(os.getpid()):
        stack.callback(observer.close)
        if observer.fd in fds:
            found.append(observer)
    return found


def test_without_an_argument_it_is_the_only_engine(observers: list[Observer]) -> None:
    assert cli.choose(None, observers[:1]) is observers[0]
    with pytest.raises(UserError, match=r"no engine of user \w+ is running on this machine"):
        cli.choose(None, [])
    with pytest.raises(UserError) as caught:
        cli.choose(None, observers)
    first, *listed = str(caught.value).splitlines()
    assert first == "there are several engines; name one of"
    assert listed == [f"{os.getpid()}:{one.fd}  {one.name}" for one in observers]


def test_a_name_or_pid_that_means_several_engines_is_refused_with_their_list(observers: list[Observer]) -> None:
    assert cli.choose("one", observers) is observers[0]
    for wanted, count in (("two", 2), (str(os.getpid()), 3)):
        with pytest.raises(UserError, match=f"'{wanted}' means several engines") as caught:
            cli.choose(wanted, observers)
        assert len(str(caught.value).splitlines()) == 1 + count
    for observer in observers:
        assert cli.choose(f"{os.getpid()}:{observer.fd}", observers) is observer


def test_what_is_no_engine_is_named_with_those_that_are(observers: list[Observer]) -> None:
    with pytest.raises(UserError, match=r"no engine of user \w+ is called 'three'; yours are\n\d+:\d+  one\n"):
        cli.choose("three", observers)
    with pytest.raises(UserError, match=r"there is no process 4194309$"):
        cli.choose("4194309", [])
    with subprocess.Popen(["sleep", "60"]) as idle:
        try:
            with pytest.raises(UserError, match=f"process {idle.pid} is part of no open engine"):
                cli.choose(str(idle.pid), observers)
        finally:
            idle.kill()


AS_ANOTHER_USER = """if True:
    import locale, os, sys  # locale: for argparse, which could not find it afterwards
    from zmqexec.top import cli
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    print(cli.run(["--list"]))
    sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_engine_is_refused_and_not_listed(engine: Engine, name: str) -> None:
    worker = roles(psutil.Process())["worker 1"].pid
    for reference in (os.getpid(), worker):
        done = subprocess.run(
            [sys.executable, "-c", AS_ANOTHER_USER, str(reference)], capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert done.returncode == 2 and done.stderr == (
            f"zmqexec-top: error: process {reference} belongs to user root, and only they may watch its engine: "
            "run zmqexec-top as user root\n"
        )
        assert done.stdout == "0\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_root_does_not_watch_another_users_process_either() -> None:
    with subprocess.Popen(["sleep", "60"], user=NOBODY) as other:
        try:
            wait_for(lambda: Path(f"/proc/{other.pid}").stat().st_uid == NOBODY, 10.0, "another user")
            done = top(other.pid, "--once")
        finally:
            other.kill()
    assert done.returncode == 2 and f"process {other.pid} belongs to user nobody" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--interval", "0"], "'0' is no number of seconds from 0.01 to 3600"),
        (["--interval", "nan"], "'nan' is no number"),
        (["--onec"], "--onec"),
    ],
)
def test_a_wrong_flag_is_refused(arguments: list[str], words: str) -> None:
    done = top(*arguments)
    assert done.returncode == 2 and done.stdout == "" and words in done.stderr


def test_it_needs_neither_torch_nor_zmq_servers_to_start() -> None:
    code = "import sys, zmqexec.top.cli; print([m for m in ('torch', 'starlette', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
