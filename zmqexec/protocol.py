"""Every message that crosses a process boundary.

Runs in: driver | worker | server.

Two boundaries: driver ↔ workers over the bus (`ToWorker`, `ToDriver`), and server ↔ driver process over ZeroMQ
(`ToEngine`, `FromEngine`). All of them are closed unions of tagged msgspec Structs encoded as arrays. Arrays of
numbers travel packed as little-endian int32 or float32; `pack` and `unpack` convert integers.

A running sequence has a **slot**, a small integer. Its data crosses once, in its `Admission`; afterwards a step names
the slot and carries only what changed. A decode step of an unchanged batch is a bitmap of slots.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from zmqexec.config import EngineConfig, SamplingParams

LITTLE_ENDIAN = sys.byteorder == "little"


def pack(values: Iterable[int]) -> bytes:
    """Integers as little-endian int32 bytes."""
    packed = array.array("i", values)
    if not LITTLE_ENDIAN:
        packed.byteswap()
    return packed.tobytes()


def unpack(data: bytes) -> list[int]:
    """The integers that `pack` packed."""
    values = array.array("i")
    values.frombytes(data)
    if not LITTLE_ENDIAN:
        values.byteswap()
    return values.tolist()


class Message(Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Base of all messages: encoded as arrays, closed, immutable."""


class ErrorInfo(Message, frozen=True):
    """An error on its way to another process; `errors.from_info` raises it there."""

    kind: str
    message: str
    param: str | None = None


# ── driver → workers ────────────────────────────────────────────────────────────────────────────────────────────────


class LoadModel(Message, tag=1, frozen=True):
    """Load this rank's shard. Answered by `ModelLoaded`, preceded by `LoadProgress`."""

    epoch: int
    config: EngineConfig
    model_dir: str
    dtype: str
    max_model_len: int
    num_threads: int
    device: Literal["cpu", "cuda"] = "cpu"


class InitCache(Message, tag=2, frozen=True):
    """Allocate the KV cache, on a GPU capture graphs. Answered by `CacheReady`, there preceded by `CaptureProgress`."""

    epoch: int
    num_blocks: int


class Sampling(Message, frozen=True):
    """What a worker must know to choose the tokens of one sequence. Plain greedy sequences carry none.

    A sample's random number is a function of (seed, sample_index, position) alone. `end_token_ids` are banned until
    `min_tokens` tokens have been generated.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    min_tokens: int = 0
    end_token_ids: bytes = b""
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class Admission(Message, frozen=True):
    """A sequence that enters the batch, with everything a worker needs to (re)build it.

    slot          where its state lives from now on; whatever was there is forgotten
    token_ids     int32: prompt and, after a preemption, the output so far
    num_prompt    the first `num_prompt` of them are the prompt
    num_computed  tokens whose KV the first blocks already hold (prefix cache)
    block_table   int32: blocks for all of token_ids
    """

    slot: int
    token_ids: bytes
    num_prompt: int
    num_computed: int
    block_table: bytes
    sampling: Sampling | None = None


class StepInput(Message, tag=3, frozen=True):
    """One step. Rows are `prefills` in order, then the slots of `decodes` in ascending order.

    A prefill row computes the next `count` known tokens of its slot and samples a token if they were the last ones. A
    decode row computes the token sampled last for its slot, which need never have left the worker, and samples one.

    admitted    sequences that enter with this step
    new_blocks  int32 [n, 2]: (slot, block) to append to the slot's block table
    prefills    int32 [n, 2]: (slot, count)
    decodes     bitmap of slots, least significant bit first
    """

    epoch: int
    step_id: int
    decodes: bytes = b""
    prefills: bytes = b""
    new_blocks: bytes = b""
    admitted: list[Admission] = []


ToWorker = LoadModel | InitCache | StepInput


# ── worker → driver ─────────────────────────────────────────────────────────────────────────────────────────────────


class Hello(Message, tag=1, frozen=True):
    """The first message of a worker: who it is and which files it runs."""

    epoch: int
    rank: int
    pid: int
    package_dir: str
    version: str
    build_id: str


class LoadProgress(Message, tag=2, frozen=True):
    """Bytes of weights loaded so far, of all that this rank loads."""

    epoch: int
    done: int
    total: int


class ModelLoaded(Message, tag=3, frozen=True):
    """The shard is ready; `kv_cache_bytes` may be spent on the KV cache."""

    epoch: int
    kv_cache_bytes: int


class CaptureProgress(Message, tag=7, frozen=True):
    """CUDA graphs captured so far, of all that this rank captures."""

    epoch: int
    done: int
    total: int


class CacheReady(Message, tag=4, frozen=True):
    """The KV cache is allocated and graphs are captured; steps may come."""

    epoch: int


class Logprobs(Message, frozen=True):
    """Log-probabilities of consecutive positions of one row.

    row        of sampled tokens: index into `StepOutput.token_ids`; of a prompt: index into `StepInput.prefills`
    width      entries per position
    token_ids  int32 [positions, width]; column 0 is the chosen token, the rest the likeliest ones in descending order
               (for the whole vocabulary: all ids in ascending order)
    values     float32 [positions, width]
    ranks      int32 [positions]: rank of column 0 in the vocabulary; 1 is the likeliest
    """

    row: int
    width: int
    token_ids: bytes
    values: bytes
    ranks: bytes


class StepOutput(Message, tag=5, frozen=True):
    """What a step sampled: int32 token ids of the rows that sampled one, in row order."""

    epoch: int
    step_id: int
    token_ids: bytes
    logprobs: list[Logprobs] = []
    prompt_logprobs: list[Logprobs] = []


class Failure(Message, tag=6, frozen=True):
    """An exception on a rank, which exits after sending this. `step_id` is -1 outside a step."""

    epoch: int
    step_id: int
    phase: str
    error: ErrorInfo


ToDriver = Hello | LoadProgress | ModelLoaded | CaptureProgress | CacheReady | StepOutput | Failure


# ── server → driver process ─────────────────────────────────────────────────────────────────────────────────────────


class StartEngine(Message, tag=1, frozen=True):
    """Build the engine. Answered by `EngineReady` or `EngineFailed`, preceded by `EngineProgress`."""

    config: EngineConfig


class NewRequest(Message, tag=2, frozen=True):
    """One sequence to generate: sample `sample_index` of a request.

    `request_id` is the front end's name for the sequence, which it uses only once.
    Tokens of requests with different `cache_salt` never share cached blocks.
    """

    request_id: str
    prompt_token_ids: bytes
    params: SamplingParams
    sample_index: int = 0
    cache_salt: str | None = None


class AbortRequests(Message, tag=3, frozen=True):
    """Forget these requests; unknown ids are ignored."""

    request_ids: list[str]


class StopEngine(Message, tag=4, frozen=True):
    """Close the engine and exit."""


ToEngine = StartEngine | NewRequest | AbortRequests | StopEngine


# ── driver process → server ─────────────────────────────────────────────────────────────────────────────────────────


class EngineInfo(Message, frozen=True):
    """What a front end must know to validate requests and to describe the model."""

    model_dir: str
    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    device: str
    dtype: str
    eos_token_ids: list[int]


class EngineProgress(Message, tag=1, frozen=True):
    """A line about what start-up is doing, and how far it is (`total` 0: unknown)."""

    text: str
    done: int
    total: int


class EngineReady(Message, tag=2, frozen=True):
    """The engine serves from now on."""

    info: EngineInfo


class EngineFailed(Message, tag=3, frozen=True):
    """The engine is closed; every open request ends with this error."""

    error: ErrorInfo


class RequestUpdate(Message, frozen=True, gc=False):
    """New tokens of one sequence, in order; the last update has a `finish_reason`.

    finish_reason  stop | length | abort, or None while it runs
    stop_reason    the stop token id that ended it, None for an end token of the model

    There are hundreds of these in a step, and none can be part of a cycle: no garbage collector needs to see them.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    queue_s: float = 0.0
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[Logprobs, ...] = ()


class EngineStats(Message, frozen=True):
    """Gauges and counters of the driver at one moment.

    The one list of them: the status page of the bus holds the fields in this order, as unsigned integers (at most 16).

    stale_replies        replies of this epoch that matched no outstanding step and were dropped
    wrong_epoch_replies  replies of another epoch, dropped too
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    stale_replies: int = 0
    wrong_epoch_replies: int = 0


class EngineUpdates(Message, tag=4, frozen=True):
    """The outcome of one step for the front end."""

    updates: list[RequestUpdate]
    stats: EngineStats


FromEngine = EngineProgress | EngineReady | EngineFailed | EngineUpdates
