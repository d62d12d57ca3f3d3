"""A worker process of test_zmq_channel.py: takes messages and replies once, with one checksum over all of them.

Usage: bus_reader.py ring|zmq FD|ENDPOINT RANK NUM_MESSAGES
"""

import sys
import zlib

import msgspec

from zmqexec.bus.echo_worker import Echo
from zmqexec.protocol import StepOutput


def main(transport: str, where: str, rank: int, num_messages: int) -> None:
    if transport == "ring":
        from zmqexec.bus.channel import WorkerChannel

        channel = WorkerChannel.attach(int(where), rank)
    else:
        from zmqexec.bus.zeromq.worker_channel import ZmqWorkerChannel

        channel = ZmqWorkerChannel.connect(where, rank)
    encode = msgspec.msgpack.Encoder().encode
    with channel:
        crc32 = 0
        for number in range(num_messages):
            message = channel.receive(timeout_s=60)
            if message is None:
                raise TimeoutError(f"message {number} did not come")
            crc32 = zlib.crc32(encode(message), crc32)
        extra = channel.receive(timeout_s=0.05)
        channel.reply(StepOutput(channel.epoch, -1 if extra is None else 1, Echo(rank, crc32).pack()), timeout_s=60)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
