"""The weights that one rank holds: which slices of which tensors, read from a checkpoint or made at random.

Runs in: worker.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open

from zmqexec.checkpoint import Checkpoint, TensorInfo, expected_tensors
from zmqexec.errors import CheckpointError
from zmqexec.model_config import ModelConfig, Sharding

CHECKPOINT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
RANDOM_STD = 0.02
RANDOM_BLOCK_ROWS = 1024
CPU = torch.device("cpu")


@dataclass(frozen=True)
class LayerWeights:
    """One layer's shard. q_rows = len(heads) · head_dim, kv_rows = len(kv_heads) · head_dim, inner = len(intermediate).

    input_norm, post_norm  [hidden]
    qkv                    [q_rows + 2 · kv_rows, hidden]: query heads, key heads, value heads
    o                      [hidden, q_rows]
    gate_up                [2 · inner, hidden]: gate rows, then up rows
    down                   [hidden, inner]
    *_bias                 [rows of the matrix] or None. Those of `o` and `down` are on rank 0 alone: the sum over the
                           ranks must contain them once.
    """

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True)
class LlamaWeights:
    """A rank's shard of the model.

    embedding  [padded_vocab // tp_size, hidden]; rows past the vocabulary are zero
    lm_head    the same shape; the same tensor where the embeddings are tied
    norm       [hidden]
    """

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    lm_head: torch.Tensor


class TensorSource(Protocol):
    """Where full tensors come from, slice by slice."""

    def read(self, name: str, rows: Sequence[range], columns: range | None) -> torch.Tensor:
        """The `rows` of tensor `name`, one range below the other, and of those the `columns` (None: all)."""
        ...


class TensorSlice(NamedTuple):
    """One call of a source's `read`."""

    name: str
    rows: Sequence[range]
    columns: range | None


def find_tensor(tensors: dict[str, TensorInfo], name: str) -> TensorInfo:
    """Where a tensor lies. `CheckpointError` where it is missing or of a type that is not supported."""
    info = tensors.get(name)
    if info is None:
        raise CheckpointError(f"the checkpoint has no tensor {name!r}")
    if info.dtype not in CHECKPOINT_DTYPES:
        raise CheckpointError(
            f"tensor {name!r} in {info.file.name} is of type {info.dtype}; supported: {', '.join(CHECKPOINT_DTYPES)}"
        )
    return info


class SafetensorsSource:
    """Slices of a checkpoint's tensors; only the bytes of the slices are read."""

    def __init__(self, model_dir: Path) -> None:
        self._tensors = Checkpoint(model_dir).tensors
        self._files: dict[Path, Any] = {}

    def read(self, name: str, rows: Sequence[range], columns: range | None) -> torch.Tensor:
        info = find_tensor(self._tensors, name)
        if info.file not in self._files:
            self._files[info.file] = safe_open(info.file, framework="pt")
        tensor = self._files[info.file].get_slice(name)
        if columns is None:
            parts = [tensor[part.start : part.stop] for part in rows]
        else:
            parts = [tensor[part.start : part.stop, columns.start : columns.stop] for part in rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class RandomSource:
    """Random tensors for benchmarks, made on `device`: of one kind of device, every tp_size shards the same model.

    Matrices are made in blocks of `RANDOM_BLOCK_ROWS` rows, each with a seed of its own, so that a rank makes only
    the blocks it holds. Norm weights are one.
    """

    def __init__(self, config: ModelConfig, device: torch.device = CPU) -> None:
        self._shapes = dict(expected_tensors(config))
        self._device = device

    def read(self, name: str, rows: Sequence[range], columns: range | None) -> torch.Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self._device)
        blocks: dict[int, torch.Tensor] = {}
        parts = []
        for part in rows:
            for index in range(part.start // RANDOM_BLOCK_ROWS, -(-part.stop // RANDOM_BLOCK_ROWS)):
                begin = index * RANDOM_BLOCK_ROWS
                if index not in blocks:
                    blocks[index] = self._block(name, index, (min(RANDOM_BLOCK_ROWS, shape[0] - begin), *shape[1:]))
                parts.append(blocks[index][max(part.start - begin, 0) : part.stop - begin])
        tensor = torch.cat(parts) if parts else torch.empty((0, *shape[1:]), device=self._device)
        return tensor if columns is None else tensor[:, columns.start : columns.stop]

    def _block(self, name: str, index: int, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{name}:{index}".encode()))
        return torch.empty(shape, device=self._device).normal_(std=RANDOM_STD, generator=generator)


class ProgressSource:
    """`inner` on `device` and in `dtype`, reporting the bytes read so far to `on_progress(done, total)`."""

    def __init__(
        self,
        inner: TensorSource,
        dtype: torch.dtype,
        total: int,
        on_progress: Callable[[int, int], None],
        device: torch.device,
    ) -> None:
        self._inner = inner
        self._dtype = dtype
        self._device = device
        self._done = 0
        self._total = total
        self._on_progress = on_progress

    def read(self, name: str, rows: Sequence[range], columns: range | None) -> torch.Tensor:
        tensor = self._inner.read(name, rows, columns)
        self._done += tensor.numel() * self._dtype.itemsize
        self._on_progress(self._done, self._total)
        return tensor.to(self._device).to(self._dtype)


class _Slices:
    """A source that reads nothing, notes what it is asked for, and adds up the elements."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = dict(expected_tensors(config))
        self.elements = 0
        self.slices: list[TensorSlice] = []

    def read(self, name: str, rows: Sequence[range], columns: range | None) -> torch.Tensor:
        shape = [sum(map(len, rows)), *self._shapes[name][1:]]
        if columns is not None:
            shape[1] = len(columns)
        self.elements += math.prod(shape)
        self.slices.append(TensorSlice(name, rows, columns))
        # Without rows, not on the meta device: concatenating there imports torch's compiler, which takes seconds.
        return torch.empty((0, *shape[1:]))


def slices_of(config: ModelConfig, sharding: Sharding, rank: int, tp_size: int) -> list[TensorSlice]:
    """What `load_weights` will read for this rank, in its order."""
    noted = _Slices(config)
    _assemble(config, sharding, rank, tp_size, noted)
    return noted.slices


def load_weights(
    config: ModelConfig,
    sharding: Sharding,
    rank: int,
    tp_size: int,
    source: TensorSource,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None],
    device: torch.device = CPU,
) -> LlamaWeights:
    """This rank's shard on `device`, in `dtype`. `on_progress(done, total)` counts its bytes in `dtype`.

    `CheckpointError` where a tensor is missing or of a type that is not supported.
    """
    noted = _Slices(config)
    _assemble(config, sharding, rank, tp_size, noted)
    total = noted.elements * dtype.itemsize
    on_progress(0, total)
    source = ProgressSource(source, dtype, total, on_progress, device)
    return _assemble(config, sharding, rank, tp_size, source)


def _assemble(config: ModelConfig, sharding: Sharding, rank: int, tp_size: int, source: TensorSource) -> LlamaWeights:
    vocab_rows = sharding.padded_vocab // tp_size
    embedding = _read_vocab(source, sharding.vocab, vocab_rows, "model.embed_tokens.weight")
    layers = [_assemble_layer(config, sharding, rank, source, layer) for layer in range(config.num_layers)]
    norm = source.read("model.norm.weight", [range(config.hidden_size)], None)
    tied = config.tie_word_embeddings
    lm_head = embedding if tied else _read_vocab(source, sharding.vocab, vocab_rows, "lm_head.weight")
    return LlamaWeights(embedding=embedding, layers=layers, norm=norm, lm_head=lm_head)


def _assemble_layer(
    config: ModelConfig, sharding: Sharding, rank: int, source: TensorSource, layer: int
) -> LayerWeights:
    prefix = f"model.layers.{layer}."
    head_dim, hidden = config.head_dim, range(config.hidden_size)
    q_rows = range(sharding.heads.start * head_dim, sharding.heads.stop * head_dim)
    kv_rows = [range(head * head_dim, (head + 1) * head_dim) for head in sharding.kv_heads]
    inner = sharding.intermediate

    def stacked(names: dict[str, list[range]], kind: str, wanted: bool = True) -> torch.Tensor | None:
        if not wanted:
            return None
        return torch.cat([source.read(f"{prefix}{name}.{kind}", rows, None) for name, rows in names.items()])

    def columns(name: str, part: range) -> torch.Tensor:
        # A copy, so that a column slice does not keep the whole tensor alive.
        return source.read(f"{prefix}{name}.weight", [hidden], part).contiguous().clone()

    def bias(name: str, wanted: bool) -> torch.Tensor | None:
        return source.read(f"{prefix}{name}.bias", [hidden], None) if wanted and rank == 0 else None

    qkv = {"self_attn.q_proj": [q_rows], "self_attn.k_proj": kv_rows, "self_attn.v_proj": kv_rows}
    gate_up = {"mlp.gate_proj": [inner], "mlp.up_proj": [inner]}
    qkv_weight, gate_up_weight = stacked(qkv, "weight"), stacked(gate_up, "weight")
    assert qkv_weight is not None and gate_up_weight is not None
    return LayerWeights(
        input_norm=source.read(prefix + "input_layernorm.weight", [hidden], None),
        post_norm=source.read(prefix + "post_attention_layernorm.weight", [hidden], None),
        qkv=qkv_weight,
        qkv_bias=stacked(qkv, "bias", config.attention_bias),
        o=columns("self_attn.o_proj", q_rows),
        o_bias=bias("self_attn.o_proj", config.attention_bias),
        gate_up=gate_up_weight,
        gate_up_bias=stacked(gate_up, "bias", config.mlp_bias),
        down=columns("mlp.down_proj", inner),
        down_bias=bias("mlp.down_proj", config.mlp_bias),
    )


def _read_vocab(source: TensorSource, held: range, vocab_rows: int, name: str) -> torch.Tensor:
    """The `held` rows of the embedding or lm_head, padded with zeros to the `vocab_rows` that every rank has."""
    rows = source.read(name, [held], None)
    if len(held) < vocab_rows:
        padding = torch.zeros((vocab_rows - len(held), rows.shape[1]), dtype=rows.dtype, device=rows.device)
        rows = torch.cat([rows, padding])
    return rows
