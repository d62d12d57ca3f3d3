"""The ranks of worker_step.py, all at once."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from serving.busy import num_steps
from serving.cases import Case
from serving.children import run_child
from serving.setting import Setting
from zmqexec.bus.memory import shared_file
from zmqexec.executor.spawn import OPENMP_WAIT


def measure_ranks(
    setting: Setting, tp: int, case: Case, timeout_s: float, *, profile: bool, run_aheads: Sequence[int] = (1,)
) -> tuple[list[dict[str, Any]], str | None]:
    """One result per rank and run-ahead, and why there are fewer. A case keeps its batch and its input."""
    case = replace(case, output_len=num_steps(len(run_aheads)))
    settings = setting.engine_settings(tp, run_ahead=max(run_aheads))
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
                "run_aheads": list(run_aheads),
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
    return sorted(results, key=lambda result: (result["rank"], result["run_ahead"])), "; ".join(reasons) or None
