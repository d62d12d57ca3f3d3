"""The front end that `Engine` and `AsyncEngine` share: prompts to sequences, tokens to text.

Runs in: driver | server.

A request with n samples becomes n sequences for the driver. Their updates come back token by token; here they become
text, are searched for stop strings, and are put together as a `RequestOutput`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import msgspec
import numpy as np

from zmqexec.config import SamplingParams
from zmqexec.errors import RequestError
from zmqexec.outputs import CompletionOutput, Logprob, RequestOutput
from zmqexec.protocol import EngineInfo, Logprobs, NewRequest, RequestUpdate, pack
from zmqexec.text import IncrementalDecoder, StopMatcher, Tokenizer

OutputKind = Literal["cumulative", "delta"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


class PromptDict(TypedDict, total=False):
    """A prompt with more to say than its text: one of `prompt` and `prompt_token_ids`, and a `cache_salt`."""

    prompt: str
    prompt_token_ids: list[int]
    cache_salt: str


Prompt = str | Sequence[int] | PromptDict


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Tokenizer | None:
    """The tokenizer in `folder`; None where there is none at all, and prompts have to be token ids."""
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        print(f"zmqexec: {folder} has no tokenizer: prompts must be token ids, outputs have no text", file=sys.stderr)
        return None
    return Tokenizer.load(folder, chat_template)


class Sample:
    """One sequence of a request: its tokens, their text, and when it ended.

    `_reported` and `_reported_text` are what earlier delta outputs have covered. The text is `_text` and then
    `_pieces`: it is put together when somebody asks for it.
    """

    def __init__(self, index: int, request: OpenRequest) -> None:
        params = request.params
        self.index = index
        self.request = request
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._stop_reason: int | str | None = None
        self._text = ""
        self._pieces: list[str] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self._matcher: StopMatcher | None = None
        if params.stop_strings:
            self._matcher = StopMatcher(params.stop_strings, params.include_stop_str_in_output)
        self._decoder: IncrementalDecoder | None = None
        if request.tokenizer is not None:
            self._decoder = IncrementalDecoder(request.tokenizer, params.skip_special_tokens, request.prompt_token_ids)
        self._reported = 0
        self._reported_text = 0

    def apply(self, update: RequestUpdate) -> bool:
        """Take new tokens; True if a stop string ended the sample and the driver has to be told."""
        for entry in update.logprobs:
            for position in logprob_dicts(entry, self.request.tokenizer):
                self._add_logprob(position)
        last = len(update.token_ids) - 1
        for number, token in enumerate(update.token_ids):
            self.token_ids.append(token)
            if self._decoder is None or (number == last and self._is_ended_by_token(update)):
                continue
            text = self._decoder.push(token)
            if self._matcher is None:
                self._pieces.append(text)
            elif self._match(self._matcher, text):
                return update.finish_reason is None
        if update.finish_reason is not None:
            self.finish_reason = update.finish_reason
            self._stop_reason = update.stop_reason
            rest = self._decoder.flush() if self._decoder is not None else ""
            if self._matcher is None:
                self._pieces.append(rest)
            elif not self._match(self._matcher, rest):
                self._pieces.append(self._matcher.flush())
        return False

    def _is_ended_by_token(self, update: RequestUpdate) -> bool:
        """Whether the last token is an end that is not to be shown."""
        return update.finish_reason == "stop" and not self.request.params.include_stop_str_in_output

    def _match(self, matcher: StopMatcher, text: str) -> bool:
        """Release `text` as far as no stop string may begin in it; True if one ended here."""
        allow_stop = len(self.token_ids) > self.request.params.min_tokens
        released, stop = matcher.feed(text, allow_stop)
        self._pieces.append(released)
        if stop is not None:
            self.finish_reason, self._stop_reason = "stop", stop
        return stop is not None

    def _add_logprob(self, position: dict[int, Logprob]) -> None:
        if self._logprobs is not None and self._cumulative_logprob is not None:
            self._logprobs.append(position)
            self._cumulative_logprob += next(iter(position.values())).logprob

    def output(self, kind: OutputKind) -> CompletionOutput:
        """All of the sample, or what is new since the last delta."""
        if self._pieces:
            self._text += "".join(self._pieces)
            self._pieces.clear()
        first = first_char = 0
        if kind == "delta":
            first, first_char = self._reported, self._reported_text
            self._reported, self._reported_text = len(self.token_ids), len(self._text)
        return CompletionOutput(
            index=self.index,
            text=self._text[first_char:],
            token_ids=self.token_ids[first:],
            logprobs=None if self._logprobs is None else self._logprobs[first:],
            cumulative_logprob=self._cumulative_logprob,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )


class OpenRequest:
    """A request between arrival and its last sample's end. `number` is given once, `request_id` may come again."""

    def __init__(
        self,
        number: int,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.number = number
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.tokenizer = tokenizer
        self.samples = [Sample(index, self) for index in range(params.n)]
        self.num_cached_tokens = 0
        self.queue_s = 0.0
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def finished(self) -> bool:
        """True once every sample has ended."""
        return None not in [sample.finish_reason for sample in self.samples]

    def sequence_id(self, index: int) -> str:
        """The driver's name for sample `index`. Never used twice: when a `request_id` comes again, updates of its
        predecessor, which ended here by a stop string or an abort, may still be on their way."""
        return f"{self.number}.{index}"

    def apply(self, update: RequestUpdate, sample: Sample) -> bool:
        """Take the update of one sample; True if its sequence has to be aborted in the driver."""
        if sample.index == 0:
            self.num_cached_tokens = update.num_cached_tokens or self.num_cached_tokens
            self.queue_s = update.queue_s or self.queue_s
            for entry in update.prompt_logprobs:
                assert self.prompt_logprobs is not None
                self.prompt_logprobs += logprob_dicts(entry, self.tokenizer)
        return sample.apply(update)

    def output(self, kind: OutputKind, moved: Sample | None = None) -> RequestOutput:
        """The request with all its samples, or only with the one that moved."""
        samples = self.samples if moved is None else [moved]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[sample.output(kind) for sample in samples],
            finished=self.finished,
            num_cached_tokens=self.num_cached_tokens,
            queue_s=self.queue_s,
        )


class FrontEnd:
    """The open requests of one engine.

    Every sequence that the driver has not finished or been told to abort is in `_sequences`.
    """

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer | None) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.requests: dict[str, OpenRequest] = {}
        self._numbers = itertools.count()
        self._sequences: dict[str, Sample] = {}

    def prepare(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
    ) -> tuple[OpenRequest, list[NewRequest]]:
        """Check a request without opening it. `RequestError` names what is wrong with it."""
        if not isinstance(request_id, str):
            raise RequestError(f"request_id={request_id!r}: must be text", "request_id")
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params={params!r:.80}: must be SamplingParams")
        if request_id in self.requests:
            raise RequestError(f"request_id={request_id!r} is in use by an open request", "request_id")
        text, token_ids, salt = self._tokens(prompt, add_special_tokens)
        cache_salt = _checked_salt(cache_salt if cache_salt is not None else salt)
        self._check(token_ids, params)
        request = OpenRequest(next(self._numbers), request_id, text, token_ids, params, self.tokenizer)
        packed = pack(token_ids)
        single = msgspec.structs.replace(params, n=1, stop=None) if params.n > 1 or params.stop else params
        sequences = []
        for index in range(params.n):
            # The prompt's log-probabilities are the same for all samples.
            own = single if index == 0 else msgspec.structs.replace(single, prompt_logprobs=None)
            sequences.append(NewRequest(request.sequence_id(index), packed, own, index, cache_salt))
        return request, sequences

    def open(self, request: OpenRequest) -> None:
        """Expect updates for a prepared request from now on."""
        self.requests[request.request_id] = request
        for sample in request.samples:
            self._sequences[request.sequence_id(sample.index)] = sample

    def apply(self, updates: Sequence[RequestUpdate]) -> Iterator[tuple[OpenRequest, Sample, bool]]:
        """(request, sample that moved, whether its sequence must now be aborted in the driver), update by update."""
        for update in updates:
            sample = self._sequences.get(update.request_id)
            if sample is None:
                continue  # aborted here while the update was on its way
            request = sample.request
            must_abort = request.apply(update, sample)
            if sample.finish_reason is not None:
                del self._sequences[update.request_id]
                if request.finished:
                    del self.requests[request.request_id]
            yield request, sample, must_abort

    def abort(self, request_id: str) -> list[str]:
        """Forget a request; the sequences that the driver has to abort. Unknown ids give none."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return []
        aborted = []
        for sample in request.samples:
            if sample.finish_reason is None:
                sample.finish_reason = "abort"
                aborted.append(request.sequence_id(sample.index))
                del self._sequences[aborted[-1]]
        return aborted

    def _tokens(self, prompt: Any, add_special_tokens: bool) -> tuple[str | None, list[int], Any]:
        """(text or None, token ids, cache salt as given) of a prompt in any of its forms."""
        salt = None
        if isinstance(prompt, dict):
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
            if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
                raise RequestError(
                    f"prompt with keys {sorted(prompt)}: give one of 'prompt' and 'prompt_token_ids', "
                    "and 'cache_salt' if wanted",
                    "prompt",
                )
            salt = prompt.get("cache_salt")
            prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("this model has no tokenizer: give the prompt as token ids", "prompt")
            return prompt, self.tokenizer.encode(prompt, add_special_tokens), salt
        if is_token_ids(prompt):
            return None, list(prompt), salt
        raise RequestError(f"prompt={prompt!r:.80}: must be text or a list of token ids", "prompt")

    def _check(self, token_ids: list[int], params: SamplingParams) -> None:
        vocab_size, longest = self.info.vocab_size, self.info.max_model_len - 1
        if not token_ids:
            raise RequestError("the prompt is empty: it needs at least one token", "prompt")
        if len(token_ids) > longest:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; with max_model_len={self.info.max_model_len} and at least "
                f"one token of output it may have {longest}",
                "prompt",
            )
        for name, tokens in (
            ("prompt", token_ids),
            ("stop_token_ids", params.stop_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
        ):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise RequestError(f"{name}: token id {token} is outside the vocabulary [0, {vocab_size})", name)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and count > vocab_size:
                raise RequestError(f"{name}={count}: the vocabulary has {vocab_size} tokens; -1 asks for all", name)


def is_token_ids(prompt: Any) -> bool:
    """Whether `prompt` is one prompt as token ids; their range is checked later."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str | bytes | bytearray | memoryview)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
    )


def _checked_salt(salt: Any) -> str | None:
    """`salt`, which is hashed as UTF-8 later, when other requests of its batch have been started."""
    if salt is None:
        return None
    if not isinstance(salt, str):
        raise RequestError(f"cache_salt={salt!r:.80}: must be text", "cache_salt")
    try:
        salt.encode()
    except UnicodeEncodeError:
        raise RequestError(
            "cache_salt holds half of a surrogate pair, which is no Unicode character", "cache_salt"
        ) from None
    return salt


def logprob_dicts(entry: Logprobs, tokenizer: Tokenizer | None) -> Iterator[dict[int, Logprob]]:
    """One dict per position, the chosen token first."""
    token_ids = np.frombuffer(entry.token_ids, "<i4").reshape(-1, entry.width)
    values = np.frombuffer(entry.values, "<f4").reshape(-1, entry.width)
    chosen_ranks = np.frombuffer(entry.ranks, "<i4")
    # Column 0 is the chosen token; rank the others among themselves, in the order of their values.
    order = np.argsort(-values[:, 1:], axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(1, entry.width)[None, :], axis=1)
    for ids, row, rank, others in zip(
        token_ids.tolist(), values.tolist(), chosen_ranks.tolist(), ranks.tolist(), strict=True
    ):
        position = {ids[0]: Logprob(row[0], rank, _token_text(tokenizer, ids[0]))}
        for token, value, its_rank in zip(ids[1:], row[1:], others, strict=True):
            position.setdefault(token, Logprob(value, its_rank, _token_text(tokenizer, token)))
        yield position


def _token_text(tokenizer: Tokenizer | None, token: int) -> str | None:
    return None if tokenizer is None else tokenizer.token_text(token)
