"""A reader process of test_stream.py: attaches to the bus, checks every message, and prints what it saw as JSON.

Usage: stream_reader.py FD RANK NUM_MESSAGES SEED MAX_DELAY_S
"""

import json
import random
import sys
import time
import zlib
from collections.abc import Iterator

from zmqexec import _bus
from zmqexec.bus.link import Inbox

SLOT_BYTES = 256
RING_BYTES = 64 << 10
NOISE = random.Random(1).randbytes(2 * RING_BYTES)


def messages(num_messages: int, seed: int) -> Iterator[bytes]:
    """The messages, the same in every process: a CRC-32 of the rest, the number, then noise.

    They take 2 to 4 slots; one in a hundred is larger than the ring.
    """
    choose = random.Random(seed)
    for number in range(num_messages):
        if choose.random() < 0.01:
            length = RING_BYTES + choose.randrange(RING_BYTES // 2)
        else:
            length = choose.randrange(SLOT_BYTES + 1, 4 * SLOT_BYTES) - 40 - 8
        body = number.to_bytes(4, "little") + NOISE[number % 1024 : number % 1024 + length]
        yield zlib.crc32(body).to_bytes(4, "little") + body


def main(fd: int, rank: int, num_messages: int, seed: int, max_delay_s: float) -> None:
    segment = _bus.Segment.attach(fd, rank)
    inbox = Inbox(segment, bytes)
    delays = random.Random(rank)
    seen = {"intact": 0, "torn": 0, "out of order": 0, "large": 0}
    for number, expected in enumerate(messages(num_messages, seed)):
        if max_delay_s and delays.random() < 0.001:
            time.sleep(delays.uniform(0, max_delay_s))
        got = inbox.receive(30.0)
        if got is None:
            raise TimeoutError(f"message {number} did not come")
        if got[:4] != zlib.crc32(memoryview(got)[4:]).to_bytes(4, "little"):
            seen["torn"] += 1
        elif got != expected:
            seen["out of order"] += 1
        else:
            seen["intact"] += 1
            seen["large"] += len(got) > RING_BYTES
    seen["more"] = sum(1 for _ in iter(lambda: inbox.receive(0.0), None))
    print(json.dumps(seen))
    inbox.close()
    segment.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), float(sys.argv[5]))
