"""Choosing tokens on the device, as `choose.py` does it on the CPU.

Runs in: worker. A slot's parameters are one record of 48 bytes: an admission is one small copy to the device.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from zmqexec.config import GREEDY_BELOW
from zmqexec.errors import InternalError
from zmqexec.protocol import Sampling
from zmqexec.worker.kernels import native

PARAMS = np.dtype(
    [
        ("temperature", "<f8"),
        ("top_p", "<f8"),
        ("min_p", "<f8"),
        ("seed", "<u8"),
        ("top_k", "<i4"),
        ("sample_index", "<i4"),
        ("greedy", "<i4"),
        ("unused", "<i4"),
    ]
)
"""One slot's parameters; top_k outside [1, vocab] keeps all. csrc/cuda/sample.cu's Params."""

SEED_MASK = 2**64 - 1


def params_of(sampling: Sampling | None) -> npt.NDArray[np.void]:
    """A slot's record [1] of PARAMS. None is plain greedy."""
    record = np.zeros(1, PARAMS)
    if sampling is None or sampling.temperature < GREEDY_BELOW:
        record["greedy"] = 1
        return record
    record["temperature"] = sampling.temperature
    record["top_p"] = sampling.top_p
    record["min_p"] = sampling.min_p
    record["seed"] = sampling.seed & SEED_MASK
    record["top_k"] = sampling.top_k
    record["sample_index"] = sampling.sample_index
    return record


def allocate_params(num_slots: int, device: torch.device) -> torch.Tensor:
    """[num_slots, 48] uint8: a PARAMS record for each slot, unset. Write row `slot` from `params_of`."""
    return torch.zeros(num_slots, PARAMS.itemsize, dtype=torch.uint8, device=device)


def sample(
    token_ids: torch.Tensor,
    logits: torch.Tensor,
    params: torch.Tensor | None,
    row_slots: torch.Tensor | None,
    positions: torch.Tensor,
    *,
    threads: int = 0,
    pdl: bool = False,
) -> None:
    """Choose a token for each row of logits.

    token_ids  [num_rows]         int32, out; 0 in padding
    logits     [num_rows, vocab]  float32; rows may be strided (a view of the vocabulary's columns)
    params     [num_slots, 48]    uint8, of `allocate_params`; None: every row is greedy, row_slots is unread
    row_slots  [num_rows]         int32 in [0, num_slots)
    positions  [num_rows]         int32, of the token to sample: the number of known ones; at most 0 marks padding
    threads    of a row's block: 512 or 1024; 0 chooses by the number of rows. The tokens are the same.

    Greedy rows take the lowest id of the largest logit; NaN is never chosen beside a number. The others follow
    `choose.choose` with `philox.uniforms`: weights are float64 here too, but their sums are exact integers, units of
    2^-50 (2^-46 at 128k tokens) of the largest. The token differs where the random number or top_p lies within
    2^-40 of the mass of an interval's end, and where weights differ by less than exp() is exact: temperatures
    above 10^8. Depends on the row alone. Kernel: csrc/cuda/sample.cu. pdl: it may start while its predecessor ends.
    """
    num_rows = len(token_ids)
    ok = logits.dim() == 2 and logits.dtype == torch.float32 and logits.stride(1) == 1 and len(logits) == num_rows
    for ints in (token_ids, positions) if row_slots is None else (token_ids, positions, row_slots):
        ok = ok and ints.dtype == torch.int32 and ints.shape == (num_rows,) and ints.is_contiguous()
    ok = ok and (params is None) == (row_slots is None)
    if params is not None:
        ok = ok and params.dtype == torch.uint8 and params.shape[1:] == (PARAMS.itemsize,) and params.is_contiguous()
    if not ok:
        tensors = {"token_ids": token_ids, "logits": logits, "params": params, "row_slots": row_slots}
        shapes = ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in tensors.items() if t is not None)
        raise InternalError(f"sample: shapes or types do not fit its docstring: {shapes}")
    module, stream = native.module_of(logits.device), native.stream_of(logits.device)
    module.sample(
        token_ids.data_ptr(),
        logits.data_ptr(),
        num_rows,
        logits.shape[1],
        max(logits.stride(0), logits.shape[1]) if num_rows <= 1 else logits.stride(0),
        0 if params is None else params.data_ptr(),
        0 if row_slots is None else row_slots.data_ptr(),
        positions.data_ptr(),
        threads,
        stream,
        pdl,
    )
