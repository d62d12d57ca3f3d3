"""The run as a picture.

Runs in: the benchmark.
"""

from __future__ import annotations

from pathlib import Path

from bus_peers.plan import USUAL_BYTES
from bus_peers.registry import BARE_PREFIX, OURS, Entry
from bus_peers.report import size_name
from bus_peers.rows import Row


def draw(peers: dict[str, Entry], rows: list[Row], title: str, output: Path) -> bool:
    """Four panels as SVG; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot

    colors = pyplot.get_cmap("tab20")
    style = {
        name: {
            "label": entry.title,
            "color": "black" if name.startswith(OURS) else colors(index % 20),
            "linewidth": 3 if name.startswith(OURS) else 1.2,
            "linestyle": ":" if name.startswith(BARE_PREFIX) else "-",
        }
        for index, (name, entry) in enumerate(peers.items())
    }
    figure, ((by_readers, by_size), (by_period, idle)) = pyplot.subplots(2, 2, figsize=(15, 11))
    measured = [row for row in rows if "p50_us" in row and row["replies"] == "all"]
    back_to_back = [row for row in measured if row["mode"] == "back_to_back"]
    largest = max((row["readers"] for row in back_to_back if row["readers"] <= 2), default=1)
    for name in peers:
        own = [row for row in back_to_back if row["peer"] == name]
        points = sorted((row["readers"], row["p50_us"]) for row in own if row["payload_bytes"] == USUAL_BYTES)
        _line(by_readers, points, style[name])
        points = sorted((row["payload_bytes"], row["p50_us"]) for row in own if row["readers"] == largest)
        _line(by_size, points, style[name])
        paced = [row for row in measured if row["peer"] == name and row["mode"] == "paced" and row["readers"] == 1]
        _line(by_period, sorted((row["period_ms"], row["p50_us"]) for row in paced), style[name])
    for axes, what in (
        (by_readers, "back to back, 4 KiB, by number of readers"),
        (by_size, f"back to back, {largest} reader(s), by size"),
        (by_period, "paced, 1 reader, 4 KiB, by period in ms"),
    ):
        axes.set(title=what, ylabel="round trip p50, µs", yscale="log")
        axes.grid(alpha=0.3)
    by_readers.set_xticks(sorted({row["readers"] for row in back_to_back}))
    sizes = sorted({row["payload_bytes"] for row in back_to_back})
    by_size.set_xscale("log", base=2)
    by_size.set_xticks(sizes, [size_name(size) for size in sizes])
    silent = [row for row in measured if row["mode"] == "silence" and row["readers"] == 1]
    names = [peers[row["peer"]].title for row in silent]
    idle.barh(
        names,
        [max(row["idle_first_second_percent"]) for row in silent],
        color=[style[row["peer"]]["color"] for row in silent],
    )
    idle.set(title="CPU of the group in the first second after a message, % of a core", xscale="log", xlim=(1e-3, None))
    idle.invert_yaxis()
    figure.legend(*by_readers.get_legend_handles_labels(), loc="lower center", ncols=6, fontsize="small")
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(output)
    return True


def _line(axes: object, points: list[tuple[float, float]], style: dict[str, object]) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), marker=".", **style)  # type: ignore[attr-defined]
