"""The ranks of worker_step.py, all at once."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from typing import Any

from serving.cases import Case
from serving.children import run_child
from serving.setting import Setting
from zmqexec.bus.memory import shared_file
from zmqexec.executor.spawn import OPENMP_WAIT

STEPS = 96
"""Output tokens of a case that is looked at: what worker_step.py takes, and some for sequences that came in first."""


def measure_ranks(
    setting: Setting, tp: int, case: Case, timeout_s: float, *, profile: bool
) -> tuple[list[dict[str, Any]], str | None]:
    """One result per rank, and why there are fewer. A case keeps its batch and its input."""
    case = replace(case, output_len=STEPS)
    settings = setting.engine_settings(tp, run_ahead=1)
    settings |= {"max_model_len": max(setting.max_model_len, case.input_len + case.output_len)}
    results: list[dict[str, Any]] = []
    reasons: list[str] = []
    store_fd = shared_file("bench-rendezvous")
    try:
        jobs = [
            {
                "folder": str(setting.folder),
                "settings": settings,
                "case": str(case),
                "rank": rank,
                "tp": tp,
                "store_fd": store_fd,
                "profile": profile,
            }
            for rank in range(tp)
        ]

        def run(job: dict[str, Any]) -> None:
            arguments = ["-m", "serving.worker_step", json.dumps(job)]
            why = run_child(arguments, timeout_s, results.append, pass_fds=[store_fd], env=OPENMP_WAIT)
            if why is not None:
                reasons.append(f"rank {job['rank']}: {why}")

        threads = [threading.Thread(target=run, args=[job], daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.close(store_fd)
    return sorted(results, key=lambda result: result["rank"]), "; ".join(reasons) or None
