"""Where the sockets of the ZeroMQ transport meet: on this machine, or over TCP under CURVE.

Runs in: driver | worker.

Each rank has three endpoints, all bound by the driver: `control`, which its worker is told, and the two lanes, which it
learns there. On Linux they are abstract sockets, which leave no file and admit this user's processes only (see
zmq_path.py). Elsewhere they are sockets in a directory of mode 0700, removed by the process that made it.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, cast

import zmq

from zmqexec.bus.zeromq.keys import DriverKeys, WorkerKeys, check_curve, check_key
from zmqexec.bus.zeromq.lane import Context, Socket
from zmqexec.bus.zmq_path import IPC_FILTER_UID, new_endpoint
from zmqexec.errors import BusError, ConfigError

CONTROL, DOWN, UP = range(3)
NAMES = ("control", "down", "up")
MAX_WORKERS = 64
MAX_CONTROL_BYTES = 64 << 10
DEFAULT_LOST_AFTER_S = 5.0
DEFAULT_LINGER_S = 1.0
WIRE_SLACK = 256  # what CURVE and ZMTP add to a message
HANDSHAKE_S = 5.0
"""Whoever connects and does not say who he is within this is disconnected."""

DESCRIPTORS = 20  # context, pipes, key check
DESCRIPTORS_PER_RANK = 15  # three sockets with listener, connection and, over TCP, both ends of a monitor
LANE_RECONNECT_MS = 3_600_000

PATH_LIMIT = 107 if sys.platform == "linux" else 103  # of a Unix socket's name, without the final zero
TCP = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:\[\]/]+):(?P<port>\d{1,5}|\*)")


class Place(Protocol):
    """Endpoints to bind, three for each rank. `close` removes what it made. Idempotent."""

    def endpoint(self, rank: int, kind: int) -> str:
        """Where to bind."""
        ...

    def close(self) -> None:
        """Nothing to remove."""
        return


class AbstractPlace(Place):
    """Names in Linux's abstract namespace."""

    def __init__(self) -> None:
        self._name = new_endpoint()

    def endpoint(self, rank: int, kind: int) -> str:
        return f"{self._name}-{rank}-{NAMES[kind]}"


class DirectoryPlace(Place):
    """Sockets in a directory that only this user may enter."""

    def __init__(self, parent: Path | None = None) -> None:
        """parent: where to make the directory; None: where temporary files go."""
        self.path = Path(tempfile.mkdtemp(prefix="zmqexec-", dir=parent))  # mode 0700
        # Also when the program ends without closing, but not when a fork of it ends.
        self._finalizer = weakref.finalize(self, _remove, self.path, os.getpid())
        longest = self.path / f"{MAX_WORKERS}-{NAMES[CONTROL]}"
        num_bytes = len(os.fsencode(longest))
        if num_bytes > PATH_LIMIT:
            self.close()
            raise ConfigError(
                f"the socket {longest} would have a name of {num_bytes} bytes, and the system allows {PATH_LIMIT}: "
                "set TMPDIR to a directory with a shorter name",
                "transport",
            )

    def endpoint(self, rank: int, kind: int) -> str:
        return f"ipc://{self.path / f'{rank}-{NAMES[kind]}'}"

    def close(self) -> None:
        self._finalizer()


class TcpPlace(Place):
    """Ports of one address: consecutive ones from the given port on, or any where it is 0."""

    def __init__(self, address: str) -> None:
        self._host, self._port = parse_tcp(address)

    def endpoint(self, rank: int, kind: int) -> str:
        if self._port == 0:
            return f"tcp://{self._host}:*"
        return f"tcp://{self._host}:{self._port + 3 * rank + kind}"


def make_place(listen: str | None, keys: DriverKeys | None, num_workers: int) -> Place:
    """Where a driver of `num_workers` binds. ConfigError: that cannot be done, or not safely.

    listen   tcp://HOST:PORT, with keys; None: this machine
    """
    if not 1 <= num_workers <= MAX_WORKERS:
        raise ConfigError(f"{num_workers} workers: a bus has 1 to {MAX_WORKERS}", "tensor_parallel_size")
    if listen is None:
        if keys is not None:
            raise ConfigError("keys are for tcp://HOST:PORT; on one machine the kernel says who connects", "keys")
        return AbstractPlace() if sys.platform == "linux" else DirectoryPlace()
    if keys is None:
        raise ConfigError(f"{listen} needs keys: without, anyone who can reach the port could read and write", "keys")
    check_curve()
    if len(keys.worker_public) != num_workers or len(set(keys.worker_public)) != num_workers:
        raise ConfigError(f"{num_workers} workers need as many different keys, not {keys.worker_public}", "keys")
    for key in (keys.public, keys.secret, *keys.worker_public):
        check_key(key, "DriverKeys")
    place = TcpPlace(listen)
    parse_tcp(place.endpoint(num_workers - 1, UP).replace("*", "0"))  # the last port too
    return place


def parse_tcp(address: str) -> tuple[str, int]:
    """(host, port) of tcp://HOST:PORT; port 0 also for `*`."""
    match = TCP.fullmatch(address)
    if match is None:
        raise ConfigError(f"{address!r} is no address: expected tcp://HOST:PORT, HOST in brackets for IPv6", "listen")
    port = 0 if match["port"] == "*" else int(match["port"])
    if port > 65535:
        raise ConfigError(f"{address}: ports end at 65535; each rank takes three", "listen")
    return match["host"], port


def lane_name(address: str) -> str:
    """What a worker is told: `:PORT` of a TCP address, for the worker knows the host by another name, maybe."""
    return ":" + address.rpartition(":")[2] if address.startswith("tcp://") else address


def lane_endpoint(control: str, lane: str) -> str:
    """The address of a lane that was named by `lane_name`, for a worker that reached the driver at `control`."""
    return control.rpartition(":")[0] + lane if lane.startswith(":") else lane


def check_descriptors(num_ranks: int) -> None:
    """BusError: this process may not open enough files. libzmq would abort it at some of them."""
    needed = DESCRIPTORS + num_ranks * DESCRIPTORS_PER_RANK
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        num_open = sum(1 for _ in Path("/dev/fd").iterdir())
    except OSError:  # not even one more
        num_open = limit
    if limit != resource.RLIM_INFINITY and num_open + needed > limit:
        raise BusError(
            f"the bus needs up to {needed} file descriptors, this process has {num_open} open and may have {limit}: "
            "raise the limit (ulimit -n)"
        )


def open_context(is_remote: bool) -> Context:
    """Over TCP with a thread of libzmq's for control alone: heartbeats must not wait while it encrypts 64 MiB."""
    return zmq.Context(io_threads=2 if is_remote else 1)


def open_socket(
    context: Context,
    kind: int,
    high_water_mark: int,
    max_message_bytes: int,
    lost_after_s: float | None,
) -> Socket:
    """A PAIR socket, neither bound nor connected.

    lost_after_s  over TCP, else None. On control, ZeroMQ's heartbeats show within this that the peer's host has
                  vanished. Lanes have none: a slow reader's connection stands still, and must not be taken for dead.
    """
    socket = context.socket(zmq.PAIR)
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = high_water_mark
    socket.maxmsgsize = max_message_bytes + WIRE_SLACK
    socket.handshake_ivl = int(HANDSHAKE_S * 1e3)
    if lost_after_s is not None:
        socket.affinity = 0b10 if kind == CONTROL else 0b01
    if kind == CONTROL and lost_after_s is not None:
        socket.heartbeat_ivl = max(1, int(lost_after_s * 1e3 / 4))
        socket.heartbeat_timeout = max(1, int(lost_after_s * 1e3 * 3 / 4))
    if kind != CONTROL:
        # What a broken connection lost stays lost. Not -1 (never): libzmq would then drop what came but was not read.
        socket.reconnect_ivl = LANE_RECONNECT_MS
    return socket


def bind(socket: zmq.Socket[Any], endpoint: str, rank: int, keys: DriverKeys | None) -> str:
    """Bind for `rank` alone; the endpoint as it became. ConfigError: the address cannot be had."""
    if keys is not None:
        socket.curve_server = True
        socket.curve_publickey = keys.public.encode()
        socket.curve_secretkey = keys.secret.encode()
        socket.zap_domain = str(rank).encode()
        socket.ipv6 = endpoint.startswith("tcp://[")
    elif endpoint.startswith("ipc://@"):
        socket.setsockopt(IPC_FILTER_UID, os.getuid())
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(f"{endpoint} cannot be bound: {error.strerror}", "listen") from error
    return cast(bytes, socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()


def connect(socket: Socket, endpoint: str, keys: WorkerKeys | None) -> None:
    """Begin to connect. ConfigError: such an address cannot be used."""
    if keys is not None:
        socket.curve_publickey = keys.public.encode()
        socket.curve_secretkey = keys.secret.encode()
        socket.curve_serverkey = keys.driver_public.encode()
        socket.ipv6 = endpoint.startswith("tcp://[")
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(f"{endpoint} cannot be connected to: {error.strerror}", "connect") from error


def destroy(context: Context, sockets: Iterable[tuple[Socket, float]]) -> None:
    """Close sockets and context. What a socket has sent gets its number of seconds to leave this process."""
    for socket, linger_s in sockets:
        socket.close(linger=int(linger_s * 1e3))
    context.term()


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)
