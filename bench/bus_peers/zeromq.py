"""ZeroMQ over ipc with msgspec: PUB/SUB or one PUSH per worker down, PUSH/PULL up.

Runs in: driver | worker.
"""

from __future__ import annotations

import tempfile

import zmq

from bus_peers.messages import decode_reply, decode_step, encode, make_reply, wants_reply
from bus_peers.peer import TIMEOUT_S, Peer, Setup, spawn
from zmqexec.protocol import StepInput, StepOutput

COPY_BYTES = 1 << 16  # what is larger goes without a copy in Python, at both ends


class ZeroMQ(Peer):
    """options["pattern"]: pub or push."""

    def __init__(self, setup: Setup) -> None:
        self._context = zmq.Context()
        folder = tempfile.mkdtemp(dir=setup.scratch)
        pattern = setup.options["pattern"]
        # An XPUB is a PUB that tells who has subscribed: what is published before that is lost.
        kind = zmq.XPUB if pattern == "pub" else zmq.PUSH
        self._down = [self._bind(kind, f"ipc://{folder}/down0")]
        if pattern == "push":
            self._down += [self._bind(kind, f"ipc://{folder}/down{rank}") for rank in range(1, setup.num_readers)]
        self._up = self._bind(zmq.PULL, f"ipc://{folder}/up")
        self._workers = [spawn(f"{__name__}:serve", pattern, folder, rank) for rank in range(setup.num_readers)]
        self.pids = [worker.pid for worker in self._workers]
        if pattern == "pub":
            self._down[0].setsockopt(zmq.XPUB_VERBOSE, 1)
            for _ in self._workers:
                self._down[0].recv()

    def _bind(self, kind: int, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        for option in (zmq.SNDHWM, zmq.RCVHWM):
            socket.setsockopt(option, 0)  # a PUB drops what is beyond it
        socket.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        socket.setsockopt(zmq.SNDTIMEO, int(TIMEOUT_S * 1000))
        socket.bind(endpoint)
        return socket

    def round_trip(self, step: StepInput, num_replies: int) -> StepOutput:
        payload = encode(step)
        for socket in self._down:
            socket.send(payload, copy=len(payload) <= COPY_BYTES)
        for _ in range(num_replies):
            reply = decode_reply.decode(self._up.recv())
        return reply

    def close(self) -> None:
        self._context.destroy(linger=0)


def serve(pattern: str, folder: str, rank: int) -> None:
    context = zmq.Context()
    down = context.socket(zmq.SUB if pattern == "pub" else zmq.PULL)
    down.setsockopt(zmq.RCVHWM, 0)
    if pattern == "pub":
        down.setsockopt(zmq.SUBSCRIBE, b"")
    down.connect(f"ipc://{folder}/down{0 if pattern == 'pub' else rank}")
    up = context.socket(zmq.PUSH)
    up.connect(f"ipc://{folder}/up")
    while True:
        step = decode_step.decode(down.recv(copy=False).buffer)
        if wants_reply(step, rank):
            up.send(encode(make_reply(step)))
