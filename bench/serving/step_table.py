"""Where the microseconds of a decode step go, from what a profiler saw of some steps. Imports no torch."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

ROWS = 25
NAME_CHARS = 100

GROUPS = [
    ("plan, begin, append", r"attention_plan|begin_decode|finish_decode"),
    ("attention", r"attention|attn|flash|fmha"),
    ("all-reduce", r"all_?reduce|all_?gather|nccl"),
    ("gemm", r"gemm|gemv|nvjet|xmma|cutlass|cublas|split_?k|^aten::(add)?mm$|^mkldnn::_linear"),
    ("norm", r"rms_norm|layer_norm|aten::rsqrt|aten::pow|aten::mean"),
    ("rope, KV write", r"rope"),
    ("silu × up", r"silu"),
    ("embedding", r"embedding"),
    ("sampling", r"argmax|sample|softmax|topk|sort|gather"),
    ("copies", r"memcpy|memset|copy|fill|aten::cat|catarray"),
    ("other", r""),
]
"""The first whose pattern is in a kernel's name. Of torch's CPU operators, only those that say what they are for."""
PRODUCTS = ("qkv", "o", "gate_up", "down")
"""The matrix products of a layer, in their order; the step's last is lm_head."""
REDUCES = re.compile(r"split_?k_?reduce", re.IGNORECASE)
"""The second kernel of a product whose inner dimension was split."""


@dataclass(frozen=True)
class Work:
    """One kernel's run, or on a CPU one operator's. `own_us` is the time that belongs to it alone."""

    name: str
    begin_us: float
    own_us: float


def without_overlaps(spans: list[tuple[str, float, float]]) -> list[Work]:
    """(name, begin, end) in µs, where one that began earlier owns the time that two share.

    With programmatic dependent launch a kernel begins while its predecessor runs, and mostly waits for it.
    """
    found, latest = [], float("-inf")
    for name, begin, end in sorted(spans, key=lambda span: span[1:]):
        found.append(Work(name, begin, max(0.0, end - max(begin, latest))))
        latest = max(latest, end)
    return found


def kernel_rows(works: list[Work], steps: int) -> list[dict[str, Any]]:
    """By name, the longest first; the shorter ones in one row, and the sum."""
    own_us: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for work in works:
        own_us[work.name[:NAME_CHARS]] += work.own_us
        calls[work.name[:NAME_CHARS]] += 1
    names = sorted(own_us, key=lambda name: own_us[name], reverse=True)
    rows = [_row(name, calls[name] / steps, own_us[name] / steps) for name in names[:ROWS]]
    if names[ROWS:]:
        rows.append(_row(f"{len(names) - ROWS} others", None, sum(own_us[name] for name in names[ROWS:]) / steps))
    return [*rows, _row("all", None, sum(own_us.values()) / steps)]


def group_rows(works: list[Work], steps: int, step_us: float, num_layers: int) -> list[dict[str, Any]]:
    """By what it is for, the longest first, then the time in which nothing ran; each with its percent of the step."""
    works = sorted(works, key=lambda work: work.begin_us)
    groups = [_group(work.name) for work in works]
    num_products = sum(_is_product(group, work) for group, work in zip(groups, works, strict=True))
    are_known = num_products == steps * (len(PRODUCTS) * num_layers + 1)
    own_us: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    index = -1
    for group, work in zip(groups, works, strict=True):
        index += _is_product(group, work)
        title = f"gemm {_product(index, num_layers)}" if group == "gemm" and are_known else group
        own_us[title] += work.own_us
        calls[title] += 1
    titles = sorted(own_us, key=lambda title: own_us[title], reverse=True)
    rows = [_row(title, calls[title] / steps, own_us[title] / steps) for title in titles]
    rows.append(_row("gaps", None, max(0.0, step_us - sum(own_us.values()) / steps)))
    return [{**row, "percent": round(100 * row["us_per_step"] / step_us, 1)} for row in rows]


def _group(name: str) -> str:
    return next(title for title, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE))


def _is_product(group: str, work: Work) -> bool:
    return group == "gemm" and REDUCES.search(work.name) is None


def _product(index: int, num_layers: int) -> str:
    place = max(index, 0) % (len(PRODUCTS) * num_layers + 1)
    return PRODUCTS[place % len(PRODUCTS)] if place < len(PRODUCTS) * num_layers else "lm_head"


def _row(name: str, calls: float | None, us: float) -> dict[str, Any]:
    return {"name": name, "calls_per_step": None if calls is None else round(calls, 2), "us_per_step": round(us, 2)}
