"""A checkpoint of random numbers on disk, as large as a real one and quickly written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import geometries
import torch

from zmqexec.checkpoint import expected_tensors
from zmqexec.model_config import load_model_config

MOST_FILE_BYTES = 5 * 10**9
BLOCK_BYTES = 64 << 20
"""Random numbers that are written again and again: nobody looks at them but to copy them."""
SPARE_BYTES = 1 << 30


def checkpoint_bytes(geometry: str) -> int:
    """Of the weights, in bfloat16."""
    return 2 * geometries.num_parameters(geometry)


def missing_space(geometry: str, folder: Path) -> str | None:
    """What is to be done where `folder` has no room for the checkpoint."""
    needed, free = checkpoint_bytes(geometry) + SPARE_BYTES, shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return (
        f"{geometry} needs {needed / 1e9:.1f} GB of disk and there are {free / 1e9:.1f} GB free: free "
        f"{(needed - free) / 1e9:.1f} GB, or choose a folder on another disk with --folder"
    )


def write_checkpoint(geometry: str, folder: Path, most_file_bytes: int = MOST_FILE_BYTES) -> None:
    """config.json, files of at most `most_file_bytes` with the tensors in bfloat16, and their index; on the disk."""
    geometries.write_folder(geometry, folder)
    shapes = dict(expected_tensors(load_model_config(folder)))
    files: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if files[-1] and used + num_bytes > most_file_bytes:
            files.append({})
            used = 0
        files[-1][name] = shape
        used += num_bytes
    generator = torch.Generator().manual_seed(0)
    numbers = torch.empty(BLOCK_BYTES // 2, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
    block = numbers.view(torch.uint8).numpy().data
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, name)
        _write_file(folder / name, tensors, block)
    index = {"metadata": {"total_size": checkpoint_bytes(geometry)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_file(path: Path, tensors: dict[str, tuple[int, ...]], block: memoryview) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= stream.write(block[: min(end, len(block))]) or 0
        os.fsync(stream.fileno())
