"""The benchmarks' harness: a case on a CPU gives the promised fields, and a child that fails costs its own results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geometries
import gpu
import pytest
from serving import kernel_runs
from serving.cases import Case
from serving.children import run_child
from serving.clock import run_generate, run_steps
from serving.kernel_module import plain

BENCH = Path(__file__).parents[2] / "bench"
TINY = ["--geometry", "tiny", "--device", "cpu", "--cases", "2x8x4", "--ways", "zmqexec", "--label", "t"]
HEAD = {"question", "date", "command", "machine", "versions", "settings", "geometry", "device", "dtype", "weight_bytes"}
HEAD |= {"copy_bandwidth", "starts", "results", "profile", "not_measured"}
SPREAD = {"median", "min", "max", "all"}


def run_script(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCH / arguments[0]), *arguments[1:]], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_latency_run_has_every_promised_field_and_no_place_of_this_machine(tmp_path: Path) -> None:
    printed = run_script("latency.py", *TINY, "--repetitions", "2", "--out", str(tmp_path))
    text = (tmp_path / "latency-t.json").read_text()
    result = json.loads(text)
    assert set(result) == HEAD
    assert result["not_measured"] == []
    (start,) = result["starts"]
    assert start["total_s"] == pytest.approx(start["engine_s"] + start["first_token_s"], abs=0.05)
    (row,) = result["results"]
    assert (row["way"], row["tp"], row["run_ahead"], row["case"]) == ("zmqexec", 1, 1, "2x8x4")
    assert (row["batch"], row["input_len"], row["output_len"]) == (2, 8, 4)
    for name in ("ttft_ms", "ttft_last_ms", "tpot_ms", "tpot_generate_ms", "generate_s", "generate_one_token_s"):
        assert set(row[name]) == SPREAD and len(row[name]["all"]) == 2
    assert row["decode_step_ms"]["count"] == 2 * 3  # the first of the 4 tokens comes with the prefill
    assert row["same_tokens"] == "4 of 4"
    assert row["preemptions"] == 0
    assert row["output_tokens_per_s"] > 0
    assert 0 < row["roofline_ms"] < row["roofline_kv_ms"]
    assert row["tpot_over_roofline"] == pytest.approx(row["tpot_ms"]["median"] / row["roofline_ms"], rel=1e-2)
    assert result["copy_bandwidth"]["device"] == "cpu"
    assert "2x8x4" in printed and "TPOT" in printed
    assert str(tmp_path) not in text and str(BENCH.parent) not in text


def test_a_throughput_run_times_whole_calls_alone(tmp_path: Path) -> None:
    run_script("throughput.py", *TINY, "--copy-tb-per-s", "0.01", "--out", str(tmp_path))
    (row,) = json.loads((tmp_path / "throughput-t.json").read_text())["results"]
    assert row["tpot_ms"] is None and row["ttft_ms"] is None
    assert row["output_tokens_per_s"] == pytest.approx(8 / row["generate_s"]["median"], rel=1e-2)


FAKE_VLLM = """
from types import SimpleNamespace as Fields
__version__ = "0.0"
SamplingParams = lambda **fields: Fields(**fields)
class LLM:
    def __init__(self, folder, **settings):
        assert settings["load_format"] == "dummy" and settings["skip_tokenizer_init"]
        self.llm_engine = ENGINE
        self.open = {}
    def generate(self, prompts, params, use_tqdm):
        assert not use_tqdm and not params.detokenize and params.ignore_eos
        return [Fields(outputs=[Fields(token_ids=[7] * params.max_tokens)]) for prompt in prompts]
    def add_request(self, name, prompt, params):
        self.open[name] = [params.max_tokens, 0]
    def has_unfinished_requests(self):
        return bool(self.open)
    def step(self):
        moved = []
        for name, state in list(self.open.items()):
            state[1] += 1
            finished = state[0] == state[1]
            moved.append(Fields(request_id=name, finished=finished, outputs=[Fields(token_ids=[7] * state[1])]))
            if finished:
                del self.open[name]
        return moved
"""


@pytest.mark.parametrize("is_stepped", [True, False])
def test_vllm_is_measured_step_by_step_and_where_its_engine_is_another_as_a_whole(
    tmp_path: Path, is_stepped: bool
) -> None:
    engine = "self" if is_stepped else "Fields(has_unfinished_requests=lambda: False)"
    (tmp_path / "vllm.py").write_text(FAKE_VLLM.replace("ENGINE", engine))
    job = {"folder": "f", "dtype": "bfloat16", "tp": 1, "max_model_len": 64, "max_num_seqs": 8, "cuda_graphs": True}
    job |= {"cases": ["2x8x4"], "vocab_size": 50, "repetitions": 2, "whole_only": False}
    found: list[dict[str, Any]] = []
    environment = {"PYTHONPATH": os.pathsep.join([str(BENCH), str(tmp_path)])}
    assert run_child(["-m", "serving.vllm_peer", json.dumps(job)], 60.0, found.append, env=environment) is None
    start, row = found
    assert start["version"] == "0.0" and start["total_s"] >= 0
    assert row["case"] == "2x8x4" and row["generate_s"]["median"] > 0
    assert (row["same_tokens"] == "4 of 4") if is_stepped else (row["tpot_ms"] is None)


def test_the_driver_is_timed_part_by_part(tmp_path: Path) -> None:
    run_script("driver_cost.py", "--sequences", "4", "--label", "t", "--out", str(tmp_path))
    result = json.loads((tmp_path / "driver-cost-t.json").read_text())
    assert set(result["parts_us"]) == {"collect", "update", "detokenize", "outputs", "schedule", "publish", "encode"}
    assert result["total_us"]["p50"] > 0
    assert result["budget_us"] == 800


@dataclass
class Output:
    request_id: str
    token_ids: list[int]
    finished: bool

    @property
    def outputs(self) -> list[Output]:
        return [self]


@dataclass
class ScriptedEngine:
    """Gives (request id, tokens so far, finished) step by step."""

    script: list[list[tuple[str, int, bool]]]
    added: list[Any] = field(default_factory=list)

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.added.append((request_id, prompt["prompt_token_ids"]))

    def has_unfinished_requests(self) -> bool:
        return bool(self.script)

    def step(self) -> list[Output]:
        return [Output(name, list(range(count)), finished) for name, count, finished in self.script.pop(0)]


def test_the_decode_window_holds_the_steps_in_which_the_whole_batch_decodes() -> None:
    engine = ScriptedEngine(
        [
            [],  # published, with run-ahead
            [("0", 1, False)],
            [("0", 2, False), ("1", 1, False)],  # the window begins: everybody has a token
            [("0", 3, False), ("1", 2, False)],
            [("0", 4, True), ("1", 3, False)],  # and ends: the first is done
            [("1", 4, True)],
        ]
    )
    timeline = run_steps(engine, [[5, 6], [7, 8]], None)
    assert engine.added == [("0", [5, 6]), ("1", [7, 8])]
    assert len(timeline.decode_s) == 2
    assert timeline.ttft_s[0] <= timeline.ttft_s[1] <= timeline.total_s
    assert timeline.tokens == [[0, 1, 2, 3]] * 2


def test_a_batch_that_never_decodes_together_has_no_window() -> None:
    engine = ScriptedEngine([[("0", 1, True)], [("1", 1, True)]])
    assert run_steps(engine, [[1], [2]], None).decode_s == []


def test_generate_gets_token_ids_and_gives_them() -> None:
    def generate(prompts: list[dict[str, Any]], params: Any, use_tqdm: bool) -> list[Output]:
        return [Output("", prompt["prompt_token_ids"], True) for prompt in prompts]

    assert run_generate(generate, [[1, 2], [3]], None)[1] == [[1, 2], [3]]


def test_the_roofline_of_llama_2_7b_is_the_known_one() -> None:
    assert geometries.num_parameters("llama-2-7b") == 6_738_415_616
    assert geometries.num_parameters("llama-3.1-8b") == 8_030_261_248
    assert geometries.decode_weight_bytes("llama-2-7b", "bfloat16") / 1e9 == pytest.approx(13.21, abs=0.01)
    assert geometries.kv_bytes_per_token("llama-2-70b", "bfloat16") == 320 << 10


def test_prompts_are_the_same_for_a_seed_and_others_for_another() -> None:
    case = Case.parse("3x4x5")
    assert case.prompts(100, 1) == case.prompts(100, 1) != case.prompts(100, 2)
    assert [len(prompt) for prompt in case.prompts(100, 1)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("ending", "why"),
    [
        ("", None),
        ("raise RuntimeError('no kernel')", "exit code 1: RuntimeError: no kernel"),
        ("import os; os.abort()", "SIGABRT: "),
        ("import time; time.sleep(60)", "took longer than 6 s"),
    ],
)
def test_what_a_child_had_found_before_it_failed_counts(ending: str, why: str | None) -> None:
    found: list[dict[str, Any]] = []
    program = f"from serving.children import emit\nprint('noise')\nemit({{'us': 1.5}})\n{ending}"
    begin = time.monotonic()
    ended = run_child(["-c", program], 6.0 if why and "longer" in why else 60.0, found.append)
    assert found == [{"us": 1.5}]
    assert time.monotonic() - begin < 30
    assert (ended is None) if why is None else ended is not None and ended.startswith(why)


def test_a_grandchild_that_keeps_the_pipe_open_holds_nobody_up() -> None:
    program = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    assert run_child(["-c", program], 50.0, lambda found: None) is None
    assert time.monotonic() - begin < 30


def test_kernel_modules_are_found_by_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu_kernels").mkdir()
    for name, text in {
        "b.py": "import not_there\ndef measure(device): ...",
        "a.py": "def check(device): ...",
        "helper.py": "",
        "_c.py": "def check(device): ...",
    }.items():
        (tmp_path / "gpu_kernels" / name).write_text(text)
    monkeypatch.setattr(kernel_runs, "BENCH", tmp_path)
    assert kernel_runs.kernel_modules(None) == ["a", "b"]
    assert kernel_runs.kernel_modules(["b"]) == ["b"]


def test_a_check_fails_if_it_says_so_and_rows_are_short_lines() -> None:
    assert (
        kernel_runs.passed({"name": "x"}) and kernel_runs.passed({"ok": True}) and not kernel_runs.passed({"ok": False})
    )
    assert not kernel_runs.passed({"passed": False})
    assert kernel_runs.in_one_line({"name": "gemv", "us": 1.23456, "all": [1, 2]}) == "gemv us=1.235"
    assert gpu.shortened(list("abcde"), 3) == ["a", "b", "… 3 more lines: see the JSON"]
    assert json.dumps(plain({"a": (Path("x"), 1.5, None)})) == '{"a": ["x", 1.5, null]}'
