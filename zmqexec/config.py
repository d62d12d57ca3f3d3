"""Settings: parsed once, checked, frozen, passed as arguments.

Runs in: driver | worker | server.

`EngineConfig` and `ServerConfig` are the whole command line too: every field is a flag of `zmqexec-serve`, its bounds
are the field's annotation and its help is the field's line in the class docstring.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from zmqexec.errors import ConfigError, RequestError

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: dividing by it would overflow float32 logits."""

MAX_SEED = 2**64 - 1

WaitPolicy = Literal["latency", "balanced", "eco"]
WAIT_POLICIES: tuple[WaitPolicy, ...] = get_args(WaitPolicy)
"""In the order of csrc/bus/ring.h."""
STEP_TOKENS = 2048
DEMO_NAME = "zmqexec-demo"
"""Of the built-in model, whose folder's name says nothing."""


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine runs and with how much.

    model                   folder of a Hugging Face checkpoint (config.json, *.safetensors); default: the demo model
    tokenizer               folder with the tokenizer, when it is not the model's own
    tensor_parallel_size    number of worker processes that share each layer
    device                  where workers compute; auto: NVIDIA GPUs where there are any and torch can use them
    dtype                   of weights and KV cache; auto: float32 on the CPU, on a GPU the checkpoint's 16-bit type
    load_format             dummy: random weights at the geometry of config.json, for benchmarks
    max_model_len           longest prompt plus output, in tokens; default: what the checkpoint declares
    max_num_seqs            sequences that run at the same time
    max_num_batched_tokens  tokens one step may compute: bounds the time of a step; default: 2048, on GPUs 8192 and one
                            for each of max_num_seqs
    block_size              tokens per block of the KV cache
    kv_cache_memory_bytes   memory for the KV cache of one worker; default: by the memory that is free
    gpu_memory_utilization  share of a GPU's memory that may be in use, other programs' included
    enable_prefix_caching   keep the KV of finished prompts for later prompts that begin alike
    enable_chunked_prefill  split long prompts over steps, so that running sequences are not held up
    cuda_graphs             replay decode steps on a GPU from graphs captured at start-up; off for debugging
    deterministic           a request gives the same bits whatever else runs and however its steps are cut; slower
    check_ranks             compare the tokens that every rank samples, after each step, and fail where they differ
    executor                multiproc: a process per rank; inline: in this process, one rank, for debugging
    run_ahead               steps published before the result of an earlier one is known; 0 for debugging
    seed                    seed of requests that bring none; default: from the operating system
    step_timeout_s          seconds without a reply after which a worker counts as stalled
    start_timeout_s         seconds that starting and loading may take
    num_threads             CPU threads of each worker; default: the usable cores, shared out
    transport               how steps travel: ring (shared memory), zmq, or auto: zmq where the system grants no memory
    ring_bytes              size of the shared-memory ring that carries steps to the workers
    wait_policy             how much waiting processes may spin to be woken sooner; eco: not at all
    bus_checksums           every record on the bus carries a CRC-32C, which its readers check
    stall_warning_s         seconds without a reply after which a warning says what a step waits for; 0: never
    name                    what `zmqexec-top` shows the engine as; default: the model's folder name
    """

    model: str | None = None
    tokenizer: str | None = None
    tensor_parallel_size: Annotated[int, Meta(ge=1, le=64)] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    max_model_len: Annotated[int, Meta(ge=2)] | None = None
    max_num_seqs: Annotated[int, Meta(ge=1, le=4096)] = 256
    max_num_batched_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    block_size: Annotated[int, Meta(ge=1, le=1024)] = 16
    kv_cache_memory_bytes: Annotated[int, Meta(ge=1)] | None = None
    gpu_memory_utilization: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.9
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    cuda_graphs: bool = True
    deterministic: bool = False
    check_ranks: bool = False
    executor: Literal["auto", "inline", "multiproc"] = "auto"
    run_ahead: Annotated[int, Meta(ge=0, le=4)] = 1
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    step_timeout_s: Annotated[float, Meta(gt=0.0, le=86400.0)] = 120.0
    start_timeout_s: Annotated[float, Meta(gt=0.0, le=86400.0)] = 600.0
    num_threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    transport: Literal["auto", "ring", "zmq"] = "auto"
    ring_bytes: Annotated[int, Meta(ge=1 << 16, le=1 << 31)] = 64 << 20
    wait_policy: WaitPolicy = "balanced"
    bus_checksums: bool = False
    stall_warning_s: Annotated[float, Meta(ge=0.0, le=86400.0)] | None = 10.0
    name: Annotated[str, Meta(min_length=1, max_length=63)] | None = None

    def __post_init__(self) -> None:
        if self.executor == "inline" and self.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size} with executor='inline': "
                "it runs one rank in this process; use executor='multiproc'",
                "executor",
            )
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "a step computes at least one token of every running sequence; raise the first or lower the second",
                "max_num_batched_tokens",
            )
        if self.name is not None and not self.name.isprintable():
            raise ConfigError(f"name={self.name!r}: must consist of printable characters", "name")

    @property
    def step_tokens(self) -> int:
        """`max_num_batched_tokens`, or what stands for it; on a GPU the plan has set it."""
        return self.max_num_batched_tokens or max(STEP_TOKENS, self.max_num_seqs)

    @property
    def engine_name(self) -> str:
        """`name`, or what stands for it."""
        if self.name is not None:
            return self.name
        return DEMO_NAME if self.model is None else Path(self.model).expanduser().absolute().name


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How `zmqexec-serve` listens and answers.

    host                    address to listen on; 0.0.0.0 for all
    port                    TCP port; 0 lets the system choose
    served_model_name       name that clients use; default: the model's folder name
    chat_template           file with a jinja chat template that replaces the checkpoint's own
    shutdown_timeout_s      seconds that open requests may take to finish after SIGTERM
    max_body_bytes          largest request body that is read
    max_logprobs            most log-probabilities that a request may ask for per position; -1: the whole vocabulary
    log_level               how much the server prints
    """

    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    served_model_name: str | None = None
    chat_template: str | None = None
    shutdown_timeout_s: Annotated[float, Meta(ge=0.0, le=86400.0)] = 30.0
    max_body_bytes: Annotated[int, Meta(ge=1024, le=1 << 30)] = 16 << 20
    max_logprobs: Annotated[int, Meta(ge=-1, le=1 << 20)] = 20
    log_level: Literal["debug", "info", "warning", "error"] = "info"


ConfigStruct = TypeVar("ConfigStruct", EngineConfig, ServerConfig)


def parse_config(cls: type[ConfigStruct], values: dict[str, Any]) -> ConfigStruct:
    """`cls(**values)` with every name, type and bound checked; `ConfigError` names the field and the remedy."""
    for name in values:
        if name not in cls.__struct_fields__:
            close = difflib.get_close_matches(name, cls.__struct_fields__, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(cls.__struct_fields__)}"
            raise ConfigError(f"unknown field {name!r}; {remedy}", name)
    try:
        return msgspec.convert(values, cls)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        text, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`")
        choices = [str(choice) for choice in _literal_choices(cls, field)]
        if choices:
            text = f"must be one of {', '.join(choices)}"
        raise ConfigError(f"{field}={values.get(field)!r}: {text}", field) from None


def _literal_choices(cls: type[Struct], field: str) -> tuple[object, ...]:
    hint = get_type_hints(cls).get(field)
    return get_args(hint) if get_origin(hint) is Literal else ()


def field_help(cls: type[Struct]) -> dict[str, str]:
    """Field name → its line in the class docstring."""
    lines = inspect.getdoc(cls) or ""
    return dict(re.findall(r"^(\w+)\s{2,}(\S.*)$", lines, flags=re.MULTILINE))


class SamplingParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tokens of one request are chosen and when it ends. Names and meanings are vLLM's.

    n                           samples drawn from one prompt, >= 1
    temperature                 >= 0; 0 is greedy
    top_p                       (0, 1]: smallest set of tokens whose probability reaches it
    top_k                       the k most likely tokens; 0 or -1: all
    min_p                       [0, 1]: drop tokens less likely than min_p times the likeliest
    seed                        integer; the same seed gives the same samples in any batch
    max_tokens                  >= 1 tokens of output; None: up to the model's length
    min_tokens                  >= 0 tokens before an end token or stop string may end it
    stop                        string or strings that end the output
    stop_token_ids              token ids that end the output, besides the model's own end tokens
    include_stop_str_in_output  keep the stop string or stop token in the text
    ignore_eos                  do not end at the model's end tokens
    presence_penalty            [-2, 2]: subtracted once from the logit of every token already in the output
    frequency_penalty           [-2, 2]: subtracted for each time the token is already in the output
    repetition_penalty          > 0: divides (multiplies if negative) the logit of tokens in prompt or output
    logit_bias                  {token id: value in [-100, 100]} added to the logits
    logprobs                    >= 0: that many likeliest tokens per position, besides the chosen one; -1: all
    prompt_logprobs             the same for the positions of the prompt
    skip_special_tokens         leave special tokens out of the text

    Log-probabilities are those of the model itself, before penalties, bias, temperature and filters.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._integer("n", 1, 1024)
        self._real("temperature", 0.0, math.inf)
        self._real("top_p", 0.0, 1.0, open_low=True)
        self._integer("top_k", -1, 2**31 - 1)
        self._real("min_p", 0.0, 1.0)
        self._integer("seed", -(2**63), MAX_SEED, optional=True)
        self._integer("max_tokens", 1, 2**31 - 1, optional=True)
        self._integer("min_tokens", 0, 2**31 - 1)
        self._real("presence_penalty", -2.0, 2.0)
        self._real("frequency_penalty", -2.0, 2.0)
        self._real("repetition_penalty", 0.0, math.inf, open_low=True)
        self._integer("logprobs", -1, 2**31 - 1, optional=True)
        self._integer("prompt_logprobs", -1, 2**31 - 1, optional=True)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={getattr(self, name)!r}: must be True or False", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens}: must be at most max_tokens={self.max_tokens}", "min_tokens"
            )
        self._check_stops()
        self._check_bias()

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is taken and no random number is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty for None."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _check_stops(self) -> None:
        strings = [self.stop] if isinstance(self.stop, str) else self.stop
        if strings is not None and not (
            isinstance(strings, list | tuple) and all(isinstance(string, str) and string for string in strings)
        ):
            raise RequestError(f"stop={self.stop!r}: must be a non-empty string or a list of them", "stop")
        tokens = self.stop_token_ids
        if tokens is not None and not (
            isinstance(tokens, list | tuple | set | frozenset) and all(_is_integer(t) and t >= 0 for t in tokens)
        ):
            raise RequestError(f"stop_token_ids={tokens!r}: must be a list of token ids >= 0", "stop_token_ids")
        if tokens is not None:
            self._set("stop_token_ids", [int(token) for token in tokens])

    def _check_bias(self) -> None:
        what = "must map token ids to values in [-100, 100]"
        if self.logit_bias is not None and not isinstance(self.logit_bias, dict):
            raise RequestError(f"logit_bias={self.logit_bias!r}: {what}", "logit_bias")
        for token, bias in (self.logit_bias or {}).items():
            if not _is_integer(token) or token < 0 or not _is_real(bias) or not -100 <= bias <= 100:
                raise RequestError(f"logit_bias={{{token!r}: {bias!r}}}: {what}", "logit_bias")
        if self.logit_bias is not None:
            self._set("logit_bias", {int(token): float(bias) for token, bias in self.logit_bias.items()})

    def _set(self, name: str, value: object) -> None:
        """Give a checked field its declared type: numbers of numpy are welcome, but cannot travel in messages."""
        msgspec.structs.force_setattr(self, name, value)

    def _integer(self, name: str, low: int, high: int, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not _is_integer(value) or not low <= value <= high:
            none = " or None" if optional else ""
            raise RequestError(f"{name}={value!r}: must be an integer in [{low}, {high}]{none}", name)
        self._set(name, int(value))

    def _real(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        inside = _is_real(value) and (low < value if open_low else low <= value) and value <= high
        if not inside or math.isinf(value):
            end = f"{high}]" if math.isfinite(high) else "inf)"
            raise RequestError(f"{name}={value!r}: must be a number in {'(' if open_low else '['}{low}, {end}", name)
        self._set(name, float(value))


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
