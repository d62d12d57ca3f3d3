"""Log-probabilities in the shapes of the completions endpoint and of `prompt_logprobs`.

Runs in: server.
"""

from __future__ import annotations

from typing import Any

from zmqexec.outputs import Logprob, RequestOutput
from zmqexec.text import IncrementalDecoder, Tokenizer

MINUS_INFINITY = -9999.0
"""What clients expect for a probability of zero: JSON has no infinity."""


class TokenLog:
    """The parallel lists of a completion's `logprobs`. `text_offset` counts characters from the start of its text."""

    def __init__(self, tokenizer: Tokenizer | None, skip_special_tokens: bool, before: list[int] | tuple[()]) -> None:
        self._tokenizer = tokenizer
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, skip_special_tokens, before)
        self._offset = 0
        self._clear()

    def add_prompt(self, item: RequestOutput) -> None:
        """The prompt's tokens; nothing precedes the first, so it has no log-probability."""
        known = item.prompt_logprobs or []
        for n, token in enumerate(item.prompt_token_ids):
            self._append(token, known[n] if n < len(known) else None)

    def add(self, token_ids: list[int], logprobs: list[dict[int, Logprob]]) -> None:
        """Generated tokens."""
        for token, entries in zip(token_ids, logprobs, strict=False):
            self._append(token, entries)

    def take(self) -> dict[str, Any]:
        """What was added since the last call."""
        taken = {
            "tokens": self._tokens,
            "token_logprobs": self._token_logprobs,
            "top_logprobs": self._top_logprobs,
            "text_offset": self._text_offset,
        }
        self._clear()
        return taken

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._token_logprobs: list[float | None] = []
        self._top_logprobs: list[dict[str, float] | None] = []
        self._text_offset: list[int] = []

    def _append(self, token: int, entries: dict[int, Logprob] | None) -> None:
        self._tokens.append(self._text(token))
        self._text_offset.append(self._offset)
        if self._decoder is not None:
            self._offset += len(self._decoder.push(token))
        if entries is None:
            self._token_logprobs.append(None)
            self._top_logprobs.append(None)
            return
        self._token_logprobs.append(finite(entries[token].logprob))
        top: dict[str, float] = {}
        for other, entry in entries.items():
            # Different tokens may read alike (parts of characters); the chosen one comes first and stays.
            top.setdefault(self._text(other), finite(entry.logprob))
        self._top_logprobs.append(top)

    def _text(self, token: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.token_text(token)


def finite(logprob: float) -> float:
    """`logprob` as JSON can write it."""
    return logprob if logprob > MINUS_INFINITY else MINUS_INFINITY


def prompt_logprobs(item: RequestOutput) -> list[dict[str, Any] | None]:
    """Per prompt token: token id → log-probability, rank and text; null for the first."""
    return [
        None
        if entries is None
        else {
            str(token): {
                "logprob": finite(entry.logprob),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token, entry in entries.items()
        }
        for entries in item.prompt_logprobs or ()
    ]
