"""vLLM and transformers on the same cases, each in a process of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from geometries import GEOMETRIES

from serving.cases import Case
from serving.children import run_child
from serving.setting import Setting
from serving.tally import Tally

TRANSFORMERS_TOKENS = 32
"""`generate` takes as long for every token: a few suffice, and 1000 would take minutes."""


def measure_vllm(setting: Setting, tp: int, cases: list[Case], tally: Tally, *, whole_only: bool) -> None:
    """Every case that vLLM can be made to run at this `tp`."""
    if tally.device != "cuda":
        tally.give_up("vllm", tp, "all", "it is measured on GPUs only")
        return
    _measure(setting, "vllm", tp, cases, tally, whole_only, setting.repetitions)


def measure_transformers(setting: Setting, cases: list[Case], tally: Tally, *, whole_only: bool) -> None:
    """In latency runs batch 1 and a few tokens of output; in throughput runs the cases as they are."""
    if not whole_only:
        single = {replace(case, output_len=min(case.output_len, TRANSFORMERS_TOKENS)) for case in cases}
        cases = sorted((case for case in single if case.batch == 1), key=str)
    if cases:
        _measure(setting, "transformers", 1, cases, tally, whole_only, 1 if whole_only else setting.repetitions)


def _measure(
    setting: Setting, way: str, tp: int, cases: list[Case], tally: Tally, whole_only: bool, repetitions: int
) -> None:
    if tally.left_s <= 0:
        tally.give_up(way, tp, "all", "the budget was spent")
        return
    job = {
        "folder": str(setting.folder),
        "tp": tp,
        "dtype": tally.dtype,
        "device": tally.device,
        "cases": [str(case) for case in cases],
        "repetitions": repetitions,
        "vocab_size": GEOMETRIES[setting.geometry]["vocab_size"],
        "max_model_len": setting.max_model_len,
        "max_num_seqs": setting.max_num_seqs,
        "cuda_graphs": setting.cuda_graphs,
        "whole_only": whole_only,
    }
    version: str | None = None
    missing = job["cases"]

    def take(result: dict[str, Any]) -> None:
        nonlocal version, missing
        if "case" not in result:
            version = result.pop("version")
            tally.add_start({"way": way, "version": version, "tp": tp, "run_ahead": None, **result})
            return
        case = Case.parse(result.pop("case"))
        missing = [text for text in missing if text != str(case)]
        tally.add(way, version, tp, None, setting.cuda_graphs, case, result)

    python = setting.peer_python or None
    options = {} if python is None else {"python": python}
    why = run_child(["-m", f"serving.{way}_peer", json.dumps(job)], tally.left_s, take, **options)
    if why is not None or missing:
        tally.give_up(way, tp, " ".join(missing), why or "it ended early")


def measure_copy_bandwidth(device: str, timeout_s: float) -> tuple[dict[str, Any], str | None]:
    """What copy_bandwidth.py found, and why it found nothing."""
    found: dict[str, Any] = {}
    why = run_child([str(Path(__file__).with_name("copy_bandwidth.py")), device], timeout_s, found.update)
    return found, why
