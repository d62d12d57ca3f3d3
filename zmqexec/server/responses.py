"""Engine outputs → the bytes that clients read: whole JSON answers and server-sent events.

Runs in: server. This runs for every token of every stream, so events are put together from prepared bytes; only values
that vary are encoded, each by msgspec.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import msgspec
from msgspec import Struct

from zmqexec.config import SamplingParams
from zmqexec.outputs import CompletionOutput, Logprob, RequestOutput
from zmqexec.server.logprobs import TokenLog, finite, prompt_logprobs
from zmqexec.text import Tokenizer

DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode


class Job(Struct, kw_only=True):
    """One checked completion request.

    prompts             one engine request each; choices are numbered over prompts × params.n
    top_logprobs        likeliest tokens to show per position; None: no log-probabilities
    echo                completions: the text begins with the prompt
    prompt_only         completions: max_tokens=0, the answer is the echo alone
    prompt_logprobs     whether the client asked for them by that name
    """

    request_id: str
    created: int
    model: str
    prompts: list[str | list[int]]
    params: SamplingParams
    add_special_tokens: bool = True
    cache_salt: str | None = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    top_logprobs: int | None = None
    echo: bool = False
    prompt_only: bool = False
    prompt_logprobs: bool = False
    return_token_ids: bool = False

    @property
    def num_choices(self) -> int:
        """Samples of all prompts."""
        return len(self.prompts) * self.params.n


class Choice:
    """One sample as far as it has come. `pieces`, `token_ids` and `logprobs` are kept for whole answers only.

    prompt_token_ids  what the next event says about them
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.begun = False
        self.num_tokens = 0
        self.pieces: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.log: TokenLog | None = None
        self.prompt_token_ids: list[int] | None = None


class Answer(ABC):
    """The answer to one job, grown by the engine's delta outputs. Subclasses know the shape of a chat or completion."""

    event_object = ""
    whole_object = ""

    def __init__(self, job: Job, tokenizer: Tokenizer | None) -> None:
        self.job = job
        self.tokenizer = tokenizer
        self.choices = [Choice(index) for index in range(job.num_choices)]
        self.prompts: list[RequestOutput | None] = [None] * len(job.prompts)
        self._head = b"data: " + encode(self._object(self.event_object))[:-1] + b',"choices":'
        self._usage = b',"usage":null' if job.include_usage else b""

    def choice(self, prompt_index: int, output: CompletionOutput) -> Choice:
        """The choice that `output` belongs to."""
        return self.choices[prompt_index * self.job.params.n + output.index]

    def add(self, prompt_index: int, item: RequestOutput) -> None:
        """Keep what a delta output brings, for `whole`."""
        self.prompts[prompt_index] = item
        for output in item.outputs:
            choice = self._count(prompt_index, output)
            if not self.job.prompt_only:
                choice.pieces.append(output.text)
                choice.token_ids += output.token_ids
                choice.logprobs += output.logprobs or ()

    def events(self, prompt_index: int, item: RequestOutput) -> bytes:
        """The events that a delta output makes: one choice each, the first of a choice before its tokens."""
        self.prompts[prompt_index] = item
        events = b""
        for output in item.outputs:
            choice = self._count(prompt_index, output)
            if not (output.token_ids or output.text or output.finish_reason):
                continue  # part of a prompt's log-probabilities, and no token yet
            if not choice.begun:
                choice.begun = True
                events += self._first_event(choice, item)
            if not self.job.prompt_only or output.finish_reason:
                events += self._event(choice, item, output)
        return events

    def last_events(self) -> bytes:
        """The end of a stream."""
        if not self.job.include_usage:
            return DONE
        return self._head + b'[],"usage":' + encode(self.usage()) + b"}\n\n" + DONE

    def whole(self) -> bytes:
        """The answer as one JSON object, once every choice has ended."""
        answer = self._object(self.whole_object)
        answer["choices"] = [self._whole_choice(choice, self._prompt_of(choice)) for choice in self.choices]
        answer["usage"] = self.usage()
        self._add_prompt(answer)
        return encode(answer)

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        items = [item for item in self.prompts if item is not None]
        prompt_tokens = sum(len(item.prompt_token_ids) for item in items)
        completion_tokens = 0 if self.job.prompt_only else sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(item.num_cached_tokens for item in items)},
        }

    def _object(self, kind: str) -> dict[str, Any]:
        return {"id": self.job.request_id, "object": kind, "created": self.job.created, "model": self.job.model}

    def _count(self, prompt_index: int, output: CompletionOutput) -> Choice:
        choice = self.choice(prompt_index, output)
        choice.num_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            # The one token that the engine had to generate is not shown, so the length is what ended it.
            choice.finish_reason = "length" if self.job.prompt_only else output.finish_reason
            choice.stop_reason = None if self.job.prompt_only else output.stop_reason
        return choice

    def _prompt_of(self, choice: Choice) -> RequestOutput:
        item = self.prompts[choice.index // self.job.params.n]
        assert item is not None
        return item

    def _end_of_event(self, choice: Choice, token_ids: list[int]) -> bytes:
        """From `finish_reason` to the end of the event."""
        end = b',"finish_reason":null'
        if choice.finish_reason is not None:
            end = b',"finish_reason":' + encode(choice.finish_reason) + b',"stop_reason":' + encode(choice.stop_reason)
        if self.job.return_token_ids:
            end += b',"token_ids":' + encode(token_ids)
        if choice.prompt_token_ids is not None:
            end += b',"prompt_token_ids":' + encode(choice.prompt_token_ids)
            choice.prompt_token_ids = None
        usage = b',"usage":' + encode(self.usage()) if self.job.continuous_usage else self._usage
        return end + b"}]" + usage + b"}\n\n"

    @abstractmethod
    def _first_event(self, choice: Choice, item: RequestOutput) -> bytes: ...

    @abstractmethod
    def _event(self, choice: Choice, item: RequestOutput, output: CompletionOutput) -> bytes: ...

    @abstractmethod
    def _whole_choice(self, choice: Choice, item: RequestOutput) -> dict[str, Any]: ...

    @abstractmethod
    def _add_prompt(self, answer: dict[str, Any]) -> None:
        """Add what a whole answer says about the prompt outside its choices."""


class ChatAnswer(Answer):
    """The shape of /v1/chat/completions."""

    event_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def _first_event(self, choice: Choice, item: RequestOutput) -> bytes:
        # Clients take the time to the first token from this event; it alone carries the role.
        head = self._head + b'[{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null' % choice.index
        end = b',"finish_reason":null}]' + self._usage
        if self.job.return_token_ids:
            end += b',"prompt_token_ids":' + encode(item.prompt_token_ids)
        return head + end + b"}\n\n"

    def _event(self, choice: Choice, item: RequestOutput, output: CompletionOutput) -> bytes:
        logprobs = b"null"
        if self.job.top_logprobs is not None:
            logprobs = encode({"content": self._content_logprobs(output.token_ids, output.logprobs or [])})
        return (
            self._head
            + b'[{"index":%d,"delta":{"content":' % choice.index
            + encode(output.text)
            + b'},"logprobs":'
            + logprobs
            + self._end_of_event(choice, output.token_ids)
        )

    def _whole_choice(self, choice: Choice, item: RequestOutput) -> dict[str, Any]:
        shape = {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.pieces)},
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.job.top_logprobs is not None:
            shape["logprobs"] = {"content": self._content_logprobs(choice.token_ids, choice.logprobs)}
        if self.job.return_token_ids:
            shape["token_ids"] = choice.token_ids
        return shape

    def _add_prompt(self, answer: dict[str, Any]) -> None:
        item = self._prompt_of(self.choices[0])
        if self.job.prompt_logprobs:
            answer["prompt_logprobs"] = prompt_logprobs(item)
        if self.job.return_token_ids:
            answer["prompt_token_ids"] = item.prompt_token_ids

    def _content_logprobs(self, token_ids: list[int], logprobs: list[dict[int, Logprob]]) -> list[dict[str, Any]]:
        wanted = self.job.top_logprobs
        content = []
        for token, entries in zip(token_ids, logprobs, strict=False):
            likeliest = sorted(entries.items(), key=lambda entry: -entry[1].logprob)
            shown = likeliest if wanted == -1 else likeliest[:wanted]
            content.append(
                self._token_logprob(token, entries[token])
                | {"top_logprobs": [self._token_logprob(other, entry) for other, entry in shown]}
            )
        return content

    def _token_logprob(self, token: int, entry: Logprob) -> dict[str, Any]:
        data = b"" if self.tokenizer is None else self.tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(entry.logprob), "bytes": list(data)}


class CompletionAnswer(Answer):
    """The shape of /v1/completions."""

    event_object = "text_completion"
    whole_object = "text_completion"

    def _first_event(self, choice: Choice, item: RequestOutput) -> bytes:
        if self.job.top_logprobs is not None:
            choice.log = self._new_log(item)
        if not self.job.echo:
            choice.prompt_token_ids = item.prompt_token_ids if self.job.return_token_ids else None
            return b""
        if choice.log is not None:
            choice.log.add_prompt(item)
        extra = b',"prompt_token_ids":' + encode(item.prompt_token_ids) if self.job.return_token_ids else b""
        return (
            self._head
            + b'[{"index":%d,"text":' % choice.index
            + encode(self._prompt_text(choice, item))
            + b',"logprobs":'
            + (b"null" if choice.log is None else encode(choice.log.take()))
            + b',"finish_reason":null'
            + extra
            + b"}]"
            + self._usage
            + b"}\n\n"
        )

    def _event(self, choice: Choice, item: RequestOutput, output: CompletionOutput) -> bytes:
        text, token_ids = output.text, output.token_ids
        if self.job.prompt_only:
            text, token_ids = "", []
        logprobs = b"null"
        if choice.log is not None:
            choice.log.add(token_ids, output.logprobs or [])
            logprobs = encode(choice.log.take())
        return (
            self._head
            + b'[{"index":%d,"text":' % choice.index
            + encode(text)
            + b',"logprobs":'
            + logprobs
            + self._end_of_event(choice, token_ids)
        )

    def _whole_choice(self, choice: Choice, item: RequestOutput) -> dict[str, Any]:
        text = "".join(choice.pieces)
        shape = {
            "index": choice.index,
            "text": self._prompt_text(choice, item) + text if self.job.echo else text,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.job.top_logprobs is not None:
            log = self._new_log(item)
            if self.job.echo:
                log.add_prompt(item)
            log.add(choice.token_ids, choice.logprobs)
            shape["logprobs"] = log.take()
        if self.job.prompt_logprobs:
            shape["prompt_logprobs"] = prompt_logprobs(item)
        if self.job.return_token_ids:
            shape["token_ids"] = choice.token_ids
            shape["prompt_token_ids"] = item.prompt_token_ids
        return shape

    def _add_prompt(self, answer: dict[str, Any]) -> None:
        """Nothing: each choice tells of its own prompt."""

    def _new_log(self, item: RequestOutput) -> TokenLog:
        before = () if self.job.echo else item.prompt_token_ids
        return TokenLog(self.tokenizer, self.job.params.skip_special_tokens, before)

    def _prompt_text(self, choice: Choice, item: RequestOutput) -> str:
        prompt = self.job.prompts[choice.index // self.job.params.n]
        if isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(item.prompt_token_ids, self.job.params.skip_special_tokens)
