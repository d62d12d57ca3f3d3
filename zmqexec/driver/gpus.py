"""Which device the workers will use, found out without torch and without touching a GPU.

Runs in: driver.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from zmqexec.config import EngineConfig
from zmqexec.errors import ConfigError


def choose_device(config: EngineConfig) -> Literal["cpu", "cuda"]:
    """The device that `config.device` stands for. `ConfigError`: CUDA is asked for and cannot be had."""
    if config.device == "cpu":
        return "cpu"
    tp_size = config.tensor_parallel_size
    num_gpus, cuda = num_visible_gpus(), torch_cuda_version()
    if config.device == "auto" and (num_gpus == 0 or cuda is None):
        return "cpu"
    has_cupy = find_spec("cupy") is not None
    if config.device == "auto" and config.model is None and tp_size > 1 and (num_gpus < tp_size or not has_cupy):
        return "cpu"  # the demo model is as good there, and runs with two workers unless told otherwise
    if num_gpus == 0:
        raise ConfigError("device='cuda': no NVIDIA GPU is visible (/dev/nvidia*, CUDA_VISIBLE_DEVICES)", "device")
    if cuda is None:
        raise ConfigError(
            "device='cuda': the installed torch has no CUDA; install a build with it, or use device='cpu'", "device"
        )
    if num_gpus < tp_size:
        raise ConfigError(
            f"tensor_parallel_size={tp_size} needs as many GPUs, and {num_gpus} are visible; lower it to that, or use "
            "device='cpu'",
            "tensor_parallel_size",
        )
    if tp_size > 1 and not has_cupy:
        extra = f"cuda{cuda.split('.')[0]}"
        raise ConfigError(
            f"tensor_parallel_size={tp_size} on GPUs needs cupy: pip install 'zmqexec[{extra}]' (this torch has CUDA "
            f"{cuda}), or use tensor_parallel_size=1",
            "tensor_parallel_size",
        )
    return "cuda"


def num_visible_gpus(dev: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that the driver offers, within CUDA_VISIBLE_DEVICES."""
    present = sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in dev.glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    # CUDA stops at the first name that is no device.
    names = [name.strip() for name in visible.split(",")]
    count = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return min(present, count)


def torch_cuda_version() -> str | None:
    """The CUDA version that the installed torch was built with, read from its files; None: without CUDA."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, flags=re.MULTILINE)
    return found.group(1) if found else None
