"""`Engine`: inference inside your own program.

Runs in: driver. Imports no torch: the model lives in the workers.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from zmqexec.config import EngineConfig, SamplingParams, parse_config
from zmqexec.driver.plan import make_plan
from zmqexec.driver.step import Driver
from zmqexec.errors import RequestError
from zmqexec.frontend import FrontEnd, OpenRequest, Prompt, is_token_ids, load_tokenizer
from zmqexec.outputs import RequestOutput
from zmqexec.protocol import EngineInfo, EngineStats, NewRequest

PROGRESS_AFTER_S = 1.0
"""A batch that takes less shows no progress bar."""

Messages = Sequence[Mapping[str, Any]]


class Engine:
    """Generates text with a model that worker processes hold.

        with Engine("path/to/checkpoint", tensor_parallel_size=2) as engine:
            for out in engine.generate(["12+30=", [1, 5, 9]], SamplingParams(max_tokens=16)):
                print(out.outputs[0].text)

    `model` is the folder of a checkpoint, None the built-in demo model; the other settings are the fields of
    `EngineConfig`. Everything that can be wrong with them raises `ConfigError` or `CheckpointError` before a process
    is started.

    The workers end with `close`, with the `with` block, with the last reference to the engine, and with this process,
    however it ends. Once a worker fails, every call raises that `ExecutorError`. Use an engine from one thread at a
    time; `close` may come from any.
    """

    def __init__(self, model: str | Path | None = None, **settings: Any) -> None:
        if model is not None:
            settings["model"] = model
        for name in ("model", "tokenizer"):
            if isinstance(settings.get(name), Path):
                settings[name] = str(settings[name])
        self.config = parse_config(EngineConfig, settings)
        # The model is checked before the tokenizer, since a missing folder is a missing model, and both before the
        # driver starts processes.
        plan = make_plan(self.config)
        tokenizer = load_tokenizer(Path(self.config.tokenizer or plan.model_dir).expanduser())
        self._driver = Driver(plan)
        self._finalizer = weakref.finalize(self, self._driver.close)
        self._front = FrontEnd(self._driver.info, tokenizer)
        self._counter = itertools.count()
        self._undelivered: dict[OpenRequest, None] = {}
        """Requests of `add_request` that moved while `generate` ran: the next `step` reports on them."""

    @property
    def info(self) -> EngineInfo:
        """What is being served."""
        return self._driver.info

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters of this moment."""
        return self._driver.stats

    # ── whole batches ───────────────────────────────────────────────────────────────────────────────────────────────

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt; the outputs in the order of the prompts.

        A prompt is text, a list of token ids, or a dict with one of `prompt` and `prompt_token_ids`, and `cache_salt`.
        `sampling_params` is for all of them or one for each. A prompt that is wrong raises `RequestError` before any
        of them is started.
        """
        return self._run(_as_batch(prompts), sampling_params, use_tqdm, add_special_tokens=True)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them, through the model's chat template.

        A conversation is a list of messages like `{"role": "user", "content": "..."}`.
        """
        conversations = [messages] if _is_conversation(messages) else messages
        if not isinstance(conversations, Sequence) or not all(map(_is_conversation, conversations)):
            raise RequestError(
                f"messages={messages!r:.80}: must be a list like [{{'role': 'user', 'content': '...'}}], "
                "or a list of such lists",
                "messages",
            )
        return self._run([self._chat_prompt(chat) for chat in conversations], sampling_params, use_tqdm, False)

    def _chat_prompt(self, messages: Any) -> str:
        if self._front.tokenizer is None:
            raise RequestError("this model has no tokenizer and so no chat template", "messages")
        return self._front.tokenizer.apply_chat_template([dict(message) for message in messages])

    def _run(
        self,
        prompts: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        add_special_tokens: bool,
    ) -> list[RequestOutput]:
        params = _one_for_each(sampling_params, len(prompts))
        prepared = [
            self._front.prepare(self._new_id(), prompt, own, add_special_tokens=add_special_tokens)
            for prompt, own in zip(prompts, params, strict=True)
        ]
        self._driver.check()
        ours = {request.request_id: request for request, _ in prepared}
        running = dict.fromkeys(ours)
        try:
            for request, sequences in prepared:
                self._open(request, sequences)
            with tqdm(
                total=len(ours), desc="Requests", dynamic_ncols=True, delay=PROGRESS_AFTER_S, disable=not use_tqdm
            ) as bar:
                while running:
                    for moved in self._advance():
                        if moved.request_id not in ours:
                            self._undelivered[moved] = None
                        elif moved.finished and moved.request_id in running:
                            del running[moved.request_id]
                            bar.update()
        except BaseException:
            if self._driver.error is None:
                for request_id in running:
                    self.abort_request(request_id)
            raise
        return [request.output("cumulative") for request in ours.values()]

    # ── step by step ────────────────────────────────────────────────────────────────────────────────────────────────

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
    ) -> None:
        """Queue a request; `step` will report on it under `request_id`. Wrong ones raise `RequestError` here."""
        params = sampling_params or SamplingParams()
        self._open(*self._front.prepare(request_id, prompt, params, cache_salt=cache_salt))

    def step(self) -> list[RequestOutput]:
        """Advance all requests by one step; the outputs so far of those that moved. May be empty with run-ahead."""
        moved, self._undelivered = self._undelivered, {}
        if not moved or self._driver.has_unfinished:
            moved |= dict.fromkeys(self._advance())
        return [request.output("cumulative") for request in moved]

    def has_unfinished_requests(self) -> bool:
        """True while `step` has something to do."""
        return self._driver.has_unfinished or bool(self._undelivered)

    def abort_request(self, request_id: str | Sequence[str]) -> None:
        """Stop requests; their outputs so far are dropped. Ids that are not open are ignored."""
        for one in [request_id] if isinstance(request_id, str) else request_id:
            request = self._front.requests.get(one)
            if request is not None:
                self._undelivered.pop(request, None)
                self._driver.abort(self._front.abort(one))

    def _open(self, request: OpenRequest, sequences: list[NewRequest]) -> None:
        self._front.open(request)
        for sequence in sequences:
            self._driver.add(sequence)

    def _advance(self) -> list[OpenRequest]:
        """One step of the driver; the requests that moved, each once."""
        moved: dict[str, OpenRequest] = {}
        for request, sample, must_abort in self._front.apply(self._driver.step()):
            moved[request.request_id] = request
            if must_abort:
                self._driver.abort([request.sequence_id(sample.index)])
        return list(moved.values())

    def _new_id(self) -> str:
        return next(name for name in map(str, self._counter) if name not in self._front.requests)

    # ── end ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """End the workers and release everything. Idempotent; open requests are forgotten."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_batch(prompts: Any) -> list[Any]:
    """A list of prompts, of which there may be one; what is no prompt at all is refused later, by its own words."""
    is_one = isinstance(prompts, str | bytes | dict) or not isinstance(prompts, Iterable)
    return [prompts] if is_one or (is_token_ids(prompts) and len(prompts) > 0) else list(prompts)


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, Sequence) and bool(messages) and all(isinstance(one, Mapping) for one in messages)


def _one_for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or isinstance(params, str):
        raise RequestError(
            f"sampling_params={params!r:.80}: must be SamplingParams, or a list with one for each prompt"
        )
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts: give one for all or one for each")
    return params
