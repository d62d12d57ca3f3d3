"""What messages cost by themselves: a decode step of 256 sequences, in three cases.

Runs in: the benchmark.
"""

from __future__ import annotations

import array
import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy

from zmqexec.protocol import Admission, StepInput, ToWorker, pack

NUM_SEQUENCES = 256
EVERYBODY = bytes([255]) * (NUM_SEQUENCES // 8)
PROMPT_TOKENS = 128
BLOCK_TOKENS = 16
STEP_ID = 100_000
REPETITIONS = 15
BATCH_S = 2e-3


def measure() -> list[dict[str, Any]]:
    """One row per case: bytes, and µs to encode and to decode.

    `*_packed_us` count as well what the scheduler does to turn its integers into the bytes of the fields, and what the
    runner does to have arrays of them: that is not the bus's work.
    """
    encoder = msgspec.msgpack.Encoder()
    decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
    buffer = bytearray()
    rows = []
    for case, build in CASES.items():
        step = build()
        encoder.encode_into(step, buffer)
        data = bytes(buffer)
        assert decoder.decode(data) == step
        row: dict[str, Any] = {"case": case, "bytes": len(data)}
        row["encode_us"] = _us(lambda step=step: encoder.encode_into(step, buffer))
        row["decode_us"] = _us(lambda data=data: decoder.decode(data))
        row["encode_packed_us"] = _us(lambda build=build: encoder.encode_into(build(), buffer))
        row["decode_packed_us"] = _us(lambda data=data: _unpack(decoder.decode(data)))
        rows.append(row)
    return rows


def _admission(slot: int) -> Admission:
    blocks = range(slot * 8, slot * 8 + PROMPT_TOKENS // BLOCK_TOKENS)
    return Admission(slot, pack(TOKENS), PROMPT_TOKENS, 0, pack(blocks))


def _unchanged() -> StepInput:
    return StepInput(1, STEP_ID, decodes=EVERYBODY)


def _one_admission() -> StepInput:
    return StepInput(
        1,
        STEP_ID,
        decodes=EVERYBODY,
        prefills=pack((0, PROMPT_TOKENS)),
        new_blocks=pack(NEW_BLOCKS),
        admitted=[_admission(0)],
    )


def _all_admitted() -> StepInput:
    return StepInput(1, STEP_ID, prefills=pack(PREFILLS), admitted=[_admission(slot) for slot in range(NUM_SEQUENCES)])


TOKENS = array.array("i", range(1000, 1000 + PROMPT_TOKENS))  # as the driver keeps them
NEW_BLOCKS = [number for slot in range(NUM_SEQUENCES) for number in (slot, 5000 + slot)]
PREFILLS = [number for slot in range(NUM_SEQUENCES) for number in (slot, PROMPT_TOKENS)]
CASES: dict[str, Callable[[], StepInput]] = {
    "unchanged batch": _unchanged,
    "one admission and a new block in every sequence": _one_admission,
    "256 admissions": _all_admitted,
}


def _unpack(message: Any) -> None:
    numpy.frombuffer(message.prefills, "<i4")
    numpy.frombuffer(message.new_blocks, "<i4")
    for admission in message.admitted:
        numpy.frombuffer(admission.token_ids, "<i4")
        numpy.frombuffer(admission.block_table, "<i4")


def _us(call: Callable[[], object]) -> float:
    """Median over batches of the mean time of a call, in µs."""
    count, spent_s = 1, 0.0
    while spent_s < BATCH_S:
        count *= 2
        spent_s = _time(call, count)
    return round(statistics.median(_time(call, count) for _ in range(REPETITIONS)) / count * 1e6, 3)


def _time(call: Callable[[], object], count: int) -> float:
    turns = range(count)
    started = time.perf_counter()
    for _ in turns:
        call()
    return time.perf_counter() - started
