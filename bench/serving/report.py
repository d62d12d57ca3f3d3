"""The results of cases as lines of a table."""

from __future__ import annotations

from typing import Any

from serving.tally import median

HEAD = (
    f"{'way':13} {'tp':>2} {'ahead':>5} {'case':>12} {'TTFT ms':>9} {'TPOT ms':>9} {'spread':>15} "
    f"{'whole':>8} {'roofline':>8} {'ratio':>6} {'tokens/s':>9}"
)


def start_lines(starts: list[dict[str, Any]]) -> list[str]:
    """Seconds to the first token."""
    return [
        f"{start['way']:13} {start['tp']:2} {_text(start['run_ahead'], 5)} first token after {start['total_s']:.1f} s"
        for start in starts
    ]


def case_lines(rows: list[dict[str, Any]]) -> list[str]:
    """One line a row; the table's head before them. `whole`: TPOT from `generate`."""
    return [HEAD, *map(_case_line, sorted(rows, key=_order))] if rows else []


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["batch"], row["input_len"], row["tp"], row["way"] != "zmqexec", row["way"], row["run_ahead"] or 0


def _case_line(row: dict[str, Any]) -> str:
    tpot = row["tpot_ms"] or row["tpot_generate_ms"]
    between = "-" if tpot is None else f"{tpot['min']:.3f}..{tpot['max']:.3f}"
    return (
        f"{row['way']:13} {row['tp']:2} {_text(row['run_ahead'], 5)} {row['case']:>12} "
        f"{_number(median(row['ttft_ms']), 9, 2)} {_number(median(tpot), 9, 3)} {between:>15} "
        f"{_number(median(row['tpot_generate_ms']), 8, 3)} {_number(row['roofline_ms'], 8, 3)} "
        f"{_number(row['tpot_over_roofline'], 6, 2)} {_number(row['output_tokens_per_s'], 9, 0)}"
    )


def profile_lines(profiles: list[dict[str, Any]]) -> list[str]:
    """Where the microseconds of a decode step go, of rank 0: device, host, and what the kernels are for."""
    lines = []
    for found in profiles:
        if found["rank"] != 0:
            continue
        head = f"decode step tp={found['tp']} {found['case']} ahead {found['run_ahead']}: {found['wall_us']:.0f} µs"
        if found["busy_share"] is not None:
            head += f", device busy {100 * found['busy_share']:.1f} %: graph {found['graph_us']:.0f} µs"
        if found["gap_us"] is not None:
            head += f", gap {found['gap_us']['p50']:.0f} (p99 {found['gap_us']['p99']:.0f}) µs"
        parts = (f"{name} {part['p50']:.0f} ({part['p99']:.0f})" for name, part in found["host_parts_us"].items())
        lines += [head, f"  host µs, p50 (p99): {', '.join(parts)}; {100 * found['cpu_share']:.0f} % of a core"]
        for row in found["groups"]:
            calls = "" if row["calls_per_step"] is None else f"{row['calls_per_step']:g} ×"
            lines.append(f"  {row['us_per_step']:9.1f} µs {row['percent']:5.1f} % {calls:>8} {row['name']}")
    return lines


def load_lines(found: dict[str, Any]) -> list[str]:
    """How fast weights are loaded, beside reading alone."""
    lines = [f"weights, {found['file_bytes'] / 1e9:.2f} GB in {found['num_files']} files, to {found['device']}"]
    if found["first_load_s"] is not None:
        lines[0] += f"; the first load {found['first_load_s']:.2f} s"
    for row in found["results"]:
        read, load, ratio = (row[name] for name in ("read_gb_per_s", "load_gb_per_s", "ratio"))
        verdict = "" if row["reaches_target"] else f", target {found['target_ratio']}"
        lines.append(
            f"  {row['page_cache']}: read {read['median']:.2f} GB/s, load {load['median']:.2f} GB/s, "
            f"ratio {ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f}){verdict}"
        )
    return lines


def missing_lines(not_measured: list[dict[str, Any]]) -> list[str]:
    """What there is no result of, and why."""
    return [
        f"{one['way']} tp={one.get('tp', 1)} {one.get('cases', '')}".rstrip() + f": {one['why'][:160]}"
        for one in not_measured
    ]


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _text(value: object, width: int) -> str:
    return f"{'-' if value is None else value:>{width}}"
