"""How fast do the weights of a real checkpoint reach the device, beside reading its files alone?

    python bench/load.py [--folder FOLDER] [--label h100]
    python bench/load.py --geometry tiny        # anywhere, to try it out

Writes a checkpoint of that geometry, random numbers in bfloat16 in files of at most 5 GB, into FOLDER, where it stays,
or into a temporary one. A FOLDER that has a config.json is taken as it is. Then, in turns: the files read one after the
other into one buffer (the reference), and rank 0's weights loaded as a worker does it, with tensor parallel size 1.
Both with the files in the page cache (warm), and after the system has dropped them (cold; left out where it keeps them,
as tmpfs does).

The ratio is the time of reading alone over that of loading. The first load of the process is named by itself: a worker
loads once, and that one pays for what CUDA sets up. The file is rewritten after every repetition.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import provenance
import torch
from geometries import GEOMETRIES
from serving import page_cache
from serving.checkpoint_files import missing_space, write_checkpoint
from serving.clock import spread
from serving.report import load_lines, missing_lines
from serving.tally import PACKAGES

from zmqexec.checkpoint import Checkpoint
from zmqexec.config import EngineConfig, parse_config
from zmqexec.driver.plan import Plan, make_plan

TARGET_RATIO = 0.6
READ_BYTES = 16 << 20
HELD_MOST = 0.02
"""Of the pages, for files to count as cold."""


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    folder: Path | None = arguments.folder
    if folder is not None and (folder / "config.json").exists():
        measure(arguments, folder, write_s=None)
    elif folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        measure(arguments, folder, write(arguments.geometry, folder))
    else:
        with tempfile.TemporaryDirectory(prefix="load-") as scratch:
            measure(arguments, Path(scratch), write(arguments.geometry, Path(scratch)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="llama-2-7b")
    parser.add_argument("--folder", type=Path, help="for the checkpoint, or with one; default: a temporary one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--budget-s", type=float, default=600.0, help="a repetition that has not begun by then is left out"
    )
    parser.add_argument("--label", default="local", help="of the file in --out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    return parser.parse_args()


def write(geometry: str, folder: Path) -> float:
    """Write the checkpoint; seconds."""
    missing = missing_space(geometry, folder)
    if missing is not None:
        sys.exit(missing)
    begin = time.perf_counter()
    write_checkpoint(geometry, folder)
    seconds = time.perf_counter() - begin
    print(f"wrote {geometry} in {seconds:.1f} s", flush=True)
    return seconds


def measure(arguments: argparse.Namespace, folder: Path, write_s: float | None) -> None:
    """All of it; the file."""
    deadline = time.monotonic() + arguments.budget_s
    settings = {"model": str(folder), "device": arguments.device, "dtype": "bfloat16"}
    plan = make_plan(parse_config(EngineConfig, settings))
    files = sorted({info.file for info in Checkpoint(folder).tensors.values()})
    result: dict[str, Any] = {
        "question": "how fast the weights of a checkpoint reach the device, beside reading its files alone",
        "date": provenance.now(),
        "command": provenance.command("bench/load.py"),
        "machine": provenance.machine(),
        "versions": provenance.versions(PACKAGES),
        "geometry": arguments.geometry if write_s is not None else None,
        "device": plan.device,
        "dtype": plan.dtype,
        "num_files": len(files),
        "file_bytes": sum(file.stat().st_size for file in files),
        "write_s": None if write_s is None else round(write_s, 2),
        "first_load_s": None,
        "target_ratio": TARGET_RATIO,
        "results": [],
        "not_measured": [],
    }
    path = arguments.out / f"load-{arguments.label}.json"
    page_cache.drop(files)
    cold = page_cache.held_share(files) <= HELD_MOST
    if not cold:
        result["not_measured"].append(
            {"way": "cold", "why": "the system does not drop these files from its page cache"}
        )
    loader = Loader(plan)
    read_s(files)  # into the page cache
    result["first_load_s"] = round(loader.load_s(), 3)
    provenance.write_json(path, result)
    print(f"first load of the process, warm: {result['first_load_s']} s", flush=True)
    times: dict[tuple[str, str], list[float]] = {}
    for repetition in range(arguments.repetitions):
        if repetition and time.monotonic() > deadline:
            result["not_measured"].append({"way": f"repetition {repetition + 1}", "why": "the budget was spent"})
            break
        for state in ("warm", "cold") if cold else ("warm",):
            # Turned around every time, so that neither always follows the other.
            for way in ("read", "load") if repetition % 2 == 0 else ("load", "read"):
                if state == "cold":
                    page_cache.drop(files)
                else:
                    read_s(files)
                seconds = read_s(files) if way == "read" else loader.load_s()
                times.setdefault((state, way), []).append(seconds)
                print(f"{state} {way}: {seconds:.3f} s, {result['file_bytes'] / seconds / 1e9:.2f} GB/s", flush=True)
        result["results"] = [
            row(times, state, result["file_bytes"]) for state in ("warm", "cold") if (state, "read") in times
        ]
        provenance.write_json(path, result)
    provenance.write_json(path, result)
    print("", *load_lines(result), *missing_lines(result["not_measured"]), path.name, sep="\n")


def row(times: dict[tuple[str, str], list[float]], state: str, num_bytes: int) -> dict[str, Any]:
    """The figures of one state of the page cache."""
    reads, loads = times[state, "read"], times[state, "load"]
    ratio = spread([read / load for read, load in zip(reads, loads, strict=True)])
    return {
        "page_cache": state,
        "read_s": spread(reads),
        "load_s": spread(loads),
        "read_gb_per_s": spread([num_bytes / seconds / 1e9 for seconds in reads]),
        "load_gb_per_s": spread([num_bytes / seconds / 1e9 for seconds in loads]),
        "ratio": ratio,
        "reaches_target": ratio["median"] >= TARGET_RATIO,
    }


def read_s(files: list[Path]) -> float:
    """Seconds to read the files one after the other into one buffer."""
    buffer = bytearray(READ_BYTES)
    begin = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - begin


class Loader:
    """Rank 0 of one, as in a worker, up to its weights."""

    def __init__(self, plan: Plan) -> None:
        load = plan.load_message(epoch=0)
        self._synchronize = lambda: None
        if load.device == "cuda":
            from zmqexec.worker.gpu.collectives import LocalGpuCollectives
            from zmqexec.worker.gpu.device import CudaDevice
            from zmqexec.worker.gpu.runner import GpuRunner

            self._synchronize = torch.cuda.synchronize
            self._load = GpuRunner(load, LocalGpuCollectives(), CudaDevice(0)).load_weights
        else:
            from zmqexec.worker.collectives import LocalCollectives
            from zmqexec.worker.runner import ModelRunner

            self._load = ModelRunner(load, LocalCollectives()).load_weights
            torch.set_num_threads(load.num_threads)

    def load_s(self) -> float:
        """Seconds until the weights are on the device. Then they are let go."""
        self._synchronize()
        begin = time.perf_counter()
        with torch.inference_mode():
            weights = self._load(lambda done, total: None)
        self._synchronize()
        seconds = time.perf_counter() - begin
        del weights
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return seconds


if __name__ == "__main__":
    main()
