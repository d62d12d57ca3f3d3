"""The kernels of csrc/cuda, on the GPU: addresses, sizes and a stream by position; each docstring gives the shapes.

Missing where zmqexec was built without nvcc. Importing it does not touch CUDA.
"""

from typing import Any

BUILD_ID: str
FLOAT32: int
BFLOAT16: int
FLOAT16: int

def device_info(device: int, /) -> tuple[int, int, int, int, int, int, int]: ...
def __getattr__(name: str) -> Any: ...
