"""A deterministic engine from the front door: processes, real collectives, and on GPUs real graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zmqexec import Engine, SamplingParams

PROMPTS = ["The driver of zmqexec decides each step, and", "count: 17 18 19", "Who are you?", [7] * 40, "The bus"]
PARAMS = [
    SamplingParams(temperature=0.9, seed=1, max_tokens=50, ignore_eos=True, logprobs=3),
    SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True),
    SamplingParams(temperature=1.2, seed=2, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=3, max_tokens=30, frequency_penalty=0.5, logprobs=1),
    SamplingParams(temperature=0.7, top_p=0.9, seed=4, max_tokens=40, ignore_eos=True),
]
CPU_TOKEN_BYTES = 2 * 3 * 4 * 16 * 4  # keys and values of 3 layers with 4 KV heads of 16 float32
GPU_TOKEN_BYTES = 2 * 3 * 4 * 64 * 2  # of heads padded to 64, in bfloat16


@pytest.mark.parametrize(
    ("device", "tp_size"),
    [("cpu", 2), *(pytest.param("cuda", size, marks=pytest.mark.gpu) for size in (1, 2))],
)
def test_requests_alone_and_in_a_crowd_that_is_preempted_give_the_same_bits(device: str, tp_size: int) -> None:
    if device == "cuda" and torch.cuda.device_count() < tp_size:
        pytest.skip(f"needs {tp_size} NVIDIA GPUs")
    token_bytes = (CPU_TOKEN_BYTES if device == "cpu" else GPU_TOKEN_BYTES) // tp_size
    settings: dict[str, Any] = {
        "device": device, "tensor_parallel_size": tp_size, "num_threads": 1, "max_model_len": 128,
        "deterministic": True, "check_ranks": True,
    }  # fmt: skip
    if device == "cuda":
        settings |= {"dtype": "bfloat16"}

    with Engine(**settings, kv_cache_memory_bytes=4096 * token_bytes) as engine:
        alone = [engine.generate([prompt], params)[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    crowded = {"max_num_batched_tokens": 24, "max_num_seqs": 8, "kv_cache_memory_bytes": 160 * token_bytes}
    with Engine(**settings, **crowded) as engine:
        together = engine.generate(PROMPTS, PARAMS)
        assert engine.stats.preemptions > 0
    with Engine(**settings, kv_cache_memory_bytes=4096 * token_bytes, cuda_graphs=False, run_ahead=0) as engine:
        engine.generate([PROMPTS[0]], SamplingParams(max_tokens=1))  # leaves its blocks to be found
        again = engine.generate(PROMPTS, PARAMS)

    for one, *others in zip(alone, together, again, strict=True):
        assert {repr((other.outputs[0].token_ids, other.outputs[0].logprobs)) for other in others} == {
            repr((one.outputs[0].token_ids, one.outputs[0].logprobs))
        }
