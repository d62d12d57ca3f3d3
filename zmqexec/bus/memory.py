"""Memory that processes share by file descriptor: without a name, gone with the last process that has it.

Runs in: driver | worker.
"""

from __future__ import annotations

import os
import tempfile


def shared_file(name: str) -> int:
    """The file descriptor, close-on-exec, of an empty file. OSError: the system grants none.

    A memfd where there are such, else a temporary file that has been unlinked. `name` is for people who look at /proc.
    """
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC)
    except (OSError, AttributeError):  # forbidden in this sandbox; not Linux
        with tempfile.TemporaryFile(buffering=0) as file:
            return os.dup(file.fileno())
