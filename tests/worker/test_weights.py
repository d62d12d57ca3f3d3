"""Loading: each rank its own slices, the same model whatever the number of ranks, and progress in bytes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import VARIANTS, make_checkpoint
from zmqexec.errors import CheckpointError
from zmqexec.model_config import Sharding, load_model_config
from zmqexec.worker.models.weights import RandomSource, SafetensorsSource, load_weights


def load(path, rank, tp_size, dtype=torch.float32, source=None, progress=None):
    config = load_model_config(path)
    source = source or SafetensorsSource(path)
    report = (lambda done, total: progress.append((done, total))) if progress is not None else lambda done, total: None
    return load_weights(config, Sharding(config, rank, tp_size), rank, tp_size, source, dtype, report)


@pytest.fixture(scope="module", params=["linear-biases", "gqa-tied", "mqa-odd-vocab"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(path, max_shard_size="60KB", **VARIANTS[request.param])
    return path


@pytest.mark.parametrize("kind", ["checkpoint", "dummy"])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_the_ranks_together_hold_the_whole_model(checkpoint, tp_size, kind):
    config = load_model_config(checkpoint)

    def shard(rank, size):
        return load(checkpoint, rank, size, source=RandomSource(config) if kind == "dummy" else None)

    whole = shard(0, 1)
    shards = [shard(rank, tp_size) for rank in range(tp_size)]
    vocab = torch.cat([own.embedding for own in shards])
    assert torch.equal(vocab[: config.vocab_size], whole.embedding)
    assert not vocab[config.vocab_size :].any()
    for layer, expected in enumerate(whole.layers):
        parts = [own.layers[layer] for own in shards]
        q_rows = config.num_heads * config.head_dim
        assert torch.equal(torch.cat([part.qkv[: q_rows // tp_size] for part in parts]), expected.qkv[:q_rows])
        assert torch.equal(torch.cat([part.o for part in parts], dim=1), expected.o)
        assert torch.equal(torch.cat([part.down for part in parts], dim=1), expected.down)
        gates, ups = zip(*(part.gate_up.chunk(2) for part in parts), strict=True)
        assert torch.equal(torch.cat([*gates, *ups]), expected.gate_up)
        assert [part.o_bias is not None for part in parts[1:]] == [False] * (tp_size - 1)
        assert (parts[0].o_bias is None) == (not config.attention_bias)


def test_a_rank_reads_little_more_than_its_share_and_reports_every_byte(checkpoint):
    progress, whole = [], []
    load(checkpoint, 0, 1, progress=whole)
    load(checkpoint, 1, 2, dtype=torch.bfloat16, progress=progress)
    done, totals = zip(*progress, strict=True)
    assert list(done) == sorted(done) and done[0] == 0 and done[-1] == totals[-1]
    assert len(set(totals)) == 1
    assert totals[0] < 0.75 * whole[-1][1] / 2  # half the bytes per number; KV heads may be held twice


def test_tied_embeddings_are_held_once(tmp_path):
    make_checkpoint(tmp_path, **VARIANTS["gqa-tied"])
    weights = load(tmp_path, 0, 1)
    assert weights.lm_head is weights.embedding


def test_a_missing_tensor_and_an_unknown_type_are_named(tmp_path):
    make_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' in .* is of type I32; supported: F32"):
        load(tmp_path, 0, 1)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"no tensor 'model.norm.weight'"):
        load(tmp_path, 0, 1)


def test_dummy_weights_are_the_same_every_time_and_differ_between_tensors(checkpoint):
    config = load_model_config(checkpoint)
    first, second = (load(checkpoint, 0, 1, source=RandomSource(config)) for _ in range(2))
    assert torch.equal(first.layers[0].qkv, second.layers[0].qkv)
    assert not torch.equal(first.layers[0].qkv, first.layers[1].qkv)
    assert 0.015 < float(first.embedding.std()) < 0.025
