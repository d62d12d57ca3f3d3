"""What clients send: request bodies, read leniently where clients differ and strictly where a mistake would hide.

Runs in: server. Every optional field accepts null; 3.0 is accepted for 3; a field we do not know is accepted and logged
once; a field that we know but cannot honour is refused, so that nobody takes an unconstrained answer for a constrained.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from zmqexec.config import SamplingParams
from zmqexec.errors import RequestError

logger = logging.getLogger("zmqexec.server")

SAMPLING_FIELDS = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "stop", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "prompt_logprobs", "skip_special_tokens",
)  # fmt: skip

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "suffix": (),
    "best_of": (1,),
    "use_beam_search": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "logits_processors": (),
    "allowed_token_ids": (),
    "bad_words": (),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "continue_final_message": (),
}
"""Fields that change the answer and that this version does not honour → values that ask for nothing.

null, false, 0, "" and empty lists and objects ask for nothing in any of them.
"""

MAX_STOPS = 256
"""Each token of each sample is searched for every one of them."""
MAX_LOGGED_FIELDS = 1000
MAX_LOGGED_CHARS = 64


class StreamOptions(Struct):
    """What a stream holds besides its tokens."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerateFields(Struct, kw_only=True):
    """What both kinds of completion understand. Bounds are those of `SamplingParams`."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None


class ChatRequest(GenerateFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None


class CompletionRequest(GenerateFields, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]] | None = None
    logprobs: int | None = None
    echo: bool | None = None


class TokenizeRequest(Struct, kw_only=True):
    """POST /tokenize: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int] | None = None


REQUESTS = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
Request = TypeVar("Request", ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)

_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_decoders: dict[type[Struct], msgspec.json.Decoder[Any]] = {cls: msgspec.json.Decoder(cls) for cls in REQUESTS}
_logged_fields: set[str] = set()


def decode_request(body: bytes, cls: type[Request]) -> Request:
    """The body as `cls`; `RequestError` names the field at fault."""
    try:
        names = _fields_decoder.decode(body)
        try:
            request: Request = _decoders[cls].decode(body)
        except msgspec.ValidationError as error:
            # JavaScript may write 3.0 for 3. Rare, so only what failed is read a second time.
            try:
                values = msgspec.json.decode(body)
            except msgspec.ValidationError:  # a number like 1e400, for which only the first error names the field
                raise error from None
            request = msgspec.convert(_with_integral_floats(values), cls)
        for name, raw in names.items():
            if name not in cls.__struct_fields__:
                _check_other_field(name, raw)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        param = field.split(".")[0].split("[")[0] or None
        raise RequestError(f"{field}: {text}" if field else f"the body: {text}", param) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    return request


def _with_integral_floats(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [_with_integral_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_integral_floats(item) for key, item in value.items()}
    return value


def _check_other_field(name: str, raw: msgspec.Raw) -> None:
    if name in UNSUPPORTED:
        value = msgspec.json.decode(raw)
        if value and value not in UNSUPPORTED[name]:
            raise RequestError(f"{name} is not supported by this server", name)
    elif name not in _logged_fields and len(_logged_fields) < MAX_LOGGED_FIELDS:
        _logged_fields.add(name)
        logger.warning("request field %.*r is not known and ignored (logged once)", MAX_LOGGED_CHARS, name)


def sampling_params(
    request: GenerateFields, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """`SamplingParams` of the fields that are there; `RequestError` names one that is out of range."""
    values = {name: value for name in SAMPLING_FIELDS if (value := getattr(request, name)) is not None}
    if isinstance(request.stop, list) and len(request.stop) > MAX_STOPS:
        raise RequestError(f"stop has {len(request.stop)} strings; at most {MAX_STOPS}", "stop")
    if request.stop_token_ids is not None:
        # Every sample carries them, and a body has room for millions.
        values["stop_token_ids"] = list(dict.fromkeys(request.stop_token_ids))
    if request.logit_bias is not None:
        values["logit_bias"] = _logit_bias(request.logit_bias)
    if prompt_logprobs is not None:
        values["prompt_logprobs"] = prompt_logprobs
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **values)


def check_logprobs(request: GenerateFields, limit: int) -> None:
    """`RequestError` where more log-probabilities per position are asked for than `limit` (-1: no limit).

    All of a large vocabulary, for every token of a long prompt, would be gigabytes.
    """
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        count = getattr(request, name, None)
        if count is None or isinstance(count, bool) or limit == -1:
            continue
        if count > limit or count == -1:
            raise RequestError(f"{name}={count}: at most {limit} here (see --max-logprobs)", name)


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise RequestError("logit_bias: keys must be token ids", "logit_bias") from None


def check_stream_options(request: GenerateFields) -> StreamOptions:
    """The stream options, defaults filled in; they need `stream`."""
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is allowed only with stream=true", "stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs is not available with stream=true", "prompt_logprobs")
    return request.stream_options or StreamOptions()


def prompts_of(prompt: str | list[Any] | None) -> list[str | list[int]]:
    """The one or several prompts of a completion request."""
    if prompt is None:
        raise RequestError("prompt is required", "prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is an empty list", "prompt")
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [prompt]
    if kinds == {str} or kinds == {list}:
        return prompt
    raise RequestError("prompt must be text, token ids, or a list of either, all of one kind", "prompt")


def checked_messages(messages: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Chat messages as a template expects them; `RequestError` for roles, contents or parts it could not read."""
    if messages is None:
        raise RequestError("messages is required", "messages")
    return [_checked_message(message, f"messages[{n}]") for n, message in enumerate(messages)]


def _checked_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{where}.role must be a string", "messages")
    content = message.get("content")
    if content is None:
        return {**message, "content": ""}
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise RequestError(f"{where}.content must be a string or a list of parts", "messages")
    for n, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f'{where}.content[{n}] must be {{"type": "text", "text": "..."}}; other kinds are not supported',
                "messages",
            )
    return message
