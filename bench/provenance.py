"""Where a result comes from: date, command, machine, versions. No names of hosts and no paths."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def now() -> str:
    """The date and time, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command(script: str) -> str:
    """What was typed. Of a path, only its last part."""
    arguments = [re.sub(r"(^|=)/.*/", r"\1", argument) for argument in sys.argv[1:]]
    return " ".join(["python", script, *arguments])


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python, of those packages that are installed, and of this repository."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "zmqexec" not in found:
        from zmqexec import __version__

        found["zmqexec"] = __version__
    described = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    if described:
        found["commit"] = described
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, kernel, GPUs and their driver."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release().partition("-")[0],
        "load": round(os.getloadavg()[0], 2),
    }
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version,power.limit", "--format=csv,noheader")
    if gpus:
        found["gpus"] = gpus.splitlines()
    return found


def cpu_name() -> str:
    """The processor's name with family and model, which tell the generation where the name does not."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Replace `path` at once: whoever is killed in the middle leaves the older file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)


def _output(*arguments: str) -> str:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
