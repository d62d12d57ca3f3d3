"""A soak of the bus: a million messages to two readers, each of them checked twice.

ZMQEXEC_SOAK_MESSAGES=10000000 python -m pytest tests/trust/test_soak.py
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import zmqexec
from zmqexec import _bus
from zmqexec.bus import ring
from zmqexec.bus.cores import usable_cores
from zmqexec.bus.link import Outbox

NUM_MESSAGES = int(os.environ.get("ZMQEXEC_SOAK_MESSAGES", "1000000"))
NUM_READERS = 2
SEED = 3
READER = Path(__file__).parent.parent / "bus" / "stream_reader.py"
MESSAGES_PER_S = 1000
"""What any machine does; a soak that is slower has stalled."""


def stream_reader() -> Any:
    spec = importlib.util.spec_from_file_location("stream_reader", READER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(60 + NUM_MESSAGES / MESSAGES_PER_S)
def test_a_million_messages_arrive_whole_and_in_order() -> None:
    """The ring's own CRC-32C, and the messages' CRC-32 and contents. One in a hundred travels by ZeroMQ."""
    stream = stream_reader()
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        segment = _bus.Segment.create(
            num_workers=NUM_READERS,
            epoch=0,
            num_slots=ring.slots_for(stream.RING_BYTES, stream.SLOT_BYTES),
            slot_bytes=stream.SLOT_BYTES,
            reply_num_slots=2,
            reply_slot_bytes=ring.PAGE_BYTES,
            has_checksums=True,
            cores=usable_cores(),
        )
        stack.callback(segment.close)
        outbox = Outbox(segment)
        stack.callback(outbox.close)
        readers = []
        for rank in range(NUM_READERS):
            arguments = [str(segment.fd), str(rank), str(NUM_MESSAGES), str(SEED), "0.002" if rank == 0 else "0"]
            reader = subprocess.Popen(
                [sys.executable, str(READER), *arguments],
                env={**os.environ, "PYTHONPATH": str(Path(zmqexec.__file__).parent.parent)},
                pass_fds=[segment.fd],
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(reader)
            stack.callback(reader.kill)
            readers.append(reader)

        def check() -> None:
            assert all(reader.poll() is None for reader in readers), "a reader ended early"

        num_large = 0
        for message in stream.messages(NUM_MESSAGES, SEED):
            outbox.send(message, 30.0, check)
            num_large += len(message) > stream.RING_BYTES
        whole = {"intact": NUM_MESSAGES, "torn": 0, "out of order": 0, "large": num_large, "more": 0}
        for reader in readers:
            assert json.loads(reader.communicate(timeout=60)[0]) == whole
            assert reader.returncode == 0
        published, *_, ranks = segment.statistics()
        assert published == NUM_MESSAGES and [rank[1] for rank in ranks] == [NUM_MESSAGES] * NUM_READERS
        assert [rank[4] for rank in ranks] == [0] * NUM_READERS, "checksum failures"
    print(f"{NUM_MESSAGES} messages, {num_large} of them by ZeroMQ, in {time.monotonic() - begin:.1f} s")
