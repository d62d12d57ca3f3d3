"""The C extension: shared memory, records, waiting. `zmqexec.bus` is what the rest of the package uses.

Runs in: driver | worker | server, and in `zmqexec-top`, which only observe.
"""

from collections.abc import Callable
from typing import Any, Final, final

from _typeshed import ReadableBuffer

BUILD_ID: Final[str]  # digest of the C sources; two processes on one bus must have the same
LAYOUT_VERSION: Final[int]
BUCKET_FIRST_OCTAVE: Final[int]  # histograms have four buckets to an octave, from 2**this nanoseconds
NUM_BUCKETS: Final[int]

Decoders = tuple[Callable[[Any], Any], ...]  # of something with the buffer protocol
EncodeInto = Callable[[Any, bytearray], None]
Waits = tuple[int, int, int, int]  # spun, parked, spun_ns, parked_ns
RankStatistics = tuple[
    int,  # attached_ns
    int,  # received
    int,  # replied
    int,  # blocked_ns
    int,  # checksum_failures
    int,  # unread slots of the broadcast ring
    int,  # unread slots of its reply ring
    Waits,
    tuple[int, list[int]],  # pick-up: sum_ns, counts
    tuple[int, list[int]],  # reply
]

@final
class Segment:
    """One process's view of an engine's shared memory.

    The driver (rank -1) writes the broadcast ring and reads every reply ring; rank r reads the broadcast ring and
    writes reply ring r; an observer (rank -2) sees the status pages. One thread writes and one (the same or another)
    reads, or BusError says that there are two; everything else may come from any. Every method raises BusClosed after
    `close`, BusError in a fork of the process that opened the segment.
    """

    @classmethod
    def create(
        cls,
        *,
        num_workers: int,
        epoch: int,
        num_slots: int,
        slot_bytes: int,
        reply_num_slots: int,
        reply_slot_bytes: int,
        has_checksums: bool = False,
        wait_policy: int = 1,
        cores: int = 0,
        name: str = "",
    ) -> Segment:
        """The driver's view of a new segment. ValueError: a geometry that cannot be; BusError: the system refused.

        has_checksums  every record carries a CRC-32C of its payload, which its readers check
        wait_policy    of all processes: 0 latency, 1 balanced, 2 eco (wait.c)
        cores          cores that this process may use: with fewer than processes, spinning yields at every turn
        name           what tools show; cut to 63 bytes
        """

    @classmethod
    def attach(cls, fd: int, rank: int, cores: int = 0, /) -> Segment:
        """Rank `rank`'s view of the segment in memfd `fd`, which stays the caller's to close.

        BusError: not a bus, another layout version, a geometry that does not fit the file, an unsealed file, a rank
        that another attached as before.
        """

    @classmethod
    def observe(cls, fd: int, /) -> Segment:
        """A view of the status pages, mapped read-only. BusError as in `attach`."""

    @property
    def closed(self) -> bool:
        """Closed here, or by the driver."""

    @property
    def fd(self) -> int:
        """The driver's memfd, close-on-exec, to be passed to workers; -1 elsewhere and after `close`."""

    @property
    def rank(self) -> int:
        """-1: the driver; -2: an observer."""

    @property
    def last_reader(self) -> int:
        """In the driver: the rank whose ring `read` looked at last."""

    @property
    def epoch(self) -> int: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def max_payload_bytes(self) -> int:
        """The largest payload that `write` takes."""

    def close(self) -> None:
        """End all waits of this process, and of the workers if this is the driver; then unmap. Idempotent."""

    def write(self, payload: ReadableBuffer, kind: int, timeout_s: float, /) -> bool:
        """Publish a copy of `payload`, waiting at most `timeout_s` for slots, without the GIL; False at the deadline.

        OverflowError: `kind` is not in [0, 2**32 - 1). ValueError: larger than `max_payload_bytes`. BusClosed: also
        when the driver closed. ProtocolError: the shared memory is damaged.
        """

    def encode(self, encode_into: EncodeInto, message: Any, kind: int, /) -> bool:
        """Publish what `encode_into(message, buffer)` makes of `buffer`, a bytearray that lies in the ring.

        False where it does not fit the slots that it finds free, or the ring: `write` its bytes then. `encode_into` is
        msgspec's, which sets the buffer's size; a buffer that is to grow raises BufferError, and it may be called a
        second time with a larger one. BufferError as long as it keeps a view of the buffer. Whatever else it raises
        is raised here; BusClosed and ProtocolError as `write`.
        """

    def read(self, decoders: Decoders, timeout_s: float, rehearse: Callable[[], object] | None = None, /) -> Any:
        """`decoders[kind](payload)` of the next record, waiting at most `timeout_s` for one, without the GIL.

        The driver gets (rank, that), ranks in turn. The payload is an object with the buffer protocol that shows the
        ring itself; BufferError as long as a decoder keeps a view of it. None at the deadline, or for a `wake`. An
        exception of the decoder is raised here, and its record is gone. BusClosed: the driver closed and everything it
        published was read. ProtocolError: the record is damaged or of an unknown kind; where damaged it stays, and so
        does the error. `rehearse` is called when a record is about to come, to warm the caches, if the wait policy has
        time for that; what it raises is raised here, and no record is gone.
        """

    def wake(self) -> None:
        """Make this process's `read` return None, once, when it next finds no record."""

    def holding_back(self, length: int, /) -> list[int]:
        """Readers of our ring for whose sake a payload of `length` bytes cannot be written now."""

    def set_status(self, phase: int, step_id: int, /) -> None:
        """This rank's phase (8 bits) and step (56 bits), with the time."""

    def set_error(self, text: str, /) -> None:
        """This rank's last error: the first 232 bytes of it."""

    def set_gauges(self, values: tuple[int, ...], /) -> None:
        """The engine's figures for whoever observes: at most 16 unsigned integers of 64 bits."""

    def status(self, rank: int, /) -> tuple[int, int, int, int, str]:
        """(pid, phase, step_id, heartbeat_ns, error) of a rank; pid is 0 before it attached."""

    def statistics(
        self,
    ) -> tuple[int, int, int, int, Waits, tuple[int, ...], int, tuple[RankStatistics, ...]]:
        """(published, published_bytes, blocked_ns, checksum_failures, waits, gauges, gauges_ns, ranks)."""

    def header(self) -> tuple[str, int, int, int, int, int]:
        """(name, driver_pid, created_ns, wait_policy, num_slots, reply_num_slots)."""

def arm_death_watch(parent_pid: int, lifeline_fd: int, /) -> None:
    """End this process (`_exit(1)`) when its parent has exited or the pipe `lifeline_fd` has hung up.

    A C thread watches, whatever Python does; it owns a duplicate of the fd. Ends the process at once if `parent_pid` is
    not its parent (any more). BusError: it cannot be armed, or is armed already.
    """
