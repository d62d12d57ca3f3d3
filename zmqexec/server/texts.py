"""Work on long texts, beside the event loop: done in it, one of them would hold up all streams.

Runs in: server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from zmqexec.errors import RequestError
from zmqexec.server.openai import TokenizeRequest, checked_messages
from zmqexec.text import Tokenizer

NUM_THREADS = 2
MAX_TOKENIZE_CHARS = 1 << 22
MAX_DETOKENIZE_TOKENS = 1 << 20
"""Both take a core for seconds, and nothing can interrupt them."""

Result = TypeVar("Result")


class TextThreads:
    """A few threads. What runs in them cannot be interrupted: the process ends without waiting for it."""

    def __init__(self) -> None:
        # Not the default executor of the event loop, for whose threads the loop waits when it ends.
        self._threads = ThreadPoolExecutor(NUM_THREADS, "text")

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """The result of `work(*arguments)`, or its exception."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def close(self) -> None:
        """Start nothing more. Waits for nothing."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def tokenized(tokenizer: Tokenizer, fields: TokenizeRequest, max_model_len: int) -> dict[str, Any]:
    """The answer of /tokenize."""
    if (fields.prompt is None) == (fields.messages is None):
        raise RequestError("give either prompt or messages", "prompt")
    text = fields.prompt
    if text is None:
        messages = checked_messages(fields.messages)
        text = tokenizer.apply_chat_template(messages, fields.add_generation_prompt is not False)
    if len(text) > MAX_TOKENIZE_CHARS:
        raise RequestError(f"the text has {len(text)} characters; at most {MAX_TOKENIZE_CHARS} here", "prompt")
    special = fields.messages is None if fields.add_special_tokens is None else fields.add_special_tokens
    tokens = tokenizer.encode(text, special)
    answer = {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens}
    if fields.return_token_strs:
        answer["token_strs"] = [tokenizer.token_text(token) for token in tokens]
    return answer


def detokenized(tokenizer: Tokenizer, tokens: list[int] | None, vocab_size: int) -> dict[str, Any]:
    """The answer of /detokenize, special tokens included."""
    if tokens is None:
        raise RequestError("tokens is required", "tokens")
    if len(tokens) > MAX_DETOKENIZE_TOKENS:
        raise RequestError(f"tokens has {len(tokens)} ids; at most {MAX_DETOKENIZE_TOKENS} here", "tokens")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise RequestError(f"tokens: id {token} is outside the vocabulary [0, {vocab_size})", "tokens")
    return {"prompt": tokenizer.decode(tokens, skip_special_tokens=False)}
