"""What a checkpoint's config.json says, checked, and how tensor parallelism divides it.

Runs in: driver | worker | server. No torch: the driver refuses a model it cannot serve before any process starts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from zmqexec.errors import CheckpointError, ConfigError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)
ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
GPU_HEAD_DIMS = (64, 80, 96, 128, 256)
"""Sizes of heads that csrc/cuda/paged_attention.cu has."""


class RopeConfig(Struct, frozen=True, kw_only=True):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its context extensions.

    linear   positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)
    dynamic  NTK-aware base that grows with the length beyond `original_max_position` (transformers' rule)
    llama3   low frequencies divided by `factor`, a smooth band in between (Llama 3.1)
    """

    rope_type: Literal["default", "linear", "dynamic", "llama3"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0


class ModelConfig(Struct, frozen=True, kw_only=True):
    """The geometry of a Llama-family model."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]

    def kv_bytes_per_token(self, tp_size: int, dtype_bytes: int) -> int:
        """KV cache bytes that one token takes on one rank."""
        return 2 * self.num_layers * len(Sharding(self, 0, tp_size).kv_heads) * self.head_dim * dtype_bytes


def padded_head_dim(head_dim: int) -> int:
    """The size to which a GPU worker in half precision pads heads: the smallest of `GPU_HEAD_DIMS` that holds them.

    `head_dim` itself where there is none so large.
    """
    return next((size for size in GPU_HEAD_DIMS if size >= head_dim), head_dim)


class Sharding:
    """The part of each layer that rank `rank` of `tp_size` holds, as half-open ranges.

    heads         query heads [start, stop)
    kv_heads      KV head ids; local query head h reads local KV head h // (num local heads // len(kv_heads)). A head
                  appears on several ranks, or more than once, where the numbers do not divide.
    intermediate  rows of gate and up, columns of down; the last ranks may hold less
    vocab         rows of the embedding and of lm_head; every rank has `padded_vocab // tp_size`, those past the
                  vocabulary's end are zero
    """

    def __init__(self, config: ModelConfig, rank: int, tp_size: int) -> None:
        local_heads = config.num_heads // tp_size
        group = math.gcd(local_heads, config.num_heads // config.num_kv_heads)
        self.heads = range(rank * local_heads, (rank + 1) * local_heads)
        self.kv_heads = [head * config.num_kv_heads // config.num_heads for head in self.heads[::group]]
        self.intermediate = _share(config.intermediate_size, rank, tp_size)
        self.vocab = _share(config.vocab_size, rank, tp_size)
        self.padded_vocab = -(-config.vocab_size // tp_size) * tp_size


def _share(size: int, rank: int, tp_size: int) -> range:
    part = -(-size // tp_size)
    return range(min(rank * part, size), min((rank + 1) * part, size))


def check_tensor_parallel(config: ModelConfig, tp_size: int) -> None:
    """`ConfigError` where the query heads cannot be shared out evenly."""
    if config.num_heads % tp_size:
        fitting = [n for n in range(1, config.num_heads + 1) if config.num_heads % n == 0]
        raise ConfigError(
            f"tensor_parallel_size={tp_size} does not divide the model's {config.num_heads} query heads; "
            f"use one of {', '.join(map(str, fitting))}",
            "tensor_parallel_size",
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `CheckpointError` names the file when it is missing or damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} a Hugging Face checkpoint folder?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def load_model_config(model_dir: Path) -> ModelConfig:
    """Read and check `model_dir`/config.json and the end tokens of generation_config.json."""
    if not model_dir.is_dir():
        raise CheckpointError(f"model folder {str(model_dir)!r} does not exist or is not a folder")
    raw = read_json(model_dir / "config.json")
    generation_path = model_dir / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    return parse_model_config(raw, generation)


def parse_model_config(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of the contents of config.json (transformers 4 and 5 spellings) and generation_config.json."""
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(f"config.json: architectures={architectures!r} is not a list of names")
    if not any(name in SUPPORTED_ARCHITECTURES for name in architectures):
        named = ", ".join(map(str, architectures)) or "none"
        raise CheckpointError(f"unsupported architecture: {named}; supported: {', '.join(SUPPORTED_ARCHITECTURES)}")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"config.json: hidden_act={activation!r} is not supported; supported: silu")

    num_heads = _positive(raw, "num_attention_heads")
    hidden_size = _positive(raw, "hidden_size")
    num_kv_heads = _positive(raw, "num_key_value_heads", default=num_heads)
    head_dim = _positive(raw, "head_dim", default=hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim={head_dim} is odd; rotary embeddings need an even one")
    max_position = _positive(raw, "max_position_embeddings", default=2048)
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    return ModelConfig(
        architecture=next(name for name in architectures if name in SUPPORTED_ARCHITECTURES),
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=_positive(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, max_position),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position_embeddings=max_position,
        dtype=_dtype(raw),
        eos_token_ids=_token_ids(eos),
    )


def _rope(raw: dict[str, Any], max_position: int) -> RopeConfig:
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"config.json: rope_scaling={scaling!r} is not an object")
    rope_type: Any = scaling.get("rope_type", scaling.get("type", "default")) or "default"
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"config.json: rope_type={rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(f"config.json: partial_rotary_factor={partial!r} is not supported; supported: 1.0")
    theta_source = scaling if "rope_theta" in scaling else raw
    return RopeConfig(
        rope_type=rope_type,
        theta=_number(theta_source, "rope_theta", 10000.0),
        factor=_number(scaling, "factor", 1.0),
        low_freq_factor=_number(scaling, "low_freq_factor", 1.0),
        high_freq_factor=_number(scaling, "high_freq_factor", 4.0),
        original_max_position=_positive(
            scaling,
            "original_max_position_embeddings",
            default=_positive(raw, "original_max_position_embeddings", default=max_position),
        ),
    )


def _dtype(raw: dict[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"config.json: dtype={name!r} is not supported; supported: float32, bfloat16, float16")
    return name


def _positive(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"config.json: {name}={value!r} must be a positive integer")
    return value


def _number(raw: dict[str, Any], name: str, default: float) -> float:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {name}={value!r} must be a positive number")
    return float(value)


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise CheckpointError(f"eos_token_id={value!r} must be a token id or a list of them")
    return tuple(ids)
