"""Everything that is to be known about a machine with GPUs, in one go and within a budget.

    python bench/gpu.py [--only kernels,latency] [--budget-s 540] [--out FOLDER] [--label h100]

    kernels     check(device) and measure(device) of every bench/gpu_kernels/*.py, each module in a process of its own
    latency     latency.py, ours alone, for every tensor-parallel size that the machine has
    driver      driver_cost.py, with the workers' host time
    peers       latency.py, vLLM and transformers on the same cases
    profile     latency.py --profile: how busy the device is in a decode step, and with what
    load        load.py: the weights of a checkpoint on disk, to the first GPU
    throughput  throughput.py, all ways

The parts run in this order. Each is a process that may crash, hang, or run into the end of the budget without taking
another's results along: the one file, gpu-LABEL.json, is rewritten after every result. At the end, also after SIGTERM,
a table of at most 100 lines. On a machine without GPUs everything runs on the CPU, which is good for trying it out:
`--geometry tiny --cases 2x8x4`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import provenance
from geometries import GEOMETRIES
from serving import report
from serving.cases import Case
from serving.children import run_child
from serving.kernel_runs import kernel_modules, new_entry, run_module, say
from serving.kernel_runs import table as kernel_table
from serving.setting import WAYS
from serving.tally import PACKAGES

from zmqexec.driver.gpus import num_visible_gpus, torch_cuda_version

BENCH = Path(__file__).parent
PARTS = ("kernels", "latency", "driver", "peers", "profile", "load", "throughput")
CASES = ["1x5x1000", "8x128x256", "32x512x256", "128x512x128"]
PROFILE_CASES = ["1x128x96", "32x512x96"]
THROUGHPUT_CASES = ["256x512x128"]
LOADING_SHARE = 0.5
"""Of the part's time, after which load.py begins no further repetition."""
MAX_LINES = 100
KERNEL_LINES = 46
RESERVE_S = 10.0
"""Of the budget, for the end: to stop what runs, and to print."""
CHILD_GRACE_S = 12.0
"""Longer than a child takes to end its own children."""


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        whole = Whole(arguments, Path(scratch))
        try:
            for part in PARTS:
                if part in arguments.only:
                    getattr(whole, part)()
        finally:
            whole.flush()
            print("\n" + "\n".join(whole.table()), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpus = num_visible_gpus() > 0 and torch_cuda_version() is not None
    sizes = [size for size in (1, 2, 4, 8) if size <= num_visible_gpus()] if has_gpus else [1]
    parser.add_argument("--only", type=parts, default=list(PARTS), help=f"of {', '.join(PARTS)}; with commas")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds for everything")
    parser.add_argument(
        "--geometry", nargs="+", choices=list(GEOMETRIES), default=["llama-2-7b" if has_gpus else "tiny"]
    )
    parser.add_argument("--tp", type=int, nargs="+", default=sizes, help="default: all that the machine has")
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=[Case.parse(case) for case in CASES])
    parser.add_argument("--profile-cases", type=Case.parse, nargs="+", default=[Case.parse(c) for c in PROFILE_CASES])
    parser.add_argument(
        "--throughput-cases", type=Case.parse, nargs="+", default=[Case.parse(case) for case in THROUGHPUT_CASES]
    )
    parser.add_argument("--kernels", nargs="+", help="modules of bench/gpu_kernels; default: all")
    parser.add_argument("--kernel-timeout-s", type=float, default=150.0, help="for each module")
    parser.add_argument("--part-timeout-s", type=float, default=300.0, help="for each process of the other parts")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--run-ahead", type=int, nargs="+", default=[1])
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--peer-python", help="interpreter that has the peers installed; default: this one")
    parser.add_argument("--label", default="local", help="of the file in --out")
    parser.add_argument("--out", type=Path, default=BENCH / "results", help="folder for the JSON")
    return parser.parse_args()


def parts(text: str) -> list[str]:
    """Names with commas between them."""
    found = [name.strip() for name in text.replace("|", ",").split(",") if name.strip()]
    for name in found:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name!r}: choose from {', '.join(PARTS)}")
    return found


class Whole:
    """The parts, and `result`, what the file holds.

    kernels  a dict for each module: checks, measures, seconds, and `why` it did not end well
    runs     a dict for each process of the other parts: what it wrote, seconds, and `why`
    """

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self._arguments = arguments
        self._scratch = scratch
        self._begin = time.monotonic()
        self._path: Path = arguments.out / f"gpu-{arguments.label}.json"
        self.result: dict[str, Any] = {
            "question": "kernels and the whole engine on this machine",
            "date": provenance.now(),
            "command": provenance.command("bench/gpu.py"),
            "machine": provenance.machine(),
            "versions": provenance.versions(PACKAGES),
            "seconds": 0.0,
            "kernels": [],
            "runs": [],
        }
        self.flush()

    @property
    def left_s(self) -> float:
        """Seconds that a process may still take."""
        return self._arguments.budget_s - RESERVE_S - (time.monotonic() - self._begin)

    def flush(self) -> None:
        """Write the file."""
        self.result["seconds"] = round(time.monotonic() - self._begin, 1)
        provenance.write_json(self._path, self.result)

    # ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def kernels(self) -> None:
        """Every module of bench/gpu_kernels by itself."""
        for name in kernel_modules(self._arguments.kernels):
            entry = new_entry(name)
            self.result["kernels"].append(entry)
            with self._timed(entry, f"kernels {name}"):
                if self.left_s <= 0:
                    entry["why"] = "the budget was spent"
                else:
                    run_module(entry, min(self._arguments.kernel_timeout_s, self.left_s), self.flush)

    def latency(self) -> None:
        """Ours, a process for each geometry and tp."""
        for geometry in self._arguments.geometry:
            for tp in self._arguments.tp:
                self._cases("latency", geometry, [tp], self._arguments.cases, ["--ways", "zmqexec"])

    def peers(self) -> None:
        """vLLM and transformers on the cases of `latency`."""
        for geometry in self._arguments.geometry:
            for tp in self._arguments.tp:
                ways = ["vllm", "transformers"] if tp == 1 else ["vllm"]  # transformers has no tp
                self._cases("latency", geometry, [tp], self._arguments.cases, ["--ways", *ways])

    def profile(self) -> None:
        """What a decode step consists of, with and without run-ahead."""
        for geometry in self._arguments.geometry:
            for tp in self._arguments.tp:
                options = ["--ways", "--profile", "--run-ahead", "0", "1"]
                self._cases("latency", geometry, [tp], self._arguments.profile_cases, options)

    def throughput(self) -> None:
        """Whole calls, ours and the peers'."""
        for geometry in self._arguments.geometry:
            for tp in self._arguments.tp:
                ways = WAYS if tp == 1 else [way for way in WAYS if way != "transformers"]
                self._cases("throughput", geometry, [tp], self._arguments.throughput_cases, ["--ways", *ways])

    def driver(self) -> None:
        """What a step costs on the host."""
        geometry, tps = self._arguments.geometry[0], map(str, self._arguments.tp)
        self._run("driver", "driver-cost", ["driver_cost.py", "--geometry", geometry, "--tp", *tps])

    def load(self) -> None:
        """Weights from a checkpoint in a temporary folder."""
        budget_s = str(max(0.0, min(self._arguments.part_timeout_s, self.left_s) * LOADING_SHARE))
        self._run("load", "load", ["load.py", "--geometry", self._arguments.geometry[0], "--budget-s", budget_s])

    def _cases(self, script: str, geometry: str, tps: list[int], cases: list[Case], options: list[str]) -> None:
        own = self._arguments
        command = [f"{script}.py", "--geometry", geometry, "--tp", *map(str, tps), "--cases", *map(str, cases)]
        command += ["--repetitions", str(own.repetitions), "--run-ahead", *map(str, own.run_ahead), *options]
        command += ["--no-cuda-graphs"] if own.no_cuda_graphs else []
        command += ["--peer-python", own.peer_python] if own.peer_python else []
        # Measured once: it costs the import of torch.
        measured = [run["result"]["copy_bandwidth"] for run in self._with_cases() if run["result"]["copy_bandwidth"]]
        command += ["--copy-tb-per-s", str(measured[0]["bytes_per_s"] / 1e12)] if measured else []
        budget_s = min(own.part_timeout_s, self.left_s)
        self._run(
            f"{script} {geometry} tp={tps[0]} {' '.join(options)}", script, [*command, "--budget-s", str(budget_s)]
        )

    def _run(self, name: str, prefix: str, command: list[str]) -> None:
        """A script as a process. What it has written is taken over whenever it prints a line."""
        entry: dict[str, Any] = {"run": name.strip(), "why": None, "result": None}
        self.result["runs"].append(entry)
        written = self._scratch / f"{prefix}-{len(self.result['runs'])}.json"

        def take_over(line: str) -> None:
            say(line)
            with contextlib.suppress(OSError, ValueError):
                entry["result"] = json.loads(written.read_text())
                self.flush()

        with self._timed(entry, name):
            if self.left_s <= 0:
                entry["why"] = "the budget was spent"
                return
            label = str(len(self.result["runs"]))
            arguments = [str(BENCH / command[0]), *command[1:], "--out", str(self._scratch), "--label", label]
            timeout_s = min(self._arguments.part_timeout_s, self.left_s)
            try:
                entry["why"] = run_child(
                    arguments,
                    timeout_s,
                    lambda found: None,
                    on_line=take_over,
                    grace_s=CHILD_GRACE_S,
                    shows_errors=True,
                )
            finally:
                take_over(f"{name}: {entry['why'] or 'done'}")

    def _with_cases(self) -> list[dict[str, Any]]:
        """The runs of latency.py and throughput.py that have written something."""
        return [run for run in self.result["runs"] if "copy_bandwidth" in (run["result"] or {})]

    @contextlib.contextmanager
    def _timed(self, entry: dict[str, Any], name: str) -> Iterator[None]:
        begin = time.monotonic()
        print(f"── {name} ({self.left_s:.0f} s left)", flush=True)
        try:
            yield
        except Exception as error:  # whatever it was, the other parts' turn comes
            entry["why"] = f"{type(error).__name__}: {error}"
        finally:
            entry["seconds"] = round(time.monotonic() - begin, 1)
            self.flush()

    # ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────

    def table(self) -> list[str]:
        """All of it, in at most `MAX_LINES` lines."""
        machine = self.result["machine"]
        gpus = machine.get("gpus", [])
        head = f"{self.result['date']}  {len(gpus)} × {gpus[0]}" if gpus else f"{self.result['date']}  {machine['cpu']}"
        lines = [
            f"{head}  {self.result['seconds']:.0f} s",
            *shortened(kernel_table(self.result["kernels"]), KERNEL_LINES),
        ]
        results = [run["result"] for run in self.result["runs"] if run["result"] is not None]
        for geometry in self._arguments.geometry:
            own = [found for found in results if found.get("geometry") == geometry and "starts" in found]
            starts = [start for found in own for start in found["starts"]]
            rows = [row for found in own for row in found["results"]]
            if starts or rows:
                lines.append(f"── {geometry} {self._bandwidth(own)}")
            lines += [*report.start_lines(starts), *report.case_lines(rows)]
            lines += report.profile_lines([one for found in own for one in found["profile"]])
        lines += self._driver_lines(results)
        lines += [line for found in results if "first_load_s" in found for line in report.load_lines(found)]
        failures = [
            *(f"kernels {entry['module']}: {entry['why']}" for entry in self.result["kernels"] if entry["why"]),
            *(f"{run['run']}: {run['why']}" for run in self.result["runs"] if run["why"]),
            *(line for found in results for line in report.missing_lines(found.get("not_measured", []))),
        ]
        if failures:
            lines += ["── not measured, or not to the end", *dict.fromkeys(line[:200] for line in failures)]
        return shortened(lines, MAX_LINES)

    def _bandwidth(self, results: list[dict[str, Any]]) -> str:
        found = [one["copy_bandwidth"] for one in results if one["copy_bandwidth"]]
        return f"copy {found[0]['bytes_per_s'] / 1e12:.3f} TB/s" if found else ""

    def _driver_lines(self, results: list[dict[str, Any]]) -> list[str]:
        lines = []
        for found in results:
            if "parts_us" not in found:
                continue
            parts_us = "  ".join(f"{name} {part['p50']:.0f}" for name, part in found["parts_us"].items())
            lines.append(f"── driver, µs a step of {found['sequences']}: {found['total_us']['p50']:.0f}; {parts_us}")
            lines += [
                f"worker tp={row['tp']} rank {row['rank']} {row['case']}: host {row['host_us']} of {row['wall_us']} µs"
                for row in found["workers"]
            ]
        return lines


def shortened(lines: list[str], limit: int) -> list[str]:
    """The first `limit` lines, the last of which says how many there would be more."""
    if len(lines) <= limit:
        return lines
    return [*lines[: limit - 1], f"… {len(lines) - limit + 1} more lines: see the JSON"]


if __name__ == "__main__":
    main()
