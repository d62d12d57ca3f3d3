"""A checkpoint on its way to the device: threads read ahead into pinned memory, from which the device copies.

Runs in: worker.

A mapped file comes page by page, on one thread, through a buffer of the driver's. Here the reads of all tensors, in the
order in which they will be asked for, are cut into chunks of rows, and several chunks are under way at a time.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from zmqexec.checkpoint import Checkpoint, TensorInfo
from zmqexec.errors import CheckpointError, InternalError
from zmqexec.worker.gpu.device import Device, Event
from zmqexec.worker.models.weights import CHECKPOINT_DTYPES, TensorSlice, find_tensor

CHUNK_BYTES = 8 << 20
THREADS = 4
READING = 8
"""Chunks that are read or wait to be copied: more than threads, so that none of them waits for a buffer."""
COPYING = 2
"""Chunks that the device may still be copying. Pinned memory: `READING + COPYING` chunks."""


@dataclass(frozen=True)
class Chunk:
    """Whole rows [begin, begin + num_rows) of a tensor; a vector's rows are its elements. `last`: of its slice."""

    info: TensorInfo
    begin: int
    num_rows: int
    last: bool

    @property
    def num_bytes(self) -> int:
        return self.num_rows * _row_bytes(self.info)


class StreamedSource:
    """`slices` on the device, to be read in this order. `close` it, or use `with`.

    Of a column slice whole rows are read and copied to the device, which keeps the columns: a rank of n reads n times
    its part of `o_proj` and `down_proj`, in one piece instead of thousands.
    """

    def __init__(
        self, model_dir: Path, slices: Sequence[TensorSlice], device: Device, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        """`CheckpointError` where a tensor is missing, of another type, or too small, or a file cannot be read."""
        self._device = device
        self._slices = deque(slices)
        tensors = Checkpoint(model_dir).tensors
        infos = [_checked(find_tensor(tensors, part.name), part) for part in slices]
        self._chunks = _chunks(list(zip(infos, slices, strict=True)), chunk_bytes)
        buffer_bytes = max([chunk_bytes, *map(_row_bytes, infos)])
        self._free = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=device.is_cuda) for _ in range(READING + COPYING)
        ]
        self._reading: deque[tuple[Chunk, torch.Tensor, Future[None]]] = deque()
        self._copying: deque[tuple[torch.Tensor, Event]] = deque()
        self._threads = ThreadPoolExecutor(THREADS, "read-weights")
        self._files: dict[Path, int] = {}
        try:
            for file in {info.file for info in infos}:
                self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error

    def __enter__(self) -> StreamedSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and let go of files and buffers."""
        self._threads.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._reading.clear()
        while self._copying:
            self._reclaim()
        self._free.clear()

    def read(self, name: str, rows: Sequence[range], columns: range | None) -> torch.Tensor:
        if not self._slices or self._slices.popleft() != (name, rows, columns):
            raise InternalError(f"{name!r} was read out of the announced order")
        count, at, last = sum(map(len, rows)), 0, False
        out: torch.Tensor | None = None
        while not last:
            self._read_ahead()
            chunk, buffer, future = self._reading.popleft()
            future.result()
            info, last = chunk.info, chunk.last
            staged = buffer[: chunk.num_bytes].view(CHECKPOINT_DTYPES[info.dtype]).view(-1, *info.shape[1:])
            if out is None:
                shape = (count, *info.shape[1:]) if columns is None else (count, len(columns))
                out = torch.empty(shape, dtype=staged.dtype, device=self._device.torch_device)
            if columns is not None:
                moved = staged.to(self._device.torch_device, non_blocking=True)
                staged = moved[:, columns.start : columns.stop]
            out[at : at + chunk.num_rows].copy_(staged, non_blocking=True)
            at += chunk.num_rows
            copied = self._device.event()
            copied.record()
            self._copying.append((buffer, copied))
        assert out is not None
        return out

    def _read_ahead(self) -> None:
        """Give the threads chunks to read, as long as there are any and buffers for them."""
        while len(self._copying) > COPYING:
            self._reclaim()
        while self._free:
            chunk = next(self._chunks, None)
            if chunk is None:
                return
            buffer = self._free.pop()
            self._reading.append((chunk, buffer, self._threads.submit(self._read_chunk, chunk, buffer)))

    def _reclaim(self) -> None:
        buffer, event = self._copying.popleft()
        event.synchronize()
        self._free.append(buffer)

    def _read_chunk(self, chunk: Chunk, buffer: torch.Tensor) -> None:
        info, left = chunk.info, buffer.numpy().data[: chunk.num_bytes]
        offset = info.begin + chunk.begin * _row_bytes(info)
        while left:
            try:
                count = os.preadv(self._files[info.file], [left], offset)
            except OSError as error:
                raise CheckpointError(f"{info.file} cannot be read at byte {offset}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{info.file} has become shorter while it was read: it ends at byte {offset}")
            left, offset = left[count:], offset + count


def _row_bytes(info: TensorInfo) -> int:
    return math.prod(info.shape[1:]) * CHECKPOINT_DTYPES[info.dtype].itemsize


def _checked(info: TensorInfo, part: TensorSlice) -> TensorInfo:
    last_row = max((rows.stop for rows in part.rows), default=0)
    fits = len(info.shape) > 0 and last_row <= info.shape[0]
    if part.columns is not None:
        fits = fits and len(info.shape) == 2 and part.columns.stop <= info.shape[1]
    if not fits:
        raise CheckpointError(
            f"tensor {part.name!r} in {info.file.name} has shape {list(info.shape)}, too small for config.json"
        )
    return info


def _chunks(slices: list[tuple[TensorInfo, TensorSlice]], chunk_bytes: int) -> Iterator[Chunk]:
    """Of every slice at least one chunk, if only of no rows."""
    for info, part in slices:
        most = max(1, chunk_bytes // max(1, _row_bytes(info)))
        pieces = [
            range(begin, min(begin + most, rows.stop))
            for rows in _joined(part.rows)
            for begin in range(rows.start, rows.stop, most)
        ]
        for number, piece in enumerate(pieces or [range(0)], start=1):
            yield Chunk(info, piece.start, len(piece), last=number >= len(pieces))


def _joined(rows: Sequence[range]) -> list[range]:
    """The same rows, ranges that follow one another as one: those of the KV heads do."""
    found: list[range] = []
    for part in rows:
        if found and found[-1].stop == part.start:
            found[-1] = range(found[-1].start, part.stop)
        else:
            found.append(part)
    return found
