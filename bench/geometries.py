"""Named model geometries for benchmarks: a checkpoint folder that holds nothing but config.json.

`load_format="dummy"` fills it with random weights. A folder without a tokenizer is fine: prompts are token ids, and so
are the outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "rope_theta": 10000.0,
}

GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 4096,
    },
    "llama-2-70b": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


def config_of(name: str) -> dict[str, Any]:
    """The contents of config.json."""
    return {**COMMON, **GEOMETRIES[name]}


def write_folder(name: str, folder: Path) -> Path:
    """Write `folder`/config.json; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(name), indent=1) + "\n")
    return folder


def num_parameters(name: str) -> int:
    """All weights of the model."""
    geometry = GEOMETRIES[name]
    return _streamed_parameters(geometry) + geometry["vocab_size"] * geometry["hidden_size"]


def decode_weight_bytes(name: str, dtype: str) -> int:
    """Weight bytes that one decode step must read: all but the embedding, of which it reads a row per sequence."""
    return _streamed_parameters(GEOMETRIES[name]) * BYTES[dtype]


def kv_bytes_per_token(name: str, dtype: str) -> int:
    """KV cache bytes of one token, on all ranks together where the KV heads divide."""
    geometry = GEOMETRIES[name]
    width = geometry["num_key_value_heads"] * geometry["head_dim"]
    return 2 * geometry["num_hidden_layers"] * width * BYTES[dtype]


def _streamed_parameters(geometry: dict[str, Any]) -> int:
    hidden, head_dim = geometry["hidden_size"], geometry["head_dim"]
    query, kv = geometry["num_attention_heads"] * head_dim, geometry["num_key_value_heads"] * head_dim
    attention = hidden * (query + 2 * kv) + query * hidden
    layer = attention + 3 * hidden * geometry["intermediate_size"] + 2 * hidden
    return geometry["num_hidden_layers"] * layer + hidden + geometry["vocab_size"] * hidden
