"""`zmqexec-top`: watch a running engine, live or once, without its noticing.

Runs in: a process of its own. It only reads: the engine's shared memory, mapped read-only, and /proc. Exit codes: 0 at
the end of what was asked; 1 where the engine ended before `--once` had seen it for its interval; 2 for a mistake.

`--json` prints one object a line; `report.py` describes its fields.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from typing import NoReturn

import msgspec

from zmqexec.bus.observer import Observer, Process, all_engines, ancestors_of, owner_of
from zmqexec.bus.statistics import Snapshot
from zmqexec.errors import ProtocolError, UserError, ZmqexecError
from zmqexec.top.report import Processes, Report, make_report
from zmqexec.top.screen import lines_of, list_of, reference_of
from zmqexec.version import __version__

FIRST_INTERVAL_S = 0.2
"""Before the first picture of a live display, so that it does not begin with an empty screen for long."""
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


def main() -> NoReturn:
    """The command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminal has to be left as it was then too
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads it any more, as after `| head`
        code = 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        code = 0
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Watch as the command line says; the exit code."""
    options = _parser().parse_args(argv)
    try:
        with _engines() as engines:
            if options.list:
                print_list(engines, options.json)
                return 0
            chosen = choose(options.engine, engines)
            for other in engines:
                if other is not chosen:
                    other.close()  # or its memory would outlive it for as long as we watch this one
            return watch(chosen, options)
    except ZmqexecError as error:
        print(f"zmqexec-top: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zmqexec-top",
        description="Watch a running zmqexec engine of yours: what each rank is doing, latencies of the bus, rates. "
        "It only reads shared memory, so the engine pays nothing. End with q or Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "engine",
        nargs="?",
        metavar="PID|NAME",
        help="pid of the engine's driver, server or worker, PID:FD as in --list, or its name; default: the only one",
    )
    parser.add_argument("--once", action="store_true", help="print one report over one interval, then end")
    parser.add_argument("--json", action="store_true", help="print objects, one a line, instead of text")
    parser.add_argument("--list", action="store_true", help="print the engines that could be watched, then end")
    parser.add_argument(
        "--interval", type=_interval, default=1.0, metavar="SECONDS", help="between two reports (default: 1)"
    )
    parser.add_argument("--version", action="version", version=f"zmqexec {__version__}")
    return parser


def _interval(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.01 <= float(text) <= 3600.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.01 to 3600")


@contextlib.contextmanager
def _engines() -> Iterator[list[Observer]]:
    engines = all_engines()
    try:
        yield engines
    finally:
        for engine in engines:
            engine.close()


def print_list(engines: list[Observer], as_json: bool) -> None:
    """The engines of this user."""
    if as_json:
        print(msgspec.json.encode([{"pid": one.pid, "fd": one.fd, "name": one.name} for one in engines]).decode())
    elif engines:
        print("\n".join(list_of(engines)))


# ── which engine ────────────────────────────────────────────────────────────────────────────────────────────────────


def choose(wanted: str | None, engines: list[Observer]) -> Observer:
    """The engine that is meant; `UserError` says why there is none, or which ones there are."""
    if wanted is None:
        if not engines:
            raise UserError(f"no engine of {_user(os.geteuid())} is running on this machine")
        found = engines
    else:
        found = [engine for engine in engines if _is_meant(wanted, engine, engines)]
        if not found:
            raise UserError(_why_none(wanted, engines))
    if len(found) == 1:
        return found[0]
    what = "there are several engines" if wanted is None else f"{wanted!r} means several engines"
    raise UserError("\n".join([f"{what}; name one of", *list_of(found)]))


def _is_meant(wanted: str, engine: Observer, engines: list[Observer]) -> bool:
    if wanted in (engine.name, reference_of(engine, engines)):
        return True
    if not wanted.isdecimal():
        return False
    pid = int(wanted)
    family = {engine.pid, *ancestors_of(engine.pid)}
    with contextlib.suppress(ProtocolError):  # a damaged page of an engine that may not be meant at all
        family.update(rank.status.pid for rank in engine.snapshot().ranks)
    return pid in family - {0}


def _why_none(wanted: str, engines: list[Observer]) -> str:
    known = "\n".join(["; yours are", *list_of(engines)]) if engines else ""
    if not wanted.partition(":")[0].isdecimal():
        return f"no engine of {_user(os.geteuid())} is called {wanted!r}{known}"
    pid = int(wanted.partition(":")[0])
    try:
        owner = owner_of(pid)
    except FileNotFoundError:
        return f"there is no process {pid}{known}"
    if owner != os.geteuid():
        return (
            f"process {pid} belongs to {_user(owner)}, and only they may watch its engine: "
            f"run zmqexec-top as {_user(owner)}"
        )
    return f"process {pid} is part of no open engine{known}"


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


# ── watching ────────────────────────────────────────────────────────────────────────────────────────────────────────


def watch(engine: Observer, options: argparse.Namespace) -> int:
    """Report on the engine until it ends, or is told to stop; the exit code."""
    on_terminal = sys.stdout.isatty() and not options.once and not options.json
    with _keys() if on_terminal and sys.stdin.isatty() else contextlib.nullcontext(()) as keys:
        before, was = _look(engine)
        interval_s = min(FIRST_INTERVAL_S, options.interval) if on_terminal else options.interval
        while True:
            if not _pause(engine, interval_s, keys):
                return 0
            interval_s = options.interval
            after, now = _look(engine)
            has_ended = engine.has_ended
            report = make_report(engine.pid, before, after, was, now, has_ended)
            if not (has_ended and options.once):
                _show(report, options, on_terminal)
            if has_ended:
                print(f"zmqexec-top: the engine {engine.name!r} (pid {engine.pid}) has ended", file=sys.stderr)
                return 1 if options.once else 0
            if options.once:
                return 0
            before, was = after, now


def _pause(engine: Observer, interval_s: float, keys: Sequence[int]) -> bool:
    """Wait for the next report, or for the engine's end; False if a key said that it is enough."""
    deadline = time.monotonic() + interval_s
    while (remaining_s := deadline - time.monotonic()) > 0 and not engine.has_ended:
        # In slices, since nothing wakes us when an engine is closed whose process goes on.
        for fd in engine.wait(min(remaining_s, 1.0), *keys):
            pressed = os.read(fd, 64)
            if not pressed or b"q" in pressed.lower():
                return False
    return True


def _show(report: Report, options: argparse.Namespace, on_terminal: bool) -> None:
    if options.json:
        print(msgspec.json.encode(report).decode(), flush=True)
        return
    lines = lines_of(report)
    if on_terminal:
        width, height = shutil.get_terminal_size()
        # A line that wraps, or a last one that scrolls, would leave rests of the picture before.
        picture = "".join(f"{line[: width - 1]}{CLEAR_LINE}\n" for line in lines[: height - 1])
        print(HOME + picture + CLEAR_BELOW, end="", flush=True)
    else:
        print("\n".join(lines), end="\n" if options.once else "\n\n", flush=True)


@contextlib.contextmanager
def _keys() -> Iterator[Sequence[int]]:
    """File descriptors to read single keys from, without an echo."""
    fd = sys.stdin.fileno()
    settings = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        print(HOME + CLEAR_BELOW, end="")
        yield (fd,)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, settings)


def _look(engine: Observer) -> tuple[Snapshot, Processes]:
    """The engine now, and its processes as far as they can be seen."""
    snapshot = engine.snapshot()
    seen = [Process.of(pid) for pid in (engine.pid, *(rank.status.pid for rank in snapshot.ranks))]
    # A pid that the driver is not the parent of is another's: the worker has ended, or has pids of its own world.
    return snapshot, {one.pid: one for one in seen if one and engine.pid in (one.pid, one.parent)}


if __name__ == "__main__":
    main()
