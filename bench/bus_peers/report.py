"""The run as tables for people.

Runs in: the benchmark.
"""

from __future__ import annotations

from typing import Any

from bus_peers.plan import KIB, MIB
from bus_peers.registry import Entry
from bus_peers.rows import Row
from bus_peers.targets import Target


def size_name(num_bytes: int) -> str:
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes // unit} {name}"
    return f"{num_bytes} B"


def print_tables(peers: dict[str, Entry], rows: list[Row], troubles: dict[str, str]) -> None:
    """One table per number of readers and kind of reply, then those of paced steps and silence."""
    for readers in sorted({row["readers"] for row in rows}):
        for replies in ("all", "rank 0"):
            found = [row for row in rows if row["readers"] == readers and row["replies"] == replies]
            _print_back_to_back(peers, [row for row in found if row["mode"] == "back_to_back"], readers, replies)
        found = [row for row in rows if row["readers"] == readers]
        _print_paced(peers, [row for row in found if row["mode"] == "paced"], readers)
        _print_silence(peers, [row for row in found if row["mode"] == "silence"], readers)
    for name, reason in troubles.items():
        print(f"not measured: {name}: {reason}")


def _print_back_to_back(peers: dict[str, Entry], rows: list[Row], readers: int, replies: str) -> None:
    if not rows:
        return
    sizes = sorted({row["payload_bytes"] for row in rows})
    print(
        f"\nback to back, {readers} reader(s), {replies} reply: p50 / p99 in µs, [CPU µs of the group per round trip]"
    )
    print(f"{'':32}" + "".join(f"{size_name(size):>26}" for size in sizes))
    for name, entry in peers.items():
        cells = {row["payload_bytes"]: row for row in rows if row["peer"] == name}
        if any("p50_us" in row for row in cells.values()):
            print(f"{entry.title:32}" + "".join(f"{_cell(cells.get(size)):>26}" for size in sizes))


def _print_paced(peers: dict[str, Entry], rows: list[Row], readers: int) -> None:
    if not rows:
        return
    periods = sorted({row["period_ms"] for row in rows})
    print(f"\npaced, {readers} reader(s), 4 KiB: p50 / p99 in µs, [CPU µs of the group per round trip], worker's CPU")
    print(f"{'':32}" + "".join(f"{f'{period:g} ms':>34}" for period in periods))
    for name, entry in peers.items():
        cells = {row["period_ms"]: row for row in rows if row["peer"] == name and "p50_us" in row}
        if cells:
            texts = [
                f"{_cell(cells[period])} {cells[period]['worker_cpu_percent']:6.2f} %" if period in cells else "-"
                for period in periods
            ]
            print(f"{entry.title:32}" + "".join(f"{text:>34}" for text in texts))


def _print_silence(peers: dict[str, Entry], rows: list[Row], readers: int) -> None:
    if not rows:
        return
    print(f"\nsilence, {readers} reader(s): the group's CPU after a message, worst window; first message after 2 s")
    print(f"{'':32}{'first second':>14}{'after':>12}{'p50 µs':>12}")
    for row in rows:
        if "p50_us" in row:
            first, after = max(row["idle_first_second_percent"]), max(row["idle_after_percent"])
            print(f"{peers[row['peer']].title:32}{first:12.3f} %{after:10.3f} %{row['p50_us']:12.1f}")


def _cell(row: Row | None) -> str:
    if row is None or "p50_us" not in row:
        return "-"
    return f"{row['p50_us']:.1f} / {row['p99_us']:.0f} [{row['cpu_us_per_round_trip']:.0f}]"


def print_encoding(rows: list[dict[str, Any]]) -> None:
    print("\na decode step of 256 sequences, µs (in brackets with the packing of its integers)")
    for row in rows:
        encode = f"encode {row['encode_us']:.2f} ({row['encode_packed_us']:.2f})"
        decode = f"decode {row['decode_us']:.2f} ({row['decode_packed_us']:.2f})"
        print(f"{row['case']:50} {row['bytes']:>7} bytes  {encode:28} {decode}")


def print_targets(targets: list[Target]) -> None:
    print("\ntargets")
    words = {True: "met", False: "NOT MET", None: "-"}
    for target in targets:
        print(f"{words[target.met]:8}{target.line:64}{target.wanted:52}{target.measured}")
