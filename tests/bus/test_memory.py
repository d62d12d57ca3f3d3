"""Shared memory by file descriptor: nameless, inheritable on purpose only, also where memfds are forbidden."""

import fcntl
import mmap
import os
from pathlib import Path

import pytest

from zmqexec.bus.memory import shared_file


@pytest.mark.parametrize("refusal", [None, PermissionError, AttributeError])
def test_a_shared_file_has_no_name_and_can_be_mapped_by_whoever_has_its_descriptor(monkeypatch, tmp_path, refusal):
    def refuse(name, flags):
        raise refusal

    if refusal is not None:
        monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fd = shared_file("zmqexec-test")
    try:
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert list(tmp_path.iterdir()) == []
        assert "deleted" in str(Path(f"/proc/self/fd/{fd}").readlink())
        os.ftruncate(fd, mmap.PAGESIZE)
        other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        with mmap.mmap(fd, mmap.PAGESIZE) as one, mmap.mmap(other, mmap.PAGESIZE) as two:
            one[:5] = b"hello"
            assert two[:5] == b"hello"
        os.close(other)
    finally:
        os.close(fd)
