"""Collectives of ranks with a GPU each: NCCL through cupy, and for small messages the one-shot all-reduce.

Runs in: worker.

No process group of torch: its default group is the user's. A communicator of cupy's runs on the stream that it is
given, so CUDA graphs capture it, and it can be aborted. What the ranks must tell each other at the start goes through a
FileStore on a memfd that all of them inherited: nothing is named, nothing is left.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from zmqexec.errors import ConfigError
from zmqexec.worker import kernels
from zmqexec.worker.gpu.one_shot import OneShot

ONE_SHOT_BYTES = {2: 1 << 20, 3: 1 << 19, 4: 1 << 19}
ONE_SHOT_BYTES_MANY_RANKS = 1 << 18
"""By ranks: larger messages are NCCL's. Every rank sends all it has to every other, so more ranks profit less."""

CHECK_TIMEOUT_S = 10.0
CHECK_SIZES = (1, 1000, 4096, 40_960, 262_144)
NCCL_TOLERANCE = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16, torch.float32)}
"""For each rank: NCCL rounds after every addition."""
CLOSE_TIMEOUT_S = 2.0

NCCL_SUM = 0
NCCL_UINT8 = 1
NCCL_DTYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
"""ncclDataType_t and ncclRedOp_t of nccl.h; cupy has no name for bfloat16."""

NCCL_ENVIRONMENT = {
    # Multicast needs fabric rights that containers often lack.
    "NCCL_NVLS_ENABLE": "0",
    # All ranks are on this machine, and nobody else shall reach the port by which they meet.
    "NCCL_SOCKET_IFNAME": "lo",
}
"""Set before the first call of NCCL, unless the user has."""

# Any: torch ships no types for it.
dist: Any = torch.distributed

Result = TypeVar("Result")


class OneShotUnusable(Exception):
    """Why all ranks use NCCL alone."""


class NcclCollectives:
    """The group of `tp_size` processes that call this with the same `store_fd`, a memfd that all of them inherited.

    Rank i uses the i-th visible GPU, which becomes the current device. All collectives run on torch's current stream
    and may be captured in CUDA graphs. Where a peer does not come, a one-shot all-reduce ends after `timeout_s` and
    `health` names the peer; NCCL waits until `close`. Joining raises `RuntimeError` after `join_timeout_s`.

    in_rank_order  all sums of floating-point numbers, of any size, are taken in rank order, in float32, and rounded
                   once: one-shot in pieces of its capacity, or of what NCCL gathers. Otherwise large ones are NCCL's,
                   whose order depends on their size.
    """

    device_type = "cuda"  # tests emulate on the CPU

    def __init__(
        self,
        rank: int,
        tp_size: int,
        store_fd: int,
        timeout_s: float,
        *,
        join_timeout_s: float,
        in_rank_order: bool = False,
    ) -> None:
        self.rank = rank
        self.tp_size = tp_size
        self._in_rank_order = in_rank_order
        self.one_shot: OneShot | None = None
        """None: NCCL does everything."""
        self._timeout_s = timeout_s
        self._comm: Any = None
        if torch.cuda.device_count() < tp_size:
            raise ConfigError(
                f"tensor_parallel_size={tp_size}, but {torch.cuda.device_count()} GPUs are visible",
                "tensor_parallel_size",
            )
        nccl = _import_nccl()
        torch.cuda.set_device(rank)
        store = dist.FileStore(f"/proc/self/fd/{store_fd}", tp_size)
        store.set_timeout(timedelta(seconds=join_timeout_s))
        self._store = store
        self._join_nccl(nccl, join_timeout_s)
        try:
            self.one_shot = self._join_one_shot()
        except OneShotUnusable as unusable:
            if rank == 0:
                print(f"all-reduces go through NCCL alone: {unusable}", file=sys.stderr)

    # ── collectives ─────────────────────────────────────────────────────────────────────────────────────────────────

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in `tensor` if it is contiguous."""
        tensor = tensor.contiguous()
        if self.one_shot is not None and self.one_shot.takes(tensor):
            self.one_shot.all_reduce(tensor, tensor)
        elif self._in_rank_order and tensor.dtype in NCCL_TOLERANCE:
            self._sum_in_rank_order_(tensor, tensor, None)
        elif tensor.numel():
            self.nccl_all_reduce_(tensor)
        return tensor

    def all_reduce_residual_(self, hidden: torch.Tensor, partial: torch.Tensor) -> None:
        """hidden += the sum of all ranks' `partial`, which may be overwritten.

        hidden, partial  one shape, contiguous; `hidden` the same on every rank

        One-shot rounds once, and so does all that is `in_rank_order`; NCCL rounds the sum first.
        """
        if self.one_shot is not None and self.one_shot.takes(partial):
            self.one_shot.all_reduce_residual_(hidden, partial)
        elif self._in_rank_order:
            self._sum_in_rank_order_(hidden, partial, hidden)
        elif partial.numel():
            self.nccl_all_reduce_(partial)
            hidden.add_(partial)

    def all_reduce_residual_norm(
        self, hidden: torch.Tensor, partial: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """hidden += the sum of all ranks' `partial`, which may be overwritten; returns rms_norm(hidden, weight, eps).

        hidden, partial, returned  [num_tokens, hidden], contiguous
        weight                     [hidden]
        """
        if self.one_shot is not None and self.one_shot.takes(partial, by_rows=True):
            return self.one_shot.all_reduce_residual_norm(hidden, partial, weight, eps)
        self.all_reduce_residual_(hidden, partial)
        return kernels.rms_norm(hidden, weight, eps)

    def _sum_in_rank_order_(self, out: torch.Tensor, partial: torch.Tensor, residual: torch.Tensor | None) -> None:
        """out = residual + the sum of all ranks' `partial`. One shape, contiguous; `out` may be one of the others."""
        if not partial.numel():
            return
        if self.one_shot is None:
            first, *others = self.all_gather(partial)
            total = first.float()
            for other in (*others, residual):
                if other is not None:
                    total += other
            out.copy_(total)
            return
        at_once = self.one_shot.capacity // partial.itemsize
        for to, part in zip(*(torch.split(each.view(-1), at_once) for each in (out, partial)), strict=True):
            if residual is None:
                self.one_shot.all_reduce(part, to)
            else:
                self.one_shot.all_reduce_residual_(to, part)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor: [tp_size, *tensor.shape]."""
        tensor = tensor.contiguous()
        gathered = tensor.new_empty((self.tp_size, *tensor.shape))
        if tensor.numel():
            num_bytes = tensor.numel() * tensor.itemsize
            self._open_comm().allGather(tensor.data_ptr(), gathered.data_ptr(), num_bytes, NCCL_UINT8, _stream())
        return gathered

    def nccl_all_reduce_(self, tensor: torch.Tensor) -> None:
        """`all_reduce` by NCCL, whatever the size."""
        address = tensor.data_ptr()
        self._open_comm().allReduce(address, address, tensor.numel(), NCCL_DTYPES[tensor.dtype], NCCL_SUM, _stream())

    # ── failure and end ─────────────────────────────────────────────────────────────────────────────────────────────

    def health(self) -> str | None:
        """What went wrong on the GPU since the start, asked before a step's results are used. Takes microseconds."""
        if self.one_shot is not None and (problem := self.one_shot.health()) is not None:
            return problem
        if self._comm is not None:
            try:
                self._comm.check_async_error()
            except RuntimeError as error:
                return f"NCCL: {error}"
        return None

    def close(self) -> None:
        """Leave the group, within seconds also when peers are gone. May be called twice.

        Kernels that wait for peers end. Device memory that peers may have mapped goes with the process.
        """
        if self.one_shot is not None:
            self.one_shot.abort()
            self.one_shot = None
        comm, self._comm = self._comm, None
        if comm is not None:
            # Not destroy(), which waits for the peers to do the same; and even abort() waits for the device.
            thread = threading.Thread(target=comm.abort, name="zmqexec-nccl-abort", daemon=True)
            thread.start()
            thread.join(CLOSE_TIMEOUT_S)

    def _open_comm(self) -> Any:
        if self._comm is None:
            raise RuntimeError("the collectives are closed")
        return self._comm

    # ── start ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _gather(self, name: str, own: str) -> list[str]:
        """What every rank says under `name`."""
        self._store.set(f"gpu {name} {self.rank}", own)
        return [self._store.get(f"gpu {name} {rank}").decode() for rank in range(self.tp_size)]

    def _join_nccl(self, nccl: Any, timeout_s: float) -> None:
        if self.rank == 0:
            own = nccl.get_unique_id()
            # Bytes in cupy 14, signed numbers in a tuple before.
            self._store.set("gpu nccl", " ".join(map(str, (int(isinstance(own, bytes)), *own))))
        kind, *numbers = map(int, self._store.get("gpu nccl").decode().split())
        unique_id = bytes(numbers) if kind else tuple(numbers)

        def join() -> Any:
            torch.cuda.set_device(self.rank)  # of this thread
            return nccl.NcclCommunicator(self.tp_size, unique_id, self.rank)

        self._comm = _bounded(join, timeout_s, "the ranks did not meet in NCCL")

    def _join_one_shot(self) -> OneShot:
        """OneShotUnusable is raised on all ranks or none."""
        capacity = ONE_SHOT_BYTES.get(self.tp_size, ONE_SHOT_BYTES_MANY_RANKS)
        made: list[OneShot] = []

        def allocate() -> str:
            try:
                from zmqexec import _cuda
            except ImportError as error:
                raise RuntimeError(f"zmqexec was built without CUDA ({error})") from error
            made.append(OneShot(_cuda, self.rank, self.tp_size, capacity, CHECK_TIMEOUT_S))
            return made[0].allocate()

        handle = self._agreed("allocate", allocate)
        handles = self._gather("handle", handle)
        one_shot = made[0]
        self._agreed("open", lambda: one_shot.open(handles))
        self._agreed("check", lambda: self._check(one_shot))
        self._agreed("timeout", lambda: one_shot.set_timeout(self._timeout_s))
        return one_shot

    def _agreed(self, step: str, act: Callable[[], Result]) -> Result:
        """Do a step on every rank; where it fails on one, it has failed on all."""
        problem, result = "", None
        try:
            result = act()
        except RuntimeError as error:
            problem = str(error) or repr(error)
        problems = self._gather(step, problem)
        if any(problems):
            raise OneShotUnusable("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(problems) if text))
        return result  # type: ignore[return-value]

    def _check(self, one_shot: OneShot) -> None:
        """Compare with NCCL on random data. RuntimeError: they differ, or a message did not arrive."""
        device = torch.device(self.device_type)
        generator = torch.Generator(device).manual_seed(self.rank)
        tensors = [
            torch.randn(size, generator=generator, device=device).to(dtype)
            for dtype in NCCL_TOLERANCE
            for size in CHECK_SIZES
        ]
        tensors = [tensor for tensor in tensors if one_shot.takes(tensor)]
        # NCCL first and all of it: it has no bound, so a rank that finds a difference must not leave others in there.
        references = [tensor.clone() for tensor in tensors]
        for reference in references:
            self.nccl_all_reduce_(reference)
        torch.cuda.synchronize()
        for tensor, reference in zip(tensors, references, strict=True):
            out = torch.full_like(tensor, torch.nan)
            one_shot.all_reduce(tensor, out)
            torch.cuda.synchronize()
            if (problem := one_shot.health()) is not None:
                raise RuntimeError(problem)
            error = (out.float() - reference.float()).abs().max().item()
            bound = self.tp_size * NCCL_TOLERANCE[tensor.dtype] * (1.0 + reference.float().abs().max().item())
            if not error <= bound:
                raise RuntimeError(f"sums of {tensor.numel()} × {tensor.dtype} differ from NCCL's by {error:.3g}")


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _import_nccl() -> Any:
    """cupy's bindings of NCCL, with the environment set. ConfigError: what to install."""
    for name, value in NCCL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    cuda = (torch.version.cuda or "13").split(".")[0]
    remedy = f"pip install 'zmqexec[cuda{cuda}]'"
    try:
        # After torch, which has loaded the libnccl that it brings.
        from cupy.cuda import nccl
    except ImportError as error:
        raise ConfigError(
            f"tensor_parallel_size > 1 on GPUs needs cupy for NCCL: {remedy} ({error})", "tensor_parallel_size"
        ) from error
    if not nccl.available:
        raise ConfigError(
            f"cupy finds no NCCL library: {remedy}, and pip install nvidia-nccl-cu{cuda}", "tensor_parallel_size"
        )
    return nccl


def _bounded(act: Callable[[], Result], timeout_s: float, otherwise: str) -> Result:
    """What `act` returns or raises, from a thread of its own; RuntimeError, with the thread left behind, at the end."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="zmqexec-join", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not results:
        raise RuntimeError(f"{otherwise} within {timeout_s:g} s")
    return results[0]
