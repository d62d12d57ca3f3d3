"""The C extension: shared memory, records, bells. `zmqexec.bus` is what the rest of the package uses.

Runs in: driver | worker.
"""

from typing import Final, final

from _typeshed import ReadableBuffer

BUILD_ID: Final[str]  # digest of the C sources; two processes on one bus must have the same
LAYOUT_VERSION: Final[int]
WORKER_BELL: Final[int]  # the driver published or closed
SPACE_BELL: Final[int]  # a worker freed slots of the broadcast ring
DRIVER_BELL: Final[int]  # a worker replied
REPLY_SPACE_BELL: Final[int]  # the driver freed slots of a reply ring, or closed

@final
class Segment:
    """One process's view of an engine's shared memory.

    The driver (rank -1) writes the broadcast ring and reads every reply ring; rank r reads the broadcast ring and
    writes reply ring r. Every method may be called from any thread and raises BusClosed after `close`, BusError in a
    fork of the process that opened the segment. No method blocks but `wait`.
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
    ) -> Segment:
        """The driver's view of a new segment. ValueError: a geometry that cannot be; BusError: the system refused."""

    @classmethod
    def attach(cls, fd: int, rank: int, /) -> Segment:
        """Rank `rank`'s view of the segment in memfd `fd`, which stays the caller's to close.

        BusError: not a bus, another layout version, a geometry that does not fit the file, an unsealed file.
        """

    @property
    def closed(self) -> bool:
        """Closed here, or by the driver."""

    @property
    def fd(self) -> int:
        """The driver's memfd, close-on-exec, to be passed to workers; -1 in a worker and after `close`."""

    @property
    def rank(self) -> int:
        """-1: the driver."""

    @property
    def epoch(self) -> int: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def max_payload_bytes(self) -> int:
        """The largest payload that `try_write` takes."""

    def close(self) -> None:
        """End all waits of this process, and of the workers if this is the driver; then unmap. Idempotent."""

    def try_write(self, payload: ReadableBuffer, kind: int, /) -> bool:
        """Publish a copy of `payload`; False while a reader still owns the slots.

        ValueError: larger than `max_payload_bytes`. BusClosed: also when the driver closed. ProtocolError: the shared
        memory is damaged.
        """

    def try_read(self, index: int = 0, /) -> tuple[int, bytes] | None:
        """(kind, payload) of the next record; in the driver `index` is the rank whose replies are read.

        BusClosed: the driver closed and everything it published was read. ProtocolError: the record is damaged; it
        stays, and so does the error.
        """

    def holding_back(self, length: int, /) -> list[int]:
        """Readers of our ring for whose sake a payload of `length` bytes cannot be written now."""

    def bell_value(self, bell: int, /) -> int: ...
    def ring_bell(self, bell: int, /) -> None: ...
    def wait(self, bell: int, seen: int, timeout_s: float, spin_us: float, /) -> bool:
        """Wait until `bell` has rung since its value was `seen`; False at the deadline. Releases the GIL.

        Read the value first, then check every condition, then wait: a ring in between ends the wait at once. Spins for
        `spin_us` before it parks. Signal handlers run, and may raise.
        """

    def set_status(self, phase: int, step_id: int, /) -> None:
        """This rank's phase (8 bits) and step (56 bits), with the time."""

    def set_error(self, text: str, /) -> None:
        """This rank's last error: the first 232 bytes of it."""

    def status(self, rank: int, /) -> tuple[int, int, int, int, str]:
        """(pid, phase, step_id, heartbeat_ns, error) of a rank; pid is 0 before it attached."""

def arm_death_watch(parent_pid: int, lifeline_fd: int, /) -> None:
    """End this process (`_exit(1)`) when its parent has exited or the pipe `lifeline_fd` has hung up.

    A C thread watches, whatever Python does; it owns a duplicate of the fd. Ends the process at once if `parent_pid` is
    not its parent (any more). BusError: it cannot be armed, or is armed already.
    """
