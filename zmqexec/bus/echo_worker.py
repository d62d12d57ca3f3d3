"""A worker without a model: answers every message, and so proves that a host can read the bus.

Runs in: worker.

    python -m zmqexec.bus.echo_worker --connect tcp://HOST:PORT --keys FILE

The answer to a message is a `StepOutput` with its step id (-1 if it has none), whose `token_ids` are an `Echo`: the
rank, and the CRC-32 of the message as it arrived.
"""

from __future__ import annotations

import argparse
import struct
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import msgspec

from zmqexec.bus.status import Phase
from zmqexec.bus.zeromq.keys import read_keys
from zmqexec.bus.zeromq.worker_channel import ZmqWorkerChannel
from zmqexec.errors import BusClosed, ZmqexecError
from zmqexec.protocol import StepInput, StepOutput, ToWorker

LAYOUT = struct.Struct("<iI")
WAIT_S = 60.0
REPLY_TIMEOUT_S = 60.0


class Echo(NamedTuple):
    """What an echo worker saw of a message."""

    rank: int
    crc32: int

    def pack(self) -> bytes:
        """For `StepOutput.token_ids`."""
        return LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Echo:
        """What `pack` packed."""
        return cls(*LAYOUT.unpack(data))

    @classmethod
    def of(cls, rank: int, message: ToWorker) -> Echo:
        """What rank `rank` should answer to `message`."""
        return cls(rank, zlib.crc32(msgspec.msgpack.encode(message)))


def serve(channel: ZmqWorkerChannel) -> tuple[int, str]:
    """Answer until the bus closes; how many messages there were, and how it ended."""
    num_messages = 0
    try:
        while True:
            channel.set_status(Phase.IDLE, -1)
            message = channel.receive(WAIT_S)
            if message is None:
                continue
            step_id = message.step_id if isinstance(message, StepInput) else -1
            channel.set_status(Phase.REPLYING, step_id)
            echo = Echo.of(channel.rank, message)
            channel.reply(StepOutput(channel.epoch, step_id, echo.pack()), REPLY_TIMEOUT_S)
            num_messages += 1
    except BusClosed as error:
        return num_messages, str(error)


def main() -> int:
    """Run one echo worker; the exit code."""
    parser = argparse.ArgumentParser(description="Answer every message of a zmqexec bus with its checksum.")
    parser.add_argument("--connect", required=True, metavar="ENDPOINT", help="tcp://HOST:PORT, or ipc:// on one host")
    keys_from = parser.add_mutually_exclusive_group()
    keys_from.add_argument("--keys", type=Path, metavar="FILE", help="this rank's keys, a file of mode 0600")
    keys_from.add_argument("--keys-fd", type=int, metavar="FD", help="the same from an inherited file descriptor")
    parser.add_argument("--rank", type=int, help="for ipc://; over TCP the keys say it")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="how long to wait for the driver")
    parser.add_argument("--lost-after", type=float, default=5.0, metavar="S", help="silence that means it is lost")
    options = parser.parse_args()
    try:
        source = options.keys if options.keys_fd is None else options.keys_fd
        keys = None if source is None else read_keys(source)
        rank = options.rank if options.rank is not None else 0 if keys is None else keys.rank
        with ZmqWorkerChannel.connect(
            options.connect, rank, keys=keys, timeout_s=options.timeout, lost_after_s=options.lost_after
        ) as channel:
            print(f"rank {rank} of {channel.num_workers} has joined", flush=True)
            num_messages, end = serve(channel)
            print(f"rank {rank} answered {num_messages} messages: {end}", flush=True)
    except ZmqexecError as error:
        print(f"echo worker: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
