"""The process that holds the driver's end of one transport: `python -m bus_peers.host CONFIG`.

Reads one command per line from its standard input and writes one answer per line to its standard output, both JSON:
what to measure, and the samples. Runs in: driver.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bus_peers.messages import make_steps
from bus_peers.peer import Peer, Setup, Unsupported, cpu_ns, die_with_parent, pin, process_tree

WARM_UP = 0.15  # of a measurement's time, before it
WARM_UP_STEPS = 3
PACED_WARM_UP_STEPS = 10  # enough for a wait that learns when messages come
MAX_PACED_S = 60.0

clock = time.perf_counter_ns


def main() -> None:
    config = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    die_with_parent()
    gc.disable()  # a collection of ours would be counted as theirs
    try:
        host = Host(config)
    except Unsupported as reason:
        print(json.dumps({"unsupported": str(reason)}), file=answers)
        return
    print(json.dumps({"pids": len(host.group)}), file=answers)
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        try:
            answer = getattr(host, command.pop("do"))(**command)
        except Unsupported as reason:
            answer = {"unsupported": str(reason)}
        print(json.dumps(answer), file=answers)
    host.peer.close()
    answers.flush()
    os._exit(0)  # without waiting for threads of libraries


class Host:
    """One transport, opened, with its processes in their places; each public method is a measurement."""

    def __init__(self, config: dict[str, Any]) -> None:
        module, _, name = config["target"].partition(":")
        self.num_readers: int = config["num_readers"]
        setup = Setup(
            self.num_readers, config["max_bytes"], Path(config["scratch"]), config["options"], config["has_cores"]
        )
        self.peer: Peer = getattr(importlib.import_module(module), name)(setup)
        self._warm_up(4096, self.num_readers, 20)
        self.group = process_tree(os.getpid())
        # Only now: threads start where their starter runs, and what looks for cores at its start finds all of them.
        if config["cores"]:
            for pid, core in zip([os.getpid(), *self.peer.pids], config["cores"], strict=True):
                pin(pid, core)

    def back_to_back(
        self, num_bytes: int, num_replies: int, budget_s: float, min_samples: int, max_samples: int
    ) -> dict[str, Any]:
        """One message after the other, as fast as it goes."""
        self.peer.check(self.num_readers, num_replies)
        ping = getattr(self.peer, "ping", None)
        if ping is not None:
            ping(num_bytes, num_replies, max_samples, 0.0, budget_s * WARM_UP)
            before = self._cpu_ns()
            samples = list(ping(num_bytes, num_replies, max_samples, 0.0, budget_s))
        else:
            steps = self._steps(num_bytes, num_replies)
            self._run(steps, num_replies, budget_s * WARM_UP, WARM_UP_STEPS, max_samples)
            before = self._cpu_ns()
            samples = self._run(steps, num_replies, budget_s, min_samples, max_samples)
        answer = {"samples_ns": samples, **self._cpu_since(before)}
        if num_replies < self.num_readers:
            self._warm_up(4096, self.num_readers, 1)  # nobody is left behind
        return answer

    def paced(self, num_bytes: int, num_replies: int, period_s: float, count: int) -> dict[str, Any]:
        """A message every `period_s`, between which the driver sleeps."""
        self.peer.check(self.num_readers, num_replies)
        ping = getattr(self.peer, "ping", None)
        if ping is not None:
            ping(num_bytes, num_replies, PACED_WARM_UP_STEPS, period_s, MAX_PACED_S)
            before, started = self._cpu_ns(), clock()
            samples = list(ping(num_bytes, num_replies, count, period_s, MAX_PACED_S))
        else:
            steps = self._steps(num_bytes, num_replies)
            self._run_paced(steps, num_replies, period_s, PACED_WARM_UP_STEPS)
            before, started = self._cpu_ns(), clock()
            samples = self._run_paced(steps, num_replies, period_s, count)
        return {"samples_ns": samples, "wall_ns": clock() - started, **self._cpu_since(before)}

    def silence(self, num_bytes: int, num_replies: int, count: int) -> dict[str, Any]:
        """What the group burns in the first and in the second second after a message, and the message after that."""
        self.peer.check(self.num_readers, num_replies)
        ping = getattr(self.peer, "ping", None)
        steps = self._steps(num_bytes, num_replies)
        self._warm_up(num_bytes, num_replies, PACED_WARM_UP_STEPS)
        samples = []
        windows: list[list[dict[str, Any]]] = [[], []]
        for _ in range(count):
            for window in windows:
                before, started = self._cpu_ns(), clock()
                time.sleep(1.0)
                window.append({"wall_ns": clock() - started, **self._cpu_since(before)})
            if ping is not None:
                samples.extend(ping(num_bytes, num_replies, 1, 0.0, 0.0))
            else:
                samples.extend(self._run(steps, num_replies, 0.0, 1, 1))
        return {"samples_ns": samples, "windows": windows}

    def _steps(self, num_bytes: int, num_replies: int) -> list[Any]:
        steps = make_steps(num_bytes, num_replies)
        prepare = getattr(self.peer, "prepare", None)
        return steps if prepare is None else prepare(steps)

    def _warm_up(self, num_bytes: int, num_replies: int, count: int) -> None:
        for step in self._steps(num_bytes, num_replies)[:count]:
            self.peer.round_trip(step, num_replies)

    def _run(
        self, steps: list[Any], num_replies: int, budget_s: float, min_samples: int, max_samples: int
    ) -> list[int]:
        round_trip, verify = self.peer.round_trip, self._verify
        samples: list[int] = []
        end = clock() + int(budget_s * 1e9)
        for step in itertools.cycle(steps):
            started = clock()
            reply = round_trip(step, num_replies)
            ended = clock()
            samples.append(ended - started)
            verify(step, reply)
            if len(samples) >= max_samples or (ended > end and len(samples) >= min_samples):
                return samples
        raise AssertionError("no steps")

    def _run_paced(self, steps: list[Any], num_replies: int, period_s: float, count: int) -> list[int]:
        round_trip, verify = self.peer.round_trip, self._verify
        samples: list[int] = []
        period_ns = int(period_s * 1e9)
        due = clock()
        for step in itertools.islice(itertools.cycle(steps), count):
            due += period_ns
            time.sleep(max(0, due - clock()) / 1e9)
            started = clock()
            reply = round_trip(step, num_replies)
            samples.append(clock() - started)
            verify(step, reply)
        return samples

    def _verify(self, step: Any, reply: Any) -> None:
        verify = getattr(self.peer, "verify", None)
        if verify is not None:
            verify(step, reply)
        elif reply.step_id != step.step_id:
            raise AssertionError(f"the reply to step {reply.step_id} came after step {step.step_id}")

    def _cpu_ns(self) -> list[int]:
        return [cpu_ns(pid) for pid in self.group]

    def _cpu_since(self, before: list[int]) -> dict[str, Any]:
        """CPU time of the whole group, libraries' own processes included, and of each worker."""
        now = self._cpu_ns()
        # Who has ended meanwhile counts as nothing, not as less than nothing.
        spent = {pid: max(0, now[index] - before[index]) for index, pid in enumerate(self.group)}
        return {"cpu_ns": sum(spent.values()), "worker_cpu_ns": [spent.get(pid, 0) for pid in self.peer.pids]}


if __name__ == "__main__":
    main()
