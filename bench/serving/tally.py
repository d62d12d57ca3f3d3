"""The results of a run so far, in memory and, after each of them, in the file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import provenance
from geometries import decode_weight_bytes, kv_bytes_per_token

from serving.cases import Case

PACKAGES = ("zmqexec", "torch", "msgspec", "pyzmq", "numpy", "cupy-cuda12x", "cupy-cuda13x", "transformers", "vllm")
MEASURED = {
    "ttft_ms": None,
    "ttft_last_ms": None,
    "tpot_ms": None,
    "decode_step_ms": None,
    "tpot_generate_ms": None,
    "generate_s": None,
    "generate_one_token_s": None,
    "output_tokens_per_s": None,
    "same_tokens": None,
    "preemptions": None,
}


class Tally:
    """`result` is what the file holds.

    device, dtype   where the engines compute and in what, known from the start
    """

    def __init__(
        self, path: Path, head: dict[str, Any], geometry: str, device: str, dtype: str, budget_s: float
    ) -> None:
        self.device = device
        self.dtype = dtype
        self._path = path
        self._geometry = geometry
        self._deadline = time.monotonic() + budget_s
        self.result: dict[str, Any] = {
            **head,
            "date": provenance.now(),
            "machine": provenance.machine(),
            "versions": provenance.versions(PACKAGES),
            "geometry": geometry,
            "device": device,
            "dtype": dtype,
            "weight_bytes": decode_weight_bytes(geometry, dtype),
            "copy_bandwidth": None,
            "starts": [],
            "results": [],
            "profile": [],
            "not_measured": [],
        }
        self.flush()

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self._deadline - time.monotonic()

    def flush(self) -> None:
        """Write the file."""
        provenance.write_json(self._path, self.result)

    def set_bandwidth(self, found: dict[str, Any], why: str | None) -> None:
        """What a roofline is made of. Without it there is none."""
        self.result["copy_bandwidth"] = found or None
        if why is not None:
            self.give_up("copy bandwidth", 1, "", why)
        self.flush()

    def add_start(self, start: dict[str, Any]) -> None:
        """Seconds until an engine's first token."""
        self.result["starts"].append(start)
        self.flush()
        print(f"{start['way']} tp={start['tp']}: first token after {start['total_s']:.1f} s", flush=True)

    def add(
        self,
        way: str,
        version: str | None,
        tp: int,
        run_ahead: int | None,
        cuda_graphs: bool,
        case: Case,
        figures: dict[str, Any],
    ) -> None:
        """The figures of one case, with the roofline beside them."""
        row = {
            "way": way,
            "version": version,
            "tp": tp,
            "run_ahead": run_ahead,
            "cuda_graphs": cuda_graphs,
            "case": str(case),
            "batch": case.batch,
            "input_len": case.input_len,
            "output_len": case.output_len,
            **MEASURED,
            **figures,
        }
        row |= self._roofline(case, tp, row)
        self.result["results"].append(row)
        self.flush()
        tpot = median(row["tpot_ms"]) or median(row["tpot_generate_ms"])
        shown = "-" if tpot is None else f"{tpot:.3f} ms"
        print(f"{way} tp={tp} {case}: TPOT {shown}, {row['output_tokens_per_s']:.0f} tokens/s", flush=True)

    def give_up(self, way: str, tp: int, cases: str, why: str) -> None:
        """Something that could not be measured."""
        self.result["not_measured"].append({"way": way, "tp": tp, "cases": cases, "why": why})
        self.flush()
        print(f"{way} tp={tp} {cases}: not measured: {why}", flush=True)

    def _roofline(self, case: Case, tp: int, row: dict[str, Any]) -> dict[str, Any]:
        """`roofline_ms` reads the weights once, `roofline_kv_ms` the mean context's keys and values too."""
        found = {"roofline_ms": None, "roofline_kv_ms": None, "tpot_over_roofline": None}
        bandwidth = (self.result["copy_bandwidth"] or {}).get("bytes_per_s")
        if bandwidth is None:
            return found
        weights = decode_weight_bytes(self._geometry, self.dtype)
        context = case.input_len + case.output_len / 2
        cache = case.batch * context * kv_bytes_per_token(self._geometry, self.dtype)
        found["roofline_ms"] = round(1e3 * weights / bandwidth / tp, 4)
        found["roofline_kv_ms"] = round(1e3 * (weights + cache) / bandwidth / tp, 4)
        tpot = median(row["tpot_ms"]) or median(row["tpot_generate_ms"])
        if tpot is not None:
            found["tpot_over_roofline"] = round(tpot / found["roofline_ms"], 3)
        return found


def median(found: dict[str, Any] | None) -> float | None:
    """Of what `clock.spread` made."""
    return None if found is None else found["median"]
