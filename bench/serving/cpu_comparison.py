"""The engine on the CPU, beside transformers `generate` on the same batch with the same threads in all.

64 requests of 256 tokens in and 64 out, greedy, on a random Llama of 20 million parameters in float32. Three ways take
turns, so that a slow minute of the machine hits all of them: one worker with 2 threads, two workers with 1 thread each,
and transformers with 2 threads. Engines stay open between their turns and burn nothing while they wait.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import provenance
import torch
import transformers

from zmqexec import Engine, SamplingParams

NUM_REQUESTS, INPUT_LEN, OUTPUT_LEN = 64, 256, 64
THREADS = 2
GEOMETRY = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 9,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}


def compare(repetitions: int, output: Path) -> None:
    """Measure, print the table and write `output`."""
    torch.set_num_threads(THREADS)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    generator = random.Random(0)
    prompts = [[generator.randrange(GEOMETRY["vocab_size"]) for _ in range(INPUT_LEN)] for _ in range(NUM_REQUESTS)]
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        with open_engine(folder, 1) as one, open_engine(folder, 2) as two:
            ways: dict[str, Callable[[], list[list[int]]]] = {
                "zmqexec, 1 worker × 2 threads": lambda: run_engine(one, prompts),
                "zmqexec, 2 workers × 1 thread": lambda: run_engine(two, prompts),
                "transformers, 2 threads": lambda: run_transformers(model, prompts),
            }
            seconds, agreement = measure(ways, repetitions)
    report(seconds, agreement, sum(weight.numel() for weight in model.parameters()), output)


def make_model(folder: Path) -> Any:
    """A random Llama, saved to `folder`."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GEOMETRY)).eval()
    model.save_pretrained(folder)
    return model


def open_engine(folder: str, num_workers: int) -> Engine:
    """An engine with `THREADS` threads in all. Without prefix caching: every repetition computes everything."""
    return Engine(
        folder,
        tensor_parallel_size=num_workers,
        num_threads=THREADS // num_workers,
        max_num_seqs=NUM_REQUESTS,
        enable_prefix_caching=False,
    )


def run_engine(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Output tokens of each prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    return [output.outputs[0].token_ids for output in engine.generate(prompts, params, use_tqdm=False)]


@torch.inference_mode()
def run_transformers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Output tokens of each prompt; they have one length, so the padded batch has no padding."""
    batch = torch.tensor(prompts)
    tokens = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=OUTPUT_LEN,
        min_new_tokens=OUTPUT_LEN,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens[:, INPUT_LEN:].tolist()


def measure(
    ways: dict[str, Callable[[], list[list[int]]]], repetitions: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each repetition, after one to warm up; and how many requests got transformers' tokens."""
    outputs = {name: run() for name, run in ways.items()}
    truth = outputs["transformers, 2 threads"]
    agreement = {name: sum(map(list.__eq__, own, truth)) for name, own in outputs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions):
        # The order turns, so that no way always follows the same other.
        names = list(ways)[repetition % len(ways) :] + list(ways)[: repetition % len(ways)]
        for name in names:
            started = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - started)
            print(f"{name:32} {seconds[name][-1]:6.2f} s   load {os.getloadavg()[0]:.1f}", flush=True)
    return seconds, agreement


def report(seconds: dict[str, list[float]], agreement: dict[str, int], parameters: int, output: Path) -> None:
    """Print the table and write the JSON."""
    baseline = statistics.median(seconds["transformers, 2 threads"])
    rows = []
    print(f"\n{'':32} {'median s':>8} {'tokens/s':>9} {'ratio':>6}  same tokens")
    for name, times in seconds.items():
        median = statistics.median(times)
        tokens_per_s = NUM_REQUESTS * OUTPUT_LEN / median
        rows.append(
            {
                "way": name,
                "median_s": round(median, 3),
                "all_s": [round(value, 3) for value in times],
                "output_tokens_per_s": round(tokens_per_s, 1),
                "speed_over_transformers": round(baseline / median, 3),
                "requests_with_transformers_tokens": agreement[name],
            }
        )
        same = f"{agreement[name]} of {NUM_REQUESTS}"
        print(f"{name:32} {median:8.2f} {tokens_per_s:9.0f} {baseline / median:6.2f}  {same}")
    result = {
        "question": "64 requests, 256 tokens in, 64 out, greedy, float32: seconds for all of them",
        "date": datetime.now(UTC).date().isoformat(),
        "command": provenance.command("bench/throughput.py"),
        "machine": {
            "cpu": provenance.cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "load_at_end": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": {**GEOMETRY, "parameters": parameters},
        "results": rows,
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
