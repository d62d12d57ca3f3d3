"""The system's page cache of files: how much of a file it holds, and how to empty it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def drop(files: Iterable[Path]) -> None:
    """Ask the system to forget what it holds of these files. It keeps what is not written yet, and on tmpfs all."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def held_share(files: Iterable[Path]) -> float:
    """The share of the files' pages that need no reading, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    held = total = 0
    for file in files:
        size = file.stat().st_size
        if size == 0:
            continue
        pages = -(-size // mmap.PAGESIZE)
        found = ctypes.create_string_buffer(pages)
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            first = ctypes.c_char.from_buffer(mapped)
            address = ctypes.addressof(first)
            failed = libc.mincore(address, size, found)
            del first
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed")
        held += sum(byte & 1 for byte in found.raw)
        total += pages
    return held / max(1, total)
