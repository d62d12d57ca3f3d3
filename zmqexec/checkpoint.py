"""A safetensors checkpoint on disk: which tensors it holds, where, and whether that is what the model needs.

Runs in: driver | worker. No torch: only the headers are read here. Format: https://github.com/huggingface/safetensors
(8 bytes little-endian header length, a JSON header, then the tensors' bytes).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from zmqexec.errors import CheckpointError
from zmqexec.model_config import ModelConfig, read_json

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


class TensorInfo(Struct, frozen=True):
    """Where a tensor lies. `begin` and `end` are offsets in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Checkpoint:
    """The tensors of the *.safetensors files of a folder, by name."""

    def __init__(self, model_dir: Path) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(model_dir):
            for name, info in _read_header(file):
                self.tensors[name] = info

    def check(self, config: ModelConfig) -> None:
        """`CheckpointError` unless every tensor that `config` calls for is there, in its shape and a known type."""
        for name, shape in expected_tensors(config):
            info = self.tensors.get(name)
            if info is None:
                raise CheckpointError(f"the checkpoint has no tensor {name!r}, which config.json calls for")
            if info.shape != shape:
                raise CheckpointError(
                    f"tensor {name!r} in {info.file.name} has shape {list(info.shape)}, "
                    f"but config.json calls for {list(shape)}"
                )
            if info.dtype not in DTYPE_BYTES:
                raise CheckpointError(
                    f"tensor {name!r} in {info.file.name} is of type {info.dtype}; supported: {', '.join(DTYPE_BYTES)}"
                )


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a Llama checkpoint with this geometry."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        linears = [
            ("self_attn.q_proj", q_rows, hidden, config.attention_bias),
            ("self_attn.k_proj", kv_rows, hidden, config.attention_bias),
            ("self_attn.v_proj", kv_rows, hidden, config.attention_bias),
            ("self_attn.o_proj", hidden, q_rows, config.attention_bias),
            ("mlp.gate_proj", inner, hidden, config.mlp_bias),
            ("mlp.up_proj", inner, hidden, config.mlp_bias),
            ("mlp.down_proj", hidden, inner, config.mlp_bias),
        ]
        for name, rows, columns, bias in linears:
            yield f"{prefix}{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}{name}.bias", (rows,)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _weight_files(model_dir: Path) -> list[Path]:
    """The files of the index where there is one (a folder may hold the weights twice), else every *.safetensors."""
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of file names")
        files = [model_dir / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if file.parent != model_dir or not file.is_file():
                raise CheckpointError(f"{index} names {file.name!r}, which is not in {model_dir}")
        return files
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{model_dir} has no *.safetensors file; convert the checkpoint to safetensors first")
    return files


def _read_header(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{file} is truncated or not a safetensors file: {size} bytes")
        header_bytes = stream.read(length)
    try:
        header = msgspec.json.decode(header_bytes, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} has a damaged safetensors header: {error}") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield name, _tensor_info(file, size, 8 + length, name, entry)


def _tensor_info(file: Path, size: int, data_start: int, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (data_start + int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file} has a damaged safetensors header: tensor {name!r} is {entry!r}") from None
    if end > size:
        raise CheckpointError(f"{file} is truncated: tensor {name!r} ends at byte {end}, the file has {size}")
    element = DTYPE_BYTES.get(dtype)
    if element is not None and (min(shape, default=1) < 0 or math.prod(shape) * element != end - begin):
        raise CheckpointError(f"{file}: tensor {name!r} of shape {list(shape)} does not fill bytes {begin} to {end}")
    return TensorInfo(file, dtype, shape, begin, end)
