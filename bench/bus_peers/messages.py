"""What crosses: a step of a given size down, 64 bytes up. The same structs for every transport.

Runs in: driver | worker.
"""

from __future__ import annotations

import msgspec

from zmqexec.protocol import StepInput, StepOutput, ToDriver, ToWorker

EPOCH = 1
FIRST_STEP_ID = 1 << 16  # from here to 2³² a step id takes five bytes, so that all messages of a cell are equally long
REPLY_BYTES = 64
TOKENS = bytes(52)

encode = msgspec.msgpack.Encoder().encode
encode_into = msgspec.msgpack.Encoder().encode_into
decode_step: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
decode_reply: msgspec.msgpack.Decoder[ToDriver] = msgspec.msgpack.Decoder(ToDriver)


def make_steps(num_bytes: int, num_repliers: int, count: int = 64) -> list[StepInput]:
    """Steps of `num_bytes` each when encoded, to which the ranks below `num_repliers` reply. They share one payload."""
    repliers = bytes([(1 << num_repliers) - 1])
    blocks = b""
    for _ in range(3):  # the length's own length depends on it
        excess = len(encode(StepInput(EPOCH, FIRST_STEP_ID, decodes=repliers, new_blocks=blocks))) - num_bytes
        blocks = bytes(max(0, len(blocks) - excess))
    steps = [
        StepInput(EPOCH, FIRST_STEP_ID + number, decodes=repliers, new_blocks=bytes(blocks)) for number in range(count)
    ]
    assert len(encode(steps[0])) == num_bytes
    return steps


def wants_reply(step: StepInput, rank: int) -> bool:
    """Whether `rank` is among those that `make_steps` named."""
    return bool(step.decodes[0] >> rank & 1)


def make_reply(step: StepInput) -> StepOutput:
    """The answer to `step`, 64 bytes when encoded."""
    return StepOutput(EPOCH, step.step_id, TOKENS)


def answer(data: bytes, rank: int) -> bytes | None:
    """The encoded reply to an encoded step, None if `rank` sends none."""
    step = decode_step.decode(data)
    return encode(make_reply(step)) if wants_reply(step, rank) else None


assert len(encode(make_reply(make_steps(256, 1, 1)[0]))) == REPLY_BYTES
