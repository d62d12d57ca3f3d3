"""What a frame of the ZeroMQ transport looks like, and how it is checked.

Runs in: driver | worker.

    magic "zx" | version u8 | kind u8 | epoch u64 | sequence u64 | length u64 | crc32 u32 | payload

All little-endian. The checksum covers the payload and then the header before it. ZeroMQ delivers whole messages over
connections that check their bytes already; what these fields catch is a peer of another version or epoch, a message
that a reconnection lost or repeated, and a bug of ours.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from zmqexec.errors import ProtocolError

MAGIC = b"zx"
VERSION = 1
DATA = 0  # kinds
CREDIT = 1  # payload: CREDIT_PAYLOAD
CLOSE = 2  # no payload: the sender sends nothing more

FIELDS = struct.Struct("<2sBBQQQ")
CRC = struct.Struct("<I")
HEADER_BYTES = FIELDS.size + CRC.size
CREDIT_PAYLOAD = struct.Struct("<QQ")
"""Messages and payload bytes that the receiver has taken since the beginning."""


class ChecksumError(ProtocolError):
    """A frame whose checksum is not that of its bytes."""


class Frame(NamedTuple):
    """A frame that has been checked. `payload` is a view of the bytes it came in."""

    kind: int
    epoch: int
    sequence: int
    payload: memoryview


def seal(buffer: bytearray, kind: int, epoch: int, sequence: int) -> None:
    """Write the header of a frame whose payload already stands in `buffer`, from `HEADER_BYTES` on."""
    FIELDS.pack_into(buffer, 0, MAGIC, VERSION, kind, epoch, sequence, len(buffer) - HEADER_BYTES)
    with memoryview(buffer) as view:
        CRC.pack_into(buffer, FIELDS.size, _checksum(view))


def make(kind: int, epoch: int, sequence: int, payload: bytes = b"") -> bytearray:
    """A whole frame."""
    buffer = bytearray(HEADER_BYTES) + payload
    seal(buffer, kind, epoch, sequence)
    return buffer


def parse(data: bytes | bytearray | memoryview, sender: str) -> Frame:
    """The frame in `data`. ProtocolError: it is none of this version. ChecksumError: its bytes have changed."""
    view = memoryview(data)
    if len(view) < HEADER_BYTES:
        raise ProtocolError(f"{len(view)} bytes from {sender} are no frame of this version: too short for a header")
    magic, version, kind, epoch, sequence, length = FIELDS.unpack_from(view)
    if magic != MAGIC or version != VERSION:
        raise ProtocolError(
            f"{len(view)} bytes from {sender} are no frame of this version: they begin with {magic!r}, version "
            f"{version}; expected {MAGIC!r}, version {VERSION}"
        )
    if length != len(view) - HEADER_BYTES:
        raise ProtocolError(
            f"a frame from {sender} announces {length} bytes and has {len(view) - HEADER_BYTES}: "
            "no frame of this version"
        )
    if CRC.unpack_from(view, FIELDS.size)[0] != _checksum(view):
        raise ChecksumError(f"frame {sequence} from {sender} ({length} bytes) was damaged on its way: wrong checksum")
    return Frame(kind, epoch, sequence, view[HEADER_BYTES:])


def _checksum(frame: memoryview) -> int:
    return zlib.crc32(frame[: FIELDS.size], zlib.crc32(frame[HEADER_BYTES:]))
