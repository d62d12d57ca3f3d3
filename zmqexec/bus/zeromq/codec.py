"""Messages as payloads of frames.

Runs in: driver | worker.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from zmqexec.errors import ConfigError, ProtocolError

T = TypeVar("T")


def check_size(num_bytes: int, max_message_bytes: int) -> None:
    """ConfigError: such a message would be refused where it arrives."""
    if num_bytes > max_message_bytes:
        raise ConfigError(
            f"a message of {num_bytes} bytes exceeds max_message_bytes={max_message_bytes}: raise that setting, which "
            "both ends take from the driver",
            "max_message_bytes",
        )


def decode(decoder: msgspec.msgpack.Decoder[T], payload: memoryview, sender: str) -> T:
    """The message in `payload`. ProtocolError: none of this version."""
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{len(payload)} bytes from {sender} are no message of this version: {error}") from error
