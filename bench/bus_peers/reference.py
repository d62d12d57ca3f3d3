"""Shared memory in pure Python: how far one gets without a compiler. What ours must not be much slower than.

A message is copied into one of two slots and announced by raising a word; replies go the same way. A wait looks at the
word, gives the core away, looks again, and after `SPIN_S` parks on a futex through ctypes. A lock is the only memory
fence that Python has: whoever parks says so first, whoever raises a word looks for parked ones afterwards, with a fence
in between on both sides.

Runs in: driver | worker.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time

from bus_peers.messages import decode_reply, decode_step, encode_into, make_reply, wants_reply
from bus_peers.peer import IDLE_S, TIMEOUT_S, Peer, Setup, spawn
from zmqexec.protocol import StepInput, StepOutput

SPIN_S = 50e-6
NUM_SLOTS = 2
LINE_WORDS = 16
MAX_READERS = 8
DOWN, LENGTHS, DRIVER_PARKED = 0, LINE_WORDS, LINE_WORDS + NUM_SLOTS  # words that the driver writes
UP, TAKEN, PARKED, LENGTH = range(4)  # words that a rank writes, on a line of its own: see `Memory.line`
REPLY_CAPACITY = 4096
REPLIES = 4096  # where the replies begin, in bytes
SLOTS = REPLIES + MAX_READERS * REPLY_CAPACITY
SYS_FUTEX = {"x86_64": 202, "aarch64": 98}[os.uname().machine]
FUTEX_WAIT, FUTEX_WAKE, EVERYBODY = 0, 1, 1 << 30


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_syscall = ctypes.CDLL(None).syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p]
_one_second = Timespec(1, 0)
_fence = threading.Lock()


class Memory:
    """The mapping: 32-bit words first, then the replies, then the slots."""

    def __init__(self, fd: int, capacity: int) -> None:
        self.capacity = capacity
        self._map = mmap.mmap(fd, SLOTS + NUM_SLOTS * capacity)
        self.bytes = memoryview(self._map)
        self.words = self.bytes[:REPLIES].cast("I")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @staticmethod
    def line(rank: int) -> int:
        return (2 + rank) * LINE_WORDS

    def slot(self, sequence: int) -> int:
        return SLOTS + sequence % NUM_SLOTS * self.capacity

    def wait(self, word: int, target: int, parked: int, timeout_s: float) -> None:
        """Until `word` has reached `target`; `parked` is the word that says that we sleep."""
        words = self.words
        if words[word] >= target:
            return
        started = time.perf_counter()
        while words[word] < target:
            os.sched_yield()
            elapsed_s = time.perf_counter() - started
            if elapsed_s > SPIN_S:
                words[parked] = 1
                with _fence:
                    pass
                seen = words[word]
                if seen < target:
                    address = self._address + 4 * word
                    _syscall(SYS_FUTEX, address, FUTEX_WAIT, seen, ctypes.addressof(_one_second))
                words[parked] = 0
                if elapsed_s > timeout_s:
                    raise TimeoutError(f"word {word} has not reached {target} within {timeout_s:g} s")

    def raise_word(self, word: int, value: int, parked: list[int]) -> None:
        """Let it be seen, and wake who sleeps; `parked` are the words of those who may."""
        self.words[word] = value
        with _fence:
            pass
        for flag in parked:
            if self.words[flag]:
                _syscall(SYS_FUTEX, self._address + 4 * word, FUTEX_WAKE, EVERYBODY, None)
                return


class Reference(Peer):
    def __init__(self, setup: Setup) -> None:
        if setup.num_readers > MAX_READERS:
            raise ValueError(f"{setup.num_readers} readers, of {MAX_READERS} at most")
        self._fd = os.memfd_create("bus-reference")
        capacity = -(-setup.max_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self._fd, SLOTS + NUM_SLOTS * capacity)
        self._memory = Memory(self._fd, capacity)
        self._lines = [Memory.line(rank) for rank in range(setup.num_readers)]
        self._parked = [line + PARKED for line in self._lines]
        self._sequence = 0
        self._buffer = bytearray()
        workers = [
            spawn(f"{__name__}:serve", self._fd, capacity, rank, fds=[self._fd]) for rank in range(len(self._lines))
        ]
        self.pids = [worker.pid for worker in workers]

    def round_trip(self, step: StepInput, num_replies: int) -> StepOutput:
        memory = self._memory
        words = memory.words
        encode_into(step, self._buffer)
        num_bytes = len(self._buffer)
        self._sequence = sequence = self._sequence + 1
        for line in self._lines:
            while words[line + TAKEN] + NUM_SLOTS < sequence:
                os.sched_yield()
        start = memory.slot(sequence)
        memory.bytes[start : start + num_bytes] = self._buffer
        words[LENGTHS + sequence % NUM_SLOTS] = num_bytes
        memory.raise_word(DOWN, sequence, self._parked)
        for rank in range(num_replies):
            line = self._lines[rank]
            memory.wait(line + UP, sequence, DRIVER_PARKED, TIMEOUT_S)
            start = REPLIES + rank * REPLY_CAPACITY
            reply = decode_reply.decode(memory.bytes[start : start + words[line + LENGTH]])
        return reply


def serve(fd: int, capacity: int, rank: int) -> None:
    memory = Memory(fd, capacity)
    words = memory.words
    line = Memory.line(rank)
    replies = REPLIES + rank * REPLY_CAPACITY
    buffer = bytearray()
    sequence = 0
    while True:
        sequence += 1
        memory.wait(DOWN, sequence, line + PARKED, IDLE_S)
        start = memory.slot(sequence)
        step = decode_step.decode(memory.bytes[start : start + words[LENGTHS + sequence % NUM_SLOTS]])
        words[line + TAKEN] = sequence
        if wants_reply(step, rank):
            encode_into(make_reply(step), buffer)
            memory.bytes[replies : replies + len(buffer)] = buffer
            words[line + LENGTH] = len(buffer)
            memory.raise_word(line + UP, sequence, [DRIVER_PARKED])
