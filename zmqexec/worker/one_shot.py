"""The one-shot all-reduce of csrc/cuda/all_reduce.cu, seen from one rank: memory, the peers' memory, launches, errors.

Runs in: worker.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from typing import Any

import torch

ALIGNMENT = 256
CONTROL_BYTES = 128
ABORT, ERROR, ERROR_PEER, ERROR_CALL_LOW, ERROR_CALL_HIGH, ERROR_WAITED = 0, 16, 17, 18, 19, 20
"""Words of the control page, as in all_reduce.cu."""
TIMED_OUT = 1

WORDS, FLAGS = 0, 1
"""How a receiver knows that a message is there: by its words, or by a flag behind a fence. all_reduce.cu explains."""

Gather = Callable[[str, str], list[str]]
"""(a name, this rank's text) -> the texts of all ranks under that name, in rank order."""


class OneShot:
    """All-reduces of up to `capacity` bytes among `tp_size` ranks of this host.

    Every rank makes the same calls, in one order, on one stream; CUDA graphs may hold them. `open` comes first. A call
    ends within `timeout_s` also when a peer does not come: its results are then undefined, those of all later calls
    too, and `health` says why. So `health` is asked before results are used.

    module    zmqexec._cuda, or the emulated one in tests
    rank      also the number of the CUDA device among those that are visible
    """

    def __init__(self, module: Any, rank: int, tp_size: int, capacity: int, timeout_s: float) -> None:
        self.rank = rank
        self.tp_size = tp_size
        self.capacity = math.ceil(capacity / ALIGNMENT) * ALIGNMENT
        self._module = module
        self._timeout_s = timeout_s
        self._dtypes = {
            torch.float32: module.FLOAT32,
            torch.bfloat16: module.BFLOAT16,
            torch.float16: module.FLOAT16,
        }
        self._inbox = 0
        self._peers: list[int] = []
        self._group = 0
        self._control_host = 0
        self._control: Any = None

    def allocate(self) -> str:
        """Make this rank's inbox; a text with which its peers can open it. RuntimeError, as from `open`."""
        module = self._module
        module.use_device(self.rank)
        for peer in range(self.tp_size):
            if peer != self.rank and not module.can_access_peer(self.rank, peer):
                raise RuntimeError(f"GPU {self.rank} has no access to the memory of GPU {peer}")
        self._control_host, self._control_device = module.host_mapped_alloc(CONTROL_BYTES)
        self._control = (ctypes.c_uint32 * (CONTROL_BYTES // 4)).from_address(self._control_host)
        self._inbox = module.ipc_alloc(module.all_reduce_inbox_bytes(self.tp_size, self.capacity))
        module.all_reduce_inbox_init(self._inbox, self.tp_size, self.capacity, int(self._timeout_s * 1e9))
        handle: bytes = module.ipc_handle(self._inbox)
        return handle.hex()

    def open(self, handles: list[str]) -> None:
        """Map the inboxes of all ranks, which all have allocated them."""
        module = self._module
        inboxes = []
        for rank, handle in enumerate(handles):
            if rank != self.rank:
                self._peers.append(module.ipc_open(bytes.fromhex(handle)))
            inboxes.append(self._inbox if rank == self.rank else self._peers[-1])
        addresses = struct.pack(f"={self.tp_size}Q", *inboxes)
        self._group = module.all_reduce_group(self.rank, self.tp_size, self.capacity, self._control_device, addresses)

    def set_timeout(self, timeout_s: float) -> None:
        """Bound each wait of later calls, of graphs captured before too. Waits for the device."""
        self._module.all_reduce_set_timeout(self._group, int(timeout_s * 1e9))

    def takes(self, tensor: torch.Tensor, *, by_rows: bool = False) -> bool:
        """Whether a message like `tensor` fits. `by_rows`: as `all_reduce_residual_norm` sends it."""
        size = tensor.itemsize
        rows, cols = (tensor.shape[0], tensor.shape[1]) if by_rows else (1, tensor.numel())
        message_bytes = rows * -(-cols * size // 16) * 16
        return 0 < message_bytes <= self.capacity and tensor.dtype in self._dtypes

    def all_reduce(self, tensor: torch.Tensor, out: torch.Tensor, *, protocol: int = WORDS, threads: int = 0) -> None:
        """out = the sum of all ranks' `tensor`, in rank order and float32. Contiguous; `out` may be `tensor`.

        tensor, out  any shape, `takes`  float32, bfloat16 or float16
        """
        self._launch(tensor, 0, out.data_ptr(), 0, 1, tensor.numel(), 0.0, protocol, threads)

    def all_reduce_residual_(
        self, hidden: torch.Tensor, partial: torch.Tensor, *, protocol: int = WORDS, threads: int = 0
    ) -> None:
        """hidden += the sum of all ranks' `partial`, rounded once. `hidden` is the same on every rank.

        hidden, partial  one shape, contiguous  float32, bfloat16 or float16
        """
        self._launch(partial, hidden.data_ptr(), 0, 0, 1, partial.numel(), 0.0, protocol, threads)

    def all_reduce_residual_norm(
        self,
        hidden: torch.Tensor,
        partial: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        protocol: int = WORDS,
        threads: int = 0,
    ) -> torch.Tensor:
        """hidden += the sum of all ranks' `partial`; returns rms_norm(hidden, weight, eps).

        hidden, partial, returned  [num_tokens, hidden]  float32, bfloat16 or float16, contiguous
        weight                     [hidden]              as they

        Reference: `reference.rms_norm`, tolerance 4 units in the last place.
        """
        out = torch.empty_like(hidden)
        rows, cols = partial.shape
        addresses = (hidden.data_ptr(), out.data_ptr(), weight.data_ptr())
        self._launch(partial, *addresses, rows, cols, eps, protocol, threads)
        return out

    def health(self) -> str | None:
        """Why results are no good any more; None: they are. Reads host memory alone."""
        if self._control is None or not self._control[ERROR]:
            return None
        control = self._control
        call = control[ERROR_CALL_LOW] | control[ERROR_CALL_HIGH] << 32
        waited = f"{control[ERROR_WAITED] * 1024e-9:.3g} s"
        peer = control[ERROR_PEER]
        if control[ERROR] == TIMED_OUT:
            return f"rank {peer} did not join all-reduce {call} within {waited}"
        return f"all-reduce {call} was aborted after {waited} of waiting for rank {peer}"

    def abort(self) -> None:
        """Let every wait on the device end now. From any thread."""
        if self._control is not None:
            self._control[ABORT] = 1

    def release(self) -> None:
        """Give the memory back, when no rank uses it any more. Waits for the device, so not after a failure."""
        module = self._module
        if self._group:
            module.all_reduce_group_free(self._group)
        for peer in self._peers:
            module.ipc_close(peer)
        if self._inbox:
            module.device_free(self._inbox)
        if self._control_host:
            self._control = None
            module.host_mapped_free(self._control_host)
        self._group = self._inbox = self._control_host = 0
        self._peers = []

    def _launch(
        self,
        partial: torch.Tensor,
        hidden: int,
        out: int,
        weight: int,
        rows: int,
        cols: int,
        eps: float,
        protocol: int,
        threads: int,
    ) -> None:
        stream = torch.cuda.current_stream().cuda_stream if partial.is_cuda else 0
        dtype = self._dtypes[partial.dtype]
        addresses = (partial.data_ptr(), hidden, out, weight)
        self._module.all_reduce(self._group, *addresses, rows, cols, eps, dtype, protocol, threads, stream, True)
