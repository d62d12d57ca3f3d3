"""A run of cases from options to file: what latency.py and throughput.py both do."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import geometries
import provenance

from serving import report
from serving.ours import measure_engine
from serving.peers import measure_copy_bandwidth, measure_transformers, measure_vllm
from serving.ranks import measure_ranks
from serving.setting import Setting, setting_of
from serving.tally import Tally
from zmqexec.config import EngineConfig, parse_config
from zmqexec.driver.plan import make_plan

BANDWIDTH_TIMEOUT_S = 120.0
PROFILE_TIMEOUT_S = 300.0


def run(arguments: argparse.Namespace, name: str, question: str, *, whole_only: bool, profile: bool = False) -> Path:
    """Measure everything that the options ask for; the file with the results."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    path: Path = arguments.out / f"{name}-{arguments.label}.json"
    with tempfile.TemporaryDirectory(prefix="geometry-") as scratch:
        folder = geometries.write_folder(arguments.geometry, Path(scratch) / arguments.geometry)
        setting = setting_of(arguments, folder, EngineConfig().max_num_seqs)
        device, dtype = _device_and_dtype(setting)
        head = {
            "question": question,
            "command": provenance.command(f"bench/{name}.py"),
            "settings": _settings(setting),
        }
        tally = Tally(path, head, arguments.geometry, device, dtype, arguments.budget_s)
        if arguments.copy_tb_per_s is not None:
            tally.set_bandwidth({"device": device, "bytes_per_s": round(1e12 * arguments.copy_tb_per_s)}, None)
        elif arguments.ways:
            tally.set_bandwidth(*measure_copy_bandwidth(device, min(BANDWIDTH_TIMEOUT_S, tally.left_s)))
        _measure(arguments, setting, tally, whole_only)
        if profile:
            _profile(arguments, setting, tally)
    print()
    for lines in (
        report.start_lines(tally.result["starts"]),
        report.case_lines(tally.result["results"]),
        report.profile_lines(tally.result["profile"]),
        report.missing_lines(tally.result["not_measured"]),
    ):
        if lines:
            print(*lines, sep="\n")
    print(path.name)
    return path


def _measure(arguments: argparse.Namespace, setting: Setting, tally: Tally, whole_only: bool) -> None:
    """Ours for every tp, then the peers: if the time ends early, it ends with them."""
    if "zmqexec" in arguments.ways:
        for tp in arguments.tp:
            for run_ahead in arguments.run_ahead:
                measure_engine(setting, tp, run_ahead, arguments.cases, tally, whole_only=whole_only)
    if "vllm" in arguments.ways:
        for tp in arguments.tp:
            measure_vllm(setting, tp, arguments.cases, tally, whole_only=whole_only)
    if "transformers" in arguments.ways:
        measure_transformers(setting, arguments.cases, tally, whole_only=whole_only)


def _profile(arguments: argparse.Namespace, setting: Setting, tally: Tally) -> None:
    for tp in arguments.tp:
        for case in arguments.cases:
            if tally.left_s <= 0:
                tally.give_up("profile", tp, str(case), "the budget was spent")
                continue
            timeout_s = min(PROFILE_TIMEOUT_S, tally.left_s)
            modes = sorted(set(arguments.run_ahead))
            found, why = measure_ranks(setting, tp, case, timeout_s, profile=True, run_aheads=modes)
            tally.result["profile"] += found
            tally.flush()
            if why is not None:
                tally.give_up("profile", tp, str(case), why)


def _device_and_dtype(setting: Setting) -> tuple[str, str]:
    """What an engine of one rank would choose."""
    settings = {**setting.engine_settings(tp=1, run_ahead=1), "model": str(setting.folder)}
    plan = make_plan(parse_config(EngineConfig, settings))
    return plan.device, plan.dtype


def _settings(setting: Setting) -> dict[str, Any]:
    """Those that the command does not tell at a glance."""
    return {
        "repetitions": setting.repetitions,
        "max_model_len": setting.max_model_len,
        "max_num_seqs": setting.max_num_seqs,
        "max_num_batched_tokens": setting.max_num_batched_tokens or "each engine's default",
        "cuda_graphs": setting.cuda_graphs,
        "enable_prefix_caching": False,
        "tokenizer": setting.tokenizer is not None,
    }
