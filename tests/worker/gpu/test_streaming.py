"""Weights on their way to the device: the numbers that are read one by one, bounded memory, and ends that are told."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import VARIANTS, make_checkpoint
from zmqexec.errors import CheckpointError, InternalError
from zmqexec.model_config import Sharding, load_model_config
from zmqexec.worker.gpu import streaming
from zmqexec.worker.gpu.streaming import COPYING, READING, StreamedSource
from zmqexec.worker.models.weights import SafetensorsSource, TensorSlice, load_weights, slices_of


class FakeDevice:
    """The CPU, with an event for every copy; `waiting` have not been waited for."""

    torch_device = torch.device("cpu")
    is_cuda = False

    def __init__(self) -> None:
        self.waiting = 0
        self.most = 0

    def event(self) -> FakeDevice:
        return self

    def record(self) -> None:
        self.waiting += 1
        self.most = max(self.most, self.waiting)

    def synchronize(self) -> None:
        self.waiting -= 1


def request_list(path: Path, rank: int = 0, tp_size: int = 1):
    config = load_model_config(path)
    return slices_of(config, Sharding(config, rank, tp_size), rank, tp_size)


def load(path, rank, tp_size, dtype, source):
    config = load_model_config(path)
    sharding = Sharding(config, rank, tp_size)
    return load_weights(config, sharding, rank, tp_size, source, dtype, lambda done, total: None)


def tensors_of(weights):
    layers = [tensor for layer in weights.layers for tensor in vars(layer).values() if tensor is not None]
    return [weights.embedding, weights.norm, weights.lm_head, *layers]


def open_files(folder: Path) -> list[Path]:
    return [path for path in Path("/proc/self/fd").iterdir() if folder in path.resolve().parents]


@pytest.mark.parametrize("name", ["linear-biases", "gqa-tied", "mqa-odd-vocab"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_streamed_weights_are_those_read_one_by_one(tmp_path, name, tp_size):
    make_checkpoint(tmp_path, max_shard_size="60KB", **VARIANTS[name])
    rank = tp_size - 1
    for dtype, chunk_bytes in ((torch.float32, 1), (torch.bfloat16, 1000), (torch.float32, 1 << 20)):
        device = FakeDevice()
        with StreamedSource(tmp_path, request_list(tmp_path, rank, tp_size), device, chunk_bytes) as source:
            streamed = tensors_of(load(tmp_path, rank, tp_size, dtype, source))
        expected = tensors_of(load(tmp_path, rank, tp_size, dtype, SafetensorsSource(tmp_path)))
        assert len(streamed) == len(expected)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(streamed, expected, strict=True))
        assert device.most <= COPYING + 1 and device.waiting == 0


def test_memory_is_a_few_chunks_whatever_the_size_of_the_checkpoint(tmp_path):
    make_checkpoint(tmp_path)
    slices = request_list(tmp_path)
    with StreamedSource(tmp_path, slices, FakeDevice(), 4096) as source:
        assert [len(buffer) for buffer in source._free] == [4096] * (READING + COPYING)
        for request in slices:
            source.read(*request)
            held = len(source._free) + len(source._reading) + len(source._copying)
            assert held == READING + COPYING


def test_closing_ends_threads_and_files_in_the_middle(tmp_path):
    make_checkpoint(tmp_path, max_shard_size="60KB")
    slices = request_list(tmp_path)
    source = StreamedSource(tmp_path, slices, FakeDevice(), 1000)
    source.read(*slices[0])
    assert open_files(tmp_path)
    source.close()
    source.close()
    assert not open_files(tmp_path)
    assert not [*source._free, *source._reading, *source._copying]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-weights")]


def test_another_order_than_the_announced_one_is_refused(tmp_path):
    make_checkpoint(tmp_path)
    slices = request_list(tmp_path)
    with StreamedSource(tmp_path, slices, FakeDevice()) as source:
        source.read(*slices[0])
        with pytest.raises(InternalError, match="out of the announced order"):
            source.read(*slices[2])


def test_a_tensor_that_is_missing_small_or_of_an_unknown_type_is_named(tmp_path):
    make_checkpoint(tmp_path)
    slices, file = request_list(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    for replacement, said in (
        (tensors[name][:, 1:].contiguous(), "too small for config.json"),
        (tensors[name][1:].contiguous(), "too small for config.json"),
        (tensors[name].to(torch.int32), "is of type I32; supported: F32"),
    ):
        save_file({**tensors, name: replacement}, file)
        with pytest.raises(CheckpointError, match=f"{name!r} in model.safetensors .*{said}"):
            StreamedSource(tmp_path, slices, FakeDevice())
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"no tensor {name!r}"):
        StreamedSource(tmp_path, slices, FakeDevice())


def test_a_file_that_is_cut_off_while_it_is_read_is_named(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    slices = request_list(tmp_path)
    monkeypatch.setattr(streaming, "READING", 1)
    with StreamedSource(tmp_path, slices, FakeDevice(), 512) as source:
        source.read(*slices[0])
        os.truncate(tmp_path / "model.safetensors", 1000)
        with pytest.raises(CheckpointError, match=r"model.safetensors has become shorter .* ends at byte \d+"):
            for request in slices[1:]:
                source.read(*request)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    slices = request_list(tmp_path)

    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    said = r"model.safetensors cannot be read at byte \d+: Input/output error"
    with StreamedSource(tmp_path, slices, FakeDevice()) as source, pytest.raises(CheckpointError, match=said):
        source.read(*slices[0])


@pytest.mark.gpu
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_gpu_gets_what_the_cpu_gets(tmp_path, tp_size):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    from zmqexec.worker.gpu.device import CudaDevice

    make_checkpoint(tmp_path, hidden_size=128, intermediate_size=352)
    expected = tensors_of(load(tmp_path, 0, tp_size, torch.bfloat16, SafetensorsSource(tmp_path)))
    config, device = load_model_config(tmp_path), CudaDevice(0)
    with StreamedSource(tmp_path, request_list(tmp_path, 0, tp_size), device, 20_000) as source:
        ranks = 0, tp_size
        weights = load_weights(
            config,
            Sharding(config, *ranks),
            *ranks,
            source,
            torch.bfloat16,
            lambda done, total: None,
            torch.device("cuda"),
        )
    assert all(torch.equal(ours.cpu(), own) for ours, own in zip(tensors_of(weights), expected, strict=True))


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    config = make_checkpoint(tmp_path).config

    def refuse(file, flags):
        raise OSError(errno.EMFILE, "Too many open files", str(file))

    monkeypatch.setattr(os, "open", refuse)
    slices = [TensorSlice("model.norm.weight", [range(config.hidden_size)], None)]
    with pytest.raises(CheckpointError, match=r"\.safetensors cannot be read: Too many open files"):
        StreamedSource(tmp_path, slices, FakeDevice())
