"""Every kernel test runs on the emulator, and on the GPU where there is one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import cuda_emulator


class KernelsImpl:
    """`call("rms_norm", out, ...)` with tensors for addresses, dtypes for dtypes, None for an absent address.

    device  where the tensors must be
    stream  the stream argument
    pdl     the pdl argument: the emulator then checks that every block waits and launches
    """

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name = name
        self.module = module
        self.device = torch.device("cuda" if name == "cuda" else "cpu")
        self.pdl = True
        self.dtypes = {
            torch.float32: module.FLOAT32,
            torch.bfloat16: module.BFLOAT16,
            torch.float16: module.FLOAT16,
        }

    @property
    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.name == "cuda" else 0

    def call(self, kernel: str, *arguments: Any) -> Any:
        return getattr(self.module, kernel)(*map(self._plain, arguments))

    def _plain(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            assert argument.device.type == self.device.type, f"a tensor on {argument.device}"
            return argument.data_ptr()
        return self.dtypes.get(argument, argument) if isinstance(argument, torch.dtype) else argument

    @contextmanager
    def emulated(self, *, seed: int = 0, resident_blocks: int = 1, clock_step_ns: int = 100) -> Iterator[None]:
        """On the emulator: threads and blocks in a random order (seed other than 0), blocks side by side."""
        if self.name == "emulated":
            self.module.emulator_options(seed, resident_blocks, clock_step_ns)
        try:
            yield
        finally:
            if self.name == "emulated":
                self.module.emulator_options(0, 1, 100)


@pytest.fixture(scope="session", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels_impl(request: pytest.FixtureRequest) -> KernelsImpl:
    if request.param == "emulated":
        try:
            return KernelsImpl("emulated", cuda_emulator.load())
        except cuda_emulator.NoCompiler as missing:
            pytest.skip(str(missing))
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    try:
        return KernelsImpl("cuda", importlib.import_module("zmqexec._cuda"))
    except ImportError as missing:
        pytest.skip(f"zmqexec was built without CUDA: {missing}")
