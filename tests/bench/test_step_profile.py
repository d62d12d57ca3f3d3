"""What is said about a decode step: how busy the device was, what the host did, and what the kernels were for."""

from __future__ import annotations

import json
from pathlib import Path

import geometries
import pytest
from serving import report
from serving.busy import HostMark, Watch, device_figures, num_steps
from serving.cases import Case
from serving.step_table import Work, group_rows, kernel_rows, without_overlaps
from serving.worker_step import Loop, make_job_plan, watched

from tests.bench.test_harness import run_script
from tests.worker.gpu.emulation import make_gpu_runner


class At:
    """A mark at a given millisecond."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def record(self) -> None:
        pass

    def elapsed_time(self, end: At) -> float:
        return end.ms - self.ms


def spans(*times: tuple[float, float]) -> list[tuple[At, At]]:
    return [(At(begin), At(end)) for begin, end in times]


def test_a_device_is_busy_in_its_graphs_and_the_time_between_rounds_is_nobodys() -> None:
    rounds = [spans((0, 4), (5, 9), (10, 14)), spans((100, 104), (105, 109))]
    assert device_figures(rounds) == {
        "graph_us": 4000.0,
        "gap_us": {"p50": 1000.0, "p99": 1000.0},
        "busy_share": round(20 / (14 + 9), 4),
    }
    assert device_figures([spans((0, 4))])["gap_us"] is None
    assert device_figures([])["busy_share"] is None


def test_time_shared_by_two_kernels_belongs_to_the_one_that_began_first() -> None:
    works = without_overlaps([("b", 4, 12), ("a", 0, 5), ("inside", 6, 7), ("c", 15, 16)])
    assert [(work.name, work.own_us) for work in works] == [("a", 5), ("b", 7), ("inside", 0), ("c", 1)]


BEGIN, PLAN, NORM, ATTENTION = "begin_decode_kernel(int)", "attention_plan_kernel", "rms_norm_kernel", "paged_attention"
LAYER = [NORM, "nvjet_tst_64x8", "rope_write_kv_kernel", ATTENTION, "skinny_gemm_kernel<float>", "all_reduce_kernel<2>"]
LAYER += [
    "nvjet_tst_192x8",
    "silu_mul_kernel",
    "cutlass::gemm",
    "cublasLt::splitKreduce_kernel",
    "all_reduce_kernel<2>",
]
STEP = ["Memcpy HtoD", BEGIN, PLAN, *LAYER, *LAYER, NORM, "nvjet_lm", "argmax_kernel", "finish_decode_kernel"]


def test_the_products_of_a_step_are_told_by_their_order() -> None:
    works = [Work(name, 10 * index, 8) for index, name in enumerate(STEP * 3)]
    rows = {row["name"]: row for row in group_rows(works, 3, 10 * len(STEP), num_layers=2)}
    calls = {name: row["calls_per_step"] for name, row in rows.items()}
    assert calls == {
        "gemm qkv": 2,
        "gemm o": 2,
        "gemm gate_up": 2,
        "gemm down": 4,  # with the second kernel of a split product
        "gemm lm_head": 1,
        "all-reduce": 4,
        "attention": 2,
        "norm": 3,
        "rope, KV write": 2,
        "silu × up": 2,
        "plan, begin, append": 3,
        "sampling": 1,
        "copies": 1,
        "gaps": None,
    }
    assert sum(row["percent"] for row in rows.values()) == pytest.approx(100, abs=1)
    assert rows["gaps"]["us_per_step"] == pytest.approx(2 * len(STEP))
    assert rows["gemm down"]["us_per_step"] == 32


def test_products_of_another_number_stay_together() -> None:
    works = [Work(name, 10 * index, 8) for index, name in enumerate(STEP)]
    rows = {row["name"]: row for row in group_rows(works, 1, 10 * len(STEP), num_layers=3)}
    assert rows["gemm"]["calls_per_step"] == 11 and "gemm o" not in rows


def test_kernels_are_listed_by_their_time_and_the_short_ones_together() -> None:
    rows = kernel_rows([Work(f"k{index}", index, index) for index in range(30)], 2)
    assert rows[0] == {"name": "k29", "calls_per_step": 0.5, "us_per_step": 14.5}
    assert rows[-2:] == [
        {"name": "5 others", "calls_per_step": None, "us_per_step": 5.0},
        {"name": "all", "calls_per_step": None, "us_per_step": 217.5},
    ]


def test_a_gpu_runners_launch_is_timed_part_by_part(tmp_path: Path) -> None:
    folder, case = geometries.write_folder("tiny", tmp_path / "tiny"), Case(2, 3, 40)
    settings = {"load_format": "dummy", "device": "cpu", "max_model_len": 64, "max_num_seqs": 2, "dtype": "bfloat16"}
    plan, num_blocks = make_job_plan({"folder": str(folder), "settings": settings}, case)
    runner = make_gpu_runner(
        folder, dtype="bfloat16", max_model_len=64, max_num_seqs=2, num_blocks=num_blocks, load_format="dummy"
    )
    watch = watched(runner, num_modes=1)
    loop = Loop(plan, runner, num_blocks, case, watch, run_ahead=1)
    while loop.is_prefilling:
        loop.step()
    watch.begin(1)
    for _ in range(3):
        loop.step()
    watch.end()
    loop.drain()
    found = watch.figures(1)
    assert list(found["host_parts_us"]) == ["all", "stage", "launch", "record", "other"]
    assert found["host_us"] > 0 and found["wall_us"] > 0
    assert 0 < found["busy_share"] < 1 and found["graph_us"] > 0 and found["gap_us"]["p50"] > 0


def test_a_watch_lets_pass_what_is_not_in_a_round() -> None:
    watch = Watch(HostMark, 1)
    double = watch.marked(watch.part("launch", lambda x: 2 * x))
    assert watch.step(lambda: double(2)) == 4
    watch.begin(0)
    assert watch.step(lambda: double(3)) == 6
    watch.end()
    found = watch.figures(0)
    assert found["gap_us"] is None and found["busy_share"] == 1.0
    assert set(found["host_parts_us"]) == {"all", "launch", "other"}


def test_a_profile_compares_modes_of_run_ahead_and_is_printed_in_a_few_lines(tmp_path: Path) -> None:
    options = [
        "--geometry",
        "tiny",
        "--device",
        "cpu",
        "--cases",
        "2x8x4",
        "--ways",
        "--profile",
        "--run-ahead",
        "0",
        "1",
    ]
    printed = run_script("latency.py", *options, "--label", "t", "--out", str(tmp_path))
    profile = json.loads((tmp_path / "latency-t.json").read_text())["profile"]
    assert [(row["run_ahead"], row["case"]) for row in profile] == [(mode, f"2x8x{num_steps(2)}") for mode in (0, 1)]
    for row in profile:
        assert 0 < row["busy_share"] <= 1 and row["graph_us"] > 0 and row["cpu_share"] > 0
        assert set(row["gap_us"]) == {"p50", "p99"}
    without, ahead = profile
    assert without["groups"] == [] and without["table"] == []
    assert {"gemm qkv", "gemm lm_head", "attention", "gaps"} <= {row["name"] for row in ahead["groups"]}
    assert "device busy" in printed and "gemm gate_up" in printed
    assert len(report.profile_lines(profile)) < 20
