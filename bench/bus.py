"""How fast is the bus, and what does it burn, beside everything else that one could pick?

    python bench/bus.py [--quick] [--only zmqexec,vllm,...] [--readers 1,2,4] [--label NAME]

A driver sends one step to N workers, each decodes it and replies with a struct of 64 bytes. Measured are round trips
back to back, paced like decode steps, and after two seconds of silence; the CPU time of all processes per round trip;
and what the group burns while nothing happens. See bus_peers/ for the transports; those that are not installed are left
out, and `pip install .[bench,bench-peers]` brings Ray and what draws the plot.

All transports are open at once and take turns, so that a slow minute of the machine hits all of them; whoever's turn it
is not is stopped by SIGSTOP and burns nothing. Driver and workers each get a core of their own, alike for all
transports, where there are enough cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import provenance
from bus_peers import bare, encoding, plan, plot, report
from bus_peers.hosts import Host, HostFailed, HostGroup
from bus_peers.peer import cores_apart, has_cpu_clocks
from bus_peers.registry import OURS, PEERS, Entry, with_policies
from bus_peers.rows import Row, make_row
from bus_peers.targets import Targets

RESULTS = Path(__file__).parent / "results"
OPEN_S = 150.0
STARTING_AT_ONCE = 3
PACKAGES = ("zmqexec", "msgspec", "pyzmq", "numpy", "torch", "ray", "vllm")
POLICIES = ("latency", "balanced", "eco")


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    peers, troubles = choose_peers(arguments.only, arguments.wait_policy)
    budget = (plan.quick if arguments.quick else plan.full)(arguments.readers)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bus-", ignore_cleanup_errors=True) as scratch:
        run = Run(peers, budget, Path(scratch), arguments.pin, troubles)
        for num_readers in budget.readers:
            run.measure(num_readers)
    encoded = encoding.measure()
    cores = len(os.sched_getaffinity(0))
    targets = Targets(run.rows, encoded, cores, run.pinned).found
    report.print_tables(peers, run.rows, troubles)
    report.print_encoding(encoded)
    report.print_targets(targets)
    result = {
        "question": "round trips of one step to N workers and their 64-byte replies, beside other transports",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "bench/bus.py", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine(),
        "versions": provenance.versions(PACKAGES),
        "plan": asdict(budget),
        "pinned_with_readers": sorted(run.pinned),
        "titles": {name: entry.title for name, entry in peers.items()},
        "not_measured": troubles,
        "targets": [asdict(target) for target in targets],
        "encoding": encoded,
        "results": run.rows,
    }
    RESULTS.mkdir(exist_ok=True)
    output = RESULTS / f"bus-{arguments.label}.json"
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{result['seconds']:.0f} s; {output}")
    title = f"{provenance.cpu_name()}, {cores} cores, {result['date'][:10]}"
    if not plot.draw(peers, run.rows, title, output.with_suffix(".svg")):
        print("no plot: matplotlib is not installed (`pip install matplotlib`)")
    if any(name.startswith(OURS) for name in troubles):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--quick", action="store_true", help="about a minute: fewer sizes, readers and repetitions")
    parser.add_argument("--only", type=names, help=f"of {', '.join(PEERS)}; the bare ones are the base of some targets")
    parser.add_argument("--readers", type=counts, help="default: 1,2,4 and where the cores allow 8; quick: 1,2")
    parser.add_argument(
        "--wait-policy", type=names, default=[], help="ours under these; the first is held to the targets"
    )
    parser.add_argument("--pin", action=argparse.BooleanOptionalAction, default=True, help="a core for each process")
    parser.add_argument("--label", default="local", help="of the files in bench/results")
    arguments = parser.parse_args()
    for policy in arguments.wait_policy:
        if policy not in POLICIES:
            parser.error(f"--wait-policy {policy}: choose from {', '.join(POLICIES)}")
    for name in arguments.only or []:
        if name not in PEERS:
            parser.error(f"--only {name}: choose from {', '.join(PEERS)}")
    if arguments.readers is None:
        arguments.readers = (1, 2) if arguments.quick else (1, 2, 4, 8) if cores > 8 else (1, 2, 4)
    if not all(1 <= count <= 8 for count in arguments.readers):
        parser.error(f"--readers {arguments.readers}: each from 1 to 8")
    return arguments


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def counts(text: str) -> tuple[int, ...]:
    return tuple(int(count) for count in names(text))


def choose_peers(only: list[str] | None, policies: list[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """What is measured, and what of it cannot be, with the reason."""
    wanted = {name: entry for name, entry in PEERS.items() if only is None or name in only}
    troubles = {name: reason for name, entry in wanted.items() if (reason := entry.missing()) is not None}
    return with_policies({name: entry for name, entry in wanted.items() if name not in troubles}, policies), troubles


class Run:
    """The measurements of all transports, and the rows that came of them."""

    def __init__(
        self, peers: dict[str, Entry], budget: plan.Plan, scratch: Path, pin: bool, troubles: dict[str, str]
    ) -> None:
        self._peers = peers
        self._plan = budget
        self._scratch = scratch
        self._pin = pin
        self._troubles = troubles
        self._cores = cores_apart()
        self._started = time.monotonic()
        self.pinned: set[int] = set()
        self.rows: list[Row] = []
        bare.build(scratch)
        paths = [str(Path(__file__).parent), str(scratch), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        os.environ["TMPDIR"] = str(scratch)  # where libraries put their sockets, which nobody removes after a kill
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")

    def measure(self, num_readers: int) -> None:
        """Open every transport with so many workers, and let them take turns."""
        answers: dict[tuple[str, plan.Cell], list[dict[str, Any]]] = defaultdict(list)
        with HostGroup() as group:
            self._open(group, num_readers)
            self._say(num_readers, f"{len(group.hosts)} transports are open")
            for repetition in range(self._plan.repetitions):
                names = list(group.hosts)
                # The order turns, so that none always follows the same other.
                for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
                    self._turn(group, name, num_readers, repetition, answers)
                self._say(num_readers, f"repetition {repetition + 1} of {self._plan.repetitions} is done")
        for (name, cell), found in answers.items():
            self.rows.append(make_row(name, num_readers, cell, found))

    def _say(self, num_readers: int, what: str) -> None:
        seconds = time.monotonic() - self._started
        print(f"{seconds:5.0f} s: {num_readers} reader(s), {what}, load {os.getloadavg()[0]:.1f}", flush=True)

    def _turn(
        self,
        group: HostGroup,
        name: str,
        num_readers: int,
        repetition: int,
        answers: dict[tuple[str, plan.Cell], list[dict[str, Any]]],
    ) -> None:
        host = group.hosts[name]
        host.go()
        time.sleep(self._peers[name].settle_s)
        try:
            for cell in self._plan.cells(self._peers[name], num_readers, repetition):
                answers[name, cell].append(host.ask(cell.command(num_readers), cell.deadline_s))
        except HostFailed as error:
            self._give_up(group, name, num_readers, str(error))
        else:
            group.stop(name)

    def _open(self, group: HostGroup, num_readers: int) -> None:
        has_cores = num_readers < len(self._cores)
        if has_cores and self._pin:
            self.pinned.add(num_readers)
        waiting = list(self._peers.items())
        opening: list[str] = []
        while waiting or opening:
            while waiting and len(opening) < STARTING_AT_ONCE:
                name, entry = waiting.pop(0)
                config = {
                    "target": entry.target,
                    "options": entry.options,
                    "num_readers": num_readers,
                    "max_bytes": max(self._plan.payloads),
                    "scratch": str(self._scratch),
                    "has_cores": has_cores,
                    "cores": self._cores[: num_readers + 1] if has_cores and self._pin else None,
                }
                group.hosts[name] = Host(name, config, self._scratch / f"{name}-{num_readers}.log")
                opening.append(name)
            name = opening.pop(0)
            try:
                answer = group.hosts[name].answer(OPEN_S)
            except HostFailed as error:
                self._give_up(group, name, num_readers, str(error))
                continue
            if "unsupported" in answer:
                self._give_up(group, name, num_readers, answer["unsupported"])
            else:
                group.stop(name)

    def _give_up(self, group: HostGroup, name: str, num_readers: int, reason: str) -> None:
        group.hosts.pop(name).close()
        self._troubles[f"{name} with {num_readers} reader(s)"] = reason
        print(f"{name} with {num_readers} reader(s): {reason}", flush=True)


def machine() -> dict[str, Any]:
    return {
        "cpu": provenance.cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release().partition("-")[0],
        "cpu_times": "exact" if has_cpu_clocks() else "ticks",
        "load_at_end": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    main()
