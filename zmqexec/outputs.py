"""What a request gives back. Names and meanings are vLLM's.

Runs in: driver | server.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """A token's log-probability under the model.

    rank           1 for the likeliest token of the vocabulary
    decoded_token  the token alone as text; None without a tokenizer
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One sample.

    logprobs            per token, if asked for: token id → Logprob, the chosen token first
    cumulative_logprob  sum over the chosen tokens, if `logprobs` was asked for
    finish_reason       stop | length | abort; None while it runs
    stop_reason         the stop string or stop token id that ended it; None for the model's own end token
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request and what has come of it so far.

    prompt_logprobs    per prompt token, if asked for; None for the first, which nothing precedes
    num_cached_tokens  prompt tokens whose KV came from the prefix cache
    queue_s            seconds between arrival and the first step
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    queue_s: float = 0.0
