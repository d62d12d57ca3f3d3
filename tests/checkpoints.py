"""Random Hugging Face checkpoints for tests, and what transformers makes of them.

The weights are spread widely enough that the likeliest token stands clear of the next one: greedy tokens then do not
hang on the order of additions.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

logging.getLogger("transformers").setLevel(logging.ERROR)
transformers_logging.disable_progress_bar()

DEFAULTS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa-tied": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
    "mqa-odd-vocab": {"num_key_value_heads": 1, "head_dim": 40, "vocab_size": 131, "intermediate_size": 90},
    "linear-biases": {
        "hidden_size": 96,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
    },
    "dynamic-ntk": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0},
    },
    "llama3-gqa": {
        "hidden_size": 96,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "vocab_size": 257,
        "intermediate_size": 77,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}
"""Geometries that together use every feature of the family; all can be served at tensor_parallel_size 1, 2 and 4."""


def make_model(seed: int = 0, std: float = 0.2, **overrides: Any) -> LlamaForCausalLM:
    """A float32 Llama with random weights, biases and norms; `overrides` are fields of `LlamaConfig`."""
    config = LlamaConfig(**{**DEFAULTS, **overrides})
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.normal_(std=0.4, generator=generator)
        else:
            parameter.normal_(std=std, generator=generator)
    return model


def make_checkpoint(path: Path, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> LlamaForCausalLM:
    """Write a random checkpoint to `path` and return its model, the truth for tests.

    `max_shard_size` as in `save_pretrained` ("100KB" makes several files); `overrides` as in `make_model`.
    """
    model = make_model(seed, **overrides)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


@dataclass(frozen=True)
class Expected:
    """What transformers generates for one prompt.

    tokens    the output
    logprobs  float32 [len(prompt) + len(tokens) - 1, vocab]; row i is about token i + 1 of prompt and output
    """

    tokens: list[int]
    logprobs: np.ndarray


def random_prompts(vocab_size: int, lengths: list[int], seed: int = 1) -> list[list[int]]:
    """One prompt of random tokens for each of `lengths`."""
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(length)] for length in lengths]


def greedy(model: LlamaForCausalLM, prompts: list[list[int]], num_tokens: int) -> list[Expected]:
    """Greedy generation of each prompt by transformers, as if it ran alone."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    expected: dict[int, Expected] = {}
    for indices in by_length.values():
        # Prompts of one length need no padding, so nothing of one reaches another.
        expected.update(zip(indices, _greedy(model, [prompts[index] for index in indices], num_tokens), strict=True))
    return [expected[index] for index in range(len(prompts))]


@torch.inference_mode()
def _greedy(model: LlamaForCausalLM, prompts: list[list[int]], num_tokens: int) -> list[Expected]:
    # Dynamic RoPE remembers the longest sequence that it has seen.
    rotary = model.model.rotary_emb
    rotary.max_seq_len_cached = rotary.original_max_seq_len
    rotary.inv_freq = rotary.original_inv_freq.clone()
    output = model(torch.tensor(prompts), use_cache=True)
    logits = [output.logits]
    tokens = [output.logits[:, -1].argmax(-1)]
    while len(tokens) < num_tokens:
        output = model(tokens[-1].unsqueeze(1), past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
        tokens.append(output.logits[:, -1].argmax(-1))
    logprobs = torch.cat(logits, dim=1).float().log_softmax(-1).numpy()
    return [Expected(own.tolist(), rows) for own, rows in zip(torch.stack(tokens, dim=1), logprobs, strict=True)]
