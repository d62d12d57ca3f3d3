"""The modules of bench/gpu_kernels, each in a process of its own: what gpu.py, kernels.py and allreduce.py share."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import provenance

from serving.children import BENCH, run_child

PACKAGES = ("zmqexec", "torch", "numpy", "cupy-cuda12x", "cupy-cuda13x", "flash_attn_3", "nvidia-nccl-cu13")

Entry = dict[str, Any]
"""Of a module: checks, measures, seconds, and `why` it did not end well; `error` where it raised."""


def kernel_modules(wanted: list[str] | None = None) -> list[str]:
    """Those with a `check` or a `measure`, told by their text: importing them may need what is not there."""
    found = []
    for path in sorted((BENCH / "gpu_kernels").glob("*.py")):
        text = path.read_text()
        has_any = "def check(" in text or "def measure(" in text
        if has_any and not path.name.startswith("_") and (wanted is None or path.stem in wanted):
            found.append(path.stem)
    return found


def new_entry(module: str) -> Entry:
    """Of a module that has not run yet."""
    return {"module": module, "checks": [], "measures": [], "why": None}


def run_module(entry: Entry, timeout_s: float, on_change: Callable[[], None]) -> None:
    """Check and measure the entry's module. Whatever it finds is in the entry at once, then `on_change` is called."""

    def take(found: dict[str, Any]) -> None:
        if "error" in found:
            entry["error"] = found["error"]
        else:
            entry["checks" if found["kind"] == "check" else "measures"].append(found["row"])
        on_change()

    arguments = ["-m", "serving.kernel_module", entry["module"]]
    entry["why"] = run_child(arguments, timeout_s, take, on_line=say, shows_errors=True)


def run_script(script: str, question: str, modules: list[str], arguments: argparse.Namespace) -> None:
    """Run `modules`, write `script`-LABEL.json and print the table; exits with 1 where a check failed or none ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    path: Path = arguments.out / f"{script}-{arguments.label}.json"
    result: dict[str, Any] = {
        "question": question,
        "date": provenance.now(),
        "command": provenance.command(f"bench/{script}.py"),
        "machine": provenance.machine(),
        "versions": provenance.versions(PACKAGES),
        "kernels": [],
    }
    for module in modules:
        entry = new_entry(module)
        result["kernels"].append(entry)
        print(f"── {module}", flush=True)
        begin = time.monotonic()
        run_module(entry, arguments.timeout_s, lambda: provenance.write_json(path, result))
        entry["seconds"] = round(time.monotonic() - begin, 1)
        provenance.write_json(path, result)
    print("", *table(result["kernels"]), path.name, sep="\n")
    if any(entry["why"] or not all(map(passed, entry["checks"])) for entry in result["kernels"]):
        sys.exit(1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that kernels.py and allreduce.py share."""
    parser.add_argument("--timeout-s", type=float, default=150.0, help="for each module")
    parser.add_argument("--label", default="local", help="of the file in --out")
    parser.add_argument("--out", type=Path, default=BENCH / "results", help="folder for the JSON")


def table(entries: list[Entry]) -> list[str]:
    """A line for each module, each check that failed, and each measure."""
    lines = []
    for entry in entries:
        checks = entry["checks"]
        failed = [row for row in checks if not passed(row)]
        verdict = f"{len(failed)} of {len(checks)} checks FAILED" if failed else f"{len(checks)} ok"
        raised = ", raised" if "error" in entry else ""
        why = f"; {entry['why']}" if entry["why"] else ""
        lines.append(f"kernels {entry['module']}: {verdict}{raised}, {entry.get('seconds', 0):.0f} s{why}")
        lines += [f"  FAILED {in_one_line(row)}" for row in failed[:5]]
        lines += [f"  {in_one_line(row)}" for row in entry["measures"]]
    return lines


def passed(row: dict[str, Any]) -> bool:
    """Whether a check says so; one that says nothing was passed, since it did not raise."""
    return all(bool(row[key]) for key in ("ok", "passed") if key in row)


def in_one_line(row: dict[str, Any]) -> str:
    """A dict in at most 150 characters, long lists left out."""
    words = []
    for key, value in row.items():
        if isinstance(value, dict | list):
            continue
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        words.append(shown if key == "name" else f"{key}={shown}")
    return " ".join(words)[:150]


def say(line: str) -> None:
    """Print a line of a child."""
    with contextlib.suppress(OSError):
        print(f"   {line}" if line else "", flush=True)
