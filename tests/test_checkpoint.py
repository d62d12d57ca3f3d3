"""config.json in both spellings, the tensors of a folder, and which rank holds what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from zmqexec.checkpoint import Checkpoint, expected_tensors
from zmqexec.demo import CHECKPOINT
from zmqexec.errors import CheckpointError, ConfigError
from zmqexec.model_config import (
    ModelConfig,
    RopeConfig,
    Sharding,
    check_tensor_parallel,
    load_model_config,
    parse_model_config,
)

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def parse(generation: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    return parse_model_config(BASE | fields, generation or {})


# ── config.json ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_config_json_leaves_out_is_as_in_transformers() -> None:
    config = parse()
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (4, 16, 2048)
    assert config.rope == RopeConfig(original_max_position=2048) and config.rms_norm_eps == 1e-6
    assert not (config.attention_bias or config.mlp_bias or config.tie_word_embeddings)
    assert config.dtype == "float32" and config.eos_token_ids == ()


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("version_4", "version_5"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.5}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        ),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"rope_scaling": None, "num_key_value_heads": None, "head_dim": None}, {}),
    ],
)
def test_the_spellings_of_transformers_4_and_5_mean_the_same(
    version_4: dict[str, Any], version_5: dict[str, Any]
) -> None:
    assert parse(**version_4) == parse(**version_5)


def test_rope_parameters_arrive() -> None:
    rope = parse(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}).rope
    assert rope == RopeConfig(
        rope_type="llama3",
        theta=5e5,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=64,
    )


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {}, ()),
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": [2, 3]}, {}, (2, 3)),
        ({"eos_token_id": 2}, {"eos_token_id": [4, 5]}, (4, 5)),
        ({"eos_token_id": 0}, {"temperature": 0.6}, (0,)),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(
    config: dict[str, Any], generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert parse(generation, **config).eos_token_ids == expected


@pytest.mark.parametrize("value", ["2", [2, "3"], -1, True, 2.0])
def test_end_tokens_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="eos_token_id"):
        parse(eos_token_id=value)


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tensors_that_the_config_calls_for_are_those_of_a_real_checkpoint() -> None:
    config = load_model_config(CHECKPOINT)
    checkpoint = Checkpoint(CHECKPOINT)
    checkpoint.check(config)
    assert {name for name, _ in expected_tensors(config)} == set(checkpoint.tensors)


def test_biases_and_tied_embeddings_change_what_is_called_for() -> None:
    plain = {name for name, _ in expected_tensors(parse())}
    biased = {name for name, _ in expected_tensors(parse(attention_bias=True, mlp_bias=True))}
    assert {name.rpartition(".")[2] for name in biased - plain} == {"bias"} and len(biased - plain) == 2 * 7
    assert plain - {name for name, _ in expected_tensors(parse(tie_word_embeddings=True))} == {"lm_head.weight"}


def test_every_tensor_is_found_where_it_lies(tmp_path: Path) -> None:
    arrays = {f"tensor {i}": np.arange(i * 6, dtype="<f4").reshape(i, 6) for i in range(1, 5)}
    save_file(dict(list(arrays.items())[:2]), tmp_path / "model-1.safetensors", metadata={"format": "pt"})
    save_file(dict(list(arrays.items())[2:]), tmp_path / "model-2.safetensors")
    found = Checkpoint(tmp_path).tensors
    assert set(found) == set(arrays)
    for name, info in found.items():
        assert info.shape == arrays[name].shape and info.dtype == "F32"
        assert info.file.read_bytes()[info.begin : info.end] == arrays[name].tobytes()


def test_where_there_is_an_index_only_its_files_count(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, "<f4")}, tmp_path / "model-1.safetensors")
    save_file({"a": np.zeros(3, "<f4")}, tmp_path / "consolidated.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert Checkpoint(tmp_path).tensors["a"].shape == (2,)
    for weight_map in ({"a": "../outside.safetensors"}, {"a": "absent.safetensors"}, {"a": 5}, ["a"]):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match="index"):
            Checkpoint(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_nothing_else(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((2, 3), "<f4"), "b": np.zeros(4, "<f2")}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    path.write_bytes(content)
    try:
        tensors = Checkpoint(tmp_path).tensors
    except CheckpointError:
        return
    assert all(0 <= info.begin <= info.end <= len(content) for info in tensors.values())


# ── sharding ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    tp_size=st.sampled_from([1, 2, 3, 4, 6, 8]),
    heads_per_rank=st.integers(1, 6),
    num_kv_heads=st.integers(1, 24),
    intermediate_size=st.integers(1, 200),
    vocab_size=st.integers(1, 300),
)
def test_every_head_row_and_token_is_held_by_the_ranks_as_needed(
    tp_size: int, heads_per_rank: int, num_kv_heads: int, intermediate_size: int, vocab_size: int
) -> None:
    num_heads = tp_size * heads_per_rank
    while num_heads % num_kv_heads:
        num_kv_heads -= 1
    config = parse(
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=8,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
    )
    check_tensor_parallel(config, tp_size)
    ranks = [Sharding(config, rank, tp_size) for rank in range(tp_size)]

    assert [head for rank in ranks for head in rank.heads] == list(range(num_heads))
    assert [row for rank in ranks for row in rank.intermediate] == list(range(intermediate_size))
    assert [token for rank in ranks for token in rank.vocab] == list(range(vocab_size))
    for rank in ranks:
        # The attention kernels see equal groups: local query head h reads local KV head h // group.
        group, rest = divmod(len(rank.heads), len(rank.kv_heads))
        assert rest == 0
        for local, head in enumerate(rank.heads):
            assert rank.kv_heads[local // group] == head // (num_heads // num_kv_heads)
        assert rank.padded_vocab % tp_size == 0 and 0 <= rank.padded_vocab - vocab_size < tp_size
        assert len(rank.vocab) <= rank.padded_vocab // tp_size
        assert len({len(other.kv_heads) for other in ranks}) == 1
    if num_kv_heads % tp_size == 0:
        assert [head for rank in ranks for head in rank.kv_heads] == list(range(num_kv_heads)), "none is held twice"
    assert config.kv_bytes_per_token(tp_size, 4) == 2 * 2 * len(ranks[0].kv_heads) * 8 * 4


@pytest.mark.parametrize(("num_heads", "tp_size"), [(4, 3), (6, 4), (2, 4)])
def test_query_heads_that_do_not_divide_are_refused(num_heads: int, tp_size: int) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size={tp_size} does not divide .* {num_heads} query heads"):
        check_tensor_parallel(parse(num_attention_heads=num_heads), tp_size)
