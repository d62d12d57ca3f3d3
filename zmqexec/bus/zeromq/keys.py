"""The CURVE keys of a bus that spans hosts: one pair for the driver, one per rank.

Runs in: driver | worker.

Every rank knows the driver's public key and its own pair, the driver knows its own pair and the ranks' public keys:
each side proves who it is, and nobody else can read or write. A worker gets its keys in a file of mode 0600 or over an
inherited file descriptor, never on its command line or in its environment, which other processes can look at.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import zmq

from zmqexec.errors import ConfigError

KEY_CHARS = 40  # 32 bytes in Z85
MAX_FILE_BYTES = 4096


class WorkerKeys(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What rank `rank` has to know: Z85 text, as libzmq writes keys."""

    rank: int
    driver_public: str
    public: str
    secret: str

    def __repr__(self) -> str:
        """Without the secret, so that no log has it."""
        return f"WorkerKeys(rank={self.rank}, public={self.public!r})"


class DriverKeys(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the driver has to know. `worker_public[rank]` is the one key that is admitted as that rank."""

    public: str
    secret: str
    worker_public: list[str]

    def __repr__(self) -> str:
        """Without the secret, so that no log has it."""
        return f"DriverKeys(public={self.public!r}, worker_public={self.worker_public!r})"


def new_keys(num_workers: int) -> tuple[DriverKeys, list[WorkerKeys]]:
    """Fresh keys for a driver and its workers. ConfigError: this libzmq was built without CURVE."""
    check_curve()
    public, secret = _pair()
    pairs = [_pair() for _ in range(num_workers)]
    workers = [WorkerKeys(rank, public, *pair) for rank, pair in enumerate(pairs)]
    return DriverKeys(public, secret, [pair[0] for pair in pairs]), workers


def write_keys(path: Path, keys: WorkerKeys) -> None:
    """Write a rank's keys to a new file that only this user can read."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.json.encode(keys))


def read_keys(source: Path | int) -> WorkerKeys:
    """A rank's keys from a file, or to the end of a file descriptor, which stays the caller's.

    ConfigError: they cannot be read, are none, or other users could have read them too.
    """
    name = f"file descriptor {source}" if isinstance(source, int) else str(source)
    try:
        fd = os.dup(source) if isinstance(source, int) else os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the keys cannot be read from {name}: {error.strerror}", "keys") from error
    if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
        raise ConfigError(
            f"{name} has mode {stat.S_IMODE(status.st_mode):04o}, so that others can read the secret key: "
            "make new keys and write them with mode 0600",
            "keys",
        )
    try:
        keys = msgspec.json.decode(data, type=WorkerKeys)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{name} holds no keys of a rank: {error}", "keys") from error
    for key in (keys.driver_public, keys.public, keys.secret):
        check_key(key, name)
    return keys


def check_key(key: str, where: str) -> None:
    """ConfigError unless `key` has the form of one. Does not repeat it: it may be a secret."""
    if len(key) != KEY_CHARS or not key.isascii():
        raise ConfigError(f"{where} holds a key that is not {KEY_CHARS} characters of Z85", "keys")


def check_curve() -> None:
    """ConfigError: this libzmq cannot keep strangers away.

    Before 4.3.3 it handed a connection to the socket before it knew who was there.
    """
    if not zmq.has("curve") or zmq.zmq_version_info() < (4, 3, 3):
        raise ConfigError(
            f"tcp:// needs libzmq 4.3.3 or newer with CURVE; this is {zmq.zmq_version()}, CURVE: {zmq.has('curve')}. "
            "The wheels of pyzmq have it",
            "transport",
        )


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()
