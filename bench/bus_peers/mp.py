"""What the standard library's `multiprocessing` offers: pipes, queues, and shared memory with events. All pickle.

Runs in: driver | worker.
"""

from __future__ import annotations

import multiprocessing
import pickle
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from bus_peers.messages import make_reply, wants_reply
from bus_peers.peer import TIMEOUT_S, Peer, Setup, Unsupported, die_with_parent
from zmqexec.protocol import StepInput, StepOutput

LENGTH_BYTES = 4
REPLY_CAPACITY = 4096


class Multiprocessing(Peer):
    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self.pids = []

    def _start(self, target: Any, *arguments: Any) -> None:
        process = self._context.Process(target=target, args=arguments, daemon=True)
        process.start()
        self.pids.append(process.pid)


class Pipes(Multiprocessing):
    """A duplex pipe per worker."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self._pipes: list[Connection] = []
        for rank in range(setup.num_readers):
            ours, theirs = self._context.Pipe()
            self._start(serve_pipe, theirs, rank)
            theirs.close()
            self._pipes.append(ours)

    def round_trip(self, step: StepInput, num_replies: int) -> StepOutput:
        for pipe in self._pipes:
            pipe.send(step)
        for pipe in self._pipes[:num_replies]:
            reply = pipe.recv()
        return reply


def serve_pipe(pipe: Connection, rank: int) -> None:
    die_with_parent()
    while True:
        step = pipe.recv()
        if wants_reply(step, rank):
            pipe.send(make_reply(step))


class Queues(Multiprocessing):
    """A queue down to each worker and one for all replies."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self._down = [self._context.Queue() for _ in range(setup.num_readers)]
        self._up = self._context.Queue()
        for rank, queue in enumerate(self._down):
            self._start(serve_queue, queue, self._up, rank)

    def round_trip(self, step: StepInput, num_replies: int) -> StepOutput:
        for queue in self._down:
            queue.put(step)
        for _ in range(num_replies):
            reply = self._up.get(timeout=TIMEOUT_S)
        return reply


def serve_queue(down: Any, up: Any, rank: int) -> None:
    die_with_parent()
    while True:
        step = down.get()
        if wants_reply(step, rank):
            up.put(make_reply(step))


class SharedMemoryEvents(Multiprocessing):
    """Shared memory, an event per worker and pickle, as nano-vllm does it; the replies go back the same way."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self._memory = SharedMemory(create=True, size=setup.max_bytes + 4096)
        self._replies = SharedMemory(create=True, size=REPLY_CAPACITY * setup.num_readers)
        self._events = [self._context.Event() for _ in range(setup.num_readers)]
        self._answered = [self._context.Event() for _ in range(setup.num_readers)]
        for rank in range(setup.num_readers):
            names = (self._memory.name, self._replies.name)
            self._start(serve_shared_memory, names, self._events[rank], self._answered[rank], rank)

    def check(self, num_readers: int, num_replies: int) -> None:
        if num_replies < num_readers:
            raise Unsupported("the next message would overwrite what a rank that sends no reply has not read")

    def round_trip(self, step: StepInput, num_replies: int) -> StepOutput:
        _write(self._memory, 0, step)
        for event in self._events:
            event.set()
        for rank, event in enumerate(self._answered):
            if not event.wait(TIMEOUT_S):
                raise TimeoutError(f"no reply from rank {rank} within {TIMEOUT_S:g} s")
            event.clear()
            reply = _read(self._replies, REPLY_CAPACITY * rank)
        return reply

    def close(self) -> None:
        for memory in (self._memory, self._replies):
            memory.close()
            memory.unlink()


def serve_shared_memory(names: tuple[str, str], event: Any, answered: Any, rank: int) -> None:
    die_with_parent()
    memory, replies = (SharedMemory(name) for name in names)
    while True:
        event.wait()
        step = _read(memory, 0)
        event.clear()
        _write(replies, REPLY_CAPACITY * rank, make_reply(step))
        answered.set()


def _write(memory: SharedMemory, start: int, message: object) -> None:
    data = pickle.dumps(message)
    memory.buf[start : start + LENGTH_BYTES] = len(data).to_bytes(LENGTH_BYTES, "little")
    memory.buf[start + LENGTH_BYTES : start + LENGTH_BYTES + len(data)] = data


def _read(memory: SharedMemory, start: int) -> Any:
    num_bytes = int.from_bytes(memory.buf[start : start + LENGTH_BYTES], "little")
    return pickle.loads(memory.buf[start + LENGTH_BYTES : start + LENGTH_BYTES + num_bytes])
