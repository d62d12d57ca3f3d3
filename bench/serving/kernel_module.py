"""A process of its own: the checks and measures of one module of bench/gpu_kernels.

    python -m serving.kernel_module NAME

`check(device)` and `measure(device)` list (or yield) dicts. A check's dict has a `name` and an `ok`; a measure's has a
`name` and what was measured, with units in the keys. A module has one of the two or both. Each dict is handed over as
it comes, so that what follows cannot take it away. A module whose check raises is not measured.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from serving.children import emit


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("it needs an NVIDIA GPU, and a torch with CUDA")
    module = importlib.import_module(f"gpu_kernels.{sys.argv[1]}")
    device = torch.device("cuda", 0)
    for kind in ("check", "measure"):
        function = getattr(module, kind, None)
        if function is None:
            continue
        try:
            for row in function(device) or ():
                emit({"kind": kind, "row": plain(row)})
        except Exception as error:
            emit({"kind": kind, "error": in_short(error)})
            traceback.print_exc()
            sys.exit(1)


def in_short(error: Exception) -> str:
    """What was raised, and the three innermost places, without folders."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return f"{type(error).__name__}: {str(error)[:1000]} ({', '.join(places)})"


def plain(value: Any) -> Any:
    """Numbers of numpy and of torch as Python's, whatever else is no JSON as text."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, bool | int | float | str | None):
        return value
    if hasattr(value, "item"):
        try:
            return value.item()
        except (RuntimeError, ValueError):
            return str(value)
    return str(value)


if __name__ == "__main__":
    main()
