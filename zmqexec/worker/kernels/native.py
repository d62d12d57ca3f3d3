"""The compiled kernels for the device that a tensor is on.

Runs in: worker.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch


def module_of(device: torch.device) -> Any:
    """`zmqexec._cuda`; for tensors on the CPU the tests' emulator, which they have loaded."""
    if device.type != "cuda":
        return sys.modules["_cuda_emulated"]
    from zmqexec import _cuda  # missing where zmqexec was built without nvcc

    return _cuda


def stream_of(device: torch.device) -> int:
    """torch's current stream there, as the kernels take it."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device."""
    return int(module_of(device).device_info(device.index or 0)[0])


@cache
def capability(device: torch.device) -> int:
    """Compute capability of the device, times 10: 90 for Hopper, and for the emulator, which has what Hopper has."""
    major, minor = module_of(device).device_info(device.index or 0)[1:3]
    return int(10 * major + minor)
