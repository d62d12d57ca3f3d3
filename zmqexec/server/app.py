"""The routes: OpenAI's endpoints, the probes and helpers around them.

Runs in: server.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from zmqexec.async_engine import AsyncEngine
from zmqexec.config import SamplingParams, ServerConfig
from zmqexec.errors import RequestError, ZmqexecError
from zmqexec.outputs import RequestOutput
from zmqexec.server.connection import ClientGone, HttpError, Reply, WatchedResponse, read_body
from zmqexec.server.metrics import CONTENT_TYPE, Metrics, RequestTimer
from zmqexec.server.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateFields,
    TokenizeRequest,
    check_logprobs,
    check_stream_options,
    checked_messages,
    decode_request,
    prompts_of,
    sampling_params,
)
from zmqexec.server.openapi import openapi_document
from zmqexec.server.responses import Answer, ChatAnswer, CompletionAnswer, Job
from zmqexec.server.texts import TextThreads, detokenized, tokenized
from zmqexec.text import LONG_TEXT_CHARS, Tokenizer
from zmqexec.version import __version__

DEFAULT_COMPLETION_TOKENS = 16
MAX_REQUEST_ID_CHARS = 128
MAX_CHOICES = 1 << 16
"""Of one HTTP request: each is a sequence in the engine, and a body has room for millions of short prompts."""
SAMPLES_AT_ONCE = 16
"""Of one HTTP request, that start before other requests have a turn: each takes about a third of a millisecond."""


class Api:
    """What the routes share. `app` is the ASGI application."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig, model_name: str) -> None:
        self._engine = engine
        self._config = config
        self._model = model_name
        self._started = int(time.time())
        self.metrics = Metrics()
        self._texts = TextThreads()
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completion, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/detokenize", self.detokenize, methods=["POST"]),
                Route("/health", self.health),
                Route("/ping", self.health, methods=["GET", "POST"]),
                Route("/metrics", self.show_metrics),
                Route("/version", self.version),
                Route("/openapi.json", self.openapi),
            ],
            exception_handlers={
                HttpError: _error_response,
                ZmqexecError: _error_response,
                HTTPException: _error_response,
                ClientGone: _error_response,
                Exception: _error_response,
            },
        )
        # A redirect would answer a POST to `…/completions/` with an empty 307 that not every client follows.
        self.app.router.redirect_slashes = False

    def close(self) -> None:
        """Give up what still runs beside the event loop."""
        self._texts.close()

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        fields = decode_request(await self._body(request), ChatRequest)
        self._check_model(fields.model)
        client_id = _request_id(request)
        messages = checked_messages(fields.messages)
        if fields.top_logprobs is not None and not fields.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
        top_logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
        max_tokens = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
        generation_prompt = fields.add_generation_prompt is not False
        prompt = self._tokenizer("messages").apply_chat_template(messages, generation_prompt)
        job = self._job("chatcmpl-" + client_id, fields, [prompt])
        job.params = sampling_params(fields, max_tokens=max_tokens, logprobs=top_logprobs, prompt_logprobs=None)
        job.top_logprobs = top_logprobs
        # Templates write the special tokens themselves.
        job.add_special_tokens = fields.add_special_tokens is True
        return self._respond(ChatAnswer(job, self._engine.tokenizer), client_id)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        fields = decode_request(await self._body(request), CompletionRequest)
        self._check_model(fields.model)
        client_id = _request_id(request)
        job = self._job("cmpl-" + client_id, fields, prompts_of(fields.prompt))
        job.echo = fields.echo is True
        job.prompt_only = job.echo and fields.max_tokens == 0
        job.top_logprobs = fields.logprobs
        max_tokens = DEFAULT_COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
        job.params = sampling_params(
            fields,
            max_tokens=1 if job.prompt_only else max_tokens,
            logprobs=fields.logprobs,
            prompt_logprobs=fields.logprobs if job.echo and fields.prompt_logprobs is None else fields.prompt_logprobs,
        )
        return self._respond(CompletionAnswer(job, self._engine.tokenizer), client_id)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        self._check_model(request.path_params["name"])
        return _json(self._model_card())

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: the token ids of a prompt or a chat."""
        fields = decode_request(await self._body(request), TokenizeRequest)
        self._check_model(fields.model)
        length = self._engine.info.max_model_len
        return _json(await self._texts.run(tokenized, self._tokenizer("prompt"), fields, length))

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of token ids, special tokens included."""
        fields = decode_request(await self._body(request), DetokenizeRequest)
        self._check_model(fields.model)
        vocab_size = self._engine.info.vocab_size
        return _json(await self._texts.run(detokenized, self._tokenizer("tokens"), fields.tokens, vocab_size))

    async def health(self, request: Request) -> Response:
        """GET /health and /ping: 200 while steps can progress, 503 once the engine is dead."""
        return Response(status_code=200 if self._engine.error is None else 503)

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        page = self.metrics.render(self._engine.stats, self._engine.bus_snapshot())
        return Response(page, headers={"content-type": CONTENT_TYPE})

    async def version(self, request: Request) -> Response:
        """GET /version."""
        return _json({"version": __version__})

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return _json(openapi_document())

    # ── from a request to its answer ────────────────────────────────────────────────────────────────────────────────

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._config.max_body_bytes)

    def _job(self, request_id: str, fields: GenerateFields, prompts: list[str | list[int]]) -> Job:
        options = check_stream_options(fields)
        check_logprobs(fields, self._config.max_logprobs)
        if len(prompts) * (fields.n or 1) > MAX_CHOICES:
            raise RequestError(
                f"{len(prompts)} prompts with n={fields.n or 1}: at most {MAX_CHOICES} choices", "prompt"
            )
        return Job(
            request_id=request_id,
            created=int(time.time()),
            model=self._model,
            prompts=prompts,
            params=SamplingParams(),
            add_special_tokens=fields.add_special_tokens is not False,
            cache_salt=fields.cache_salt,
            stream=fields.stream is True,
            include_usage=options.include_usage is True,
            continuous_usage=options.continuous_usage_stats is True,
            prompt_logprobs=fields.prompt_logprobs is not None,
            return_token_ids=fields.return_token_ids is True,
        )

    def _respond(self, answer: Answer, client_id: str) -> Response:
        async def work(reply: Reply) -> None:
            await self._generate(answer, reply)

        return WatchedResponse(work, {"x-request-id": client_id})

    async def _generate(self, answer: Answer, reply: Reply) -> None:
        """Run the job and send its answer. Cancelled when the client goes, which aborts the engine's requests."""
        job = answer.job
        timer = RequestTimer(self.metrics, job.num_choices)
        reason: str | None = "abort"
        try:
            async with contextlib.aclosing(self._outputs(job)) as outputs:
                async for prompt_index, item in outputs:
                    for output in item.outputs:
                        if output.token_ids:
                            choice = answer.choice(prompt_index, output)
                            timer.tokens(choice.index, len(output.token_ids), item.queue_s)
                        if output.finish_reason is not None:
                            timer.finish(output.finish_reason)
                    if not job.stream:
                        answer.add(prompt_index, item)
                    elif events := answer.events(prompt_index, item):
                        # Only now, so that a request which the engine refuses is answered with a 400.
                        if not reply.started:
                            await reply.start_events()
                        await reply.write(events)
            if job.stream:
                await reply.write(answer.last_events(), last=True)
            else:
                await reply.whole(200, answer.whole())
        except RequestError:
            reason = None
            raise
        except Exception:
            reason = "error"
            raise
        finally:
            timer.close(reason)

    async def _outputs(self, job: Job) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(prompt index, delta output) of all prompts of a job as they come; closing it aborts them."""
        runs = [self._run(job, await self._short_prompt(job, prompt)) for prompt in job.prompts]
        if len(runs) == 1:
            async with contextlib.aclosing(runs[0]) as run:
                async for item in run:
                    yield 0, item
            return
        queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue()
        pumps: list[asyncio.Task[None]] = []
        try:
            prompts_at_once = max(1, SAMPLES_AT_ONCE // job.params.n)
            for n, run in enumerate(runs):
                pumps.append(asyncio.create_task(_pump(n, run, queue)))
                if len(pumps) % prompts_at_once == 0:
                    await asyncio.sleep(0)
            num_open = len(pumps)
            while num_open:
                match await queue.get():
                    case None:
                        num_open -= 1
                    case Exception() as error:
                        raise error
                    case result:
                        yield result
        finally:
            for pump in pumps:
                pump.cancel()
            if pumps:
                await asyncio.wait(pumps)

    def _run(self, job: Job, prompt: str | list[int]) -> AsyncGenerator[RequestOutput, None]:
        run = self._engine.generate(
            prompt,
            job.params,
            cache_salt=job.cache_salt,
            add_special_tokens=job.add_special_tokens,
            output="delta",
        )
        assert isinstance(run, AsyncGenerator)  # it can be closed, which its declared type does not say
        return run

    async def _short_prompt(self, job: Job, prompt: str | list[int]) -> str | list[int]:
        """`prompt`, as token ids if it is a long text; one that is hopelessly long is refused unread."""
        tokenizer, longest = self._engine.tokenizer, self._engine.info.max_model_len
        if isinstance(prompt, list) and len(prompt) >= longest:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; with max_model_len={longest} it may have {longest - 1}", "prompt"
            )
        if tokenizer is None or not isinstance(prompt, str) or len(prompt) <= LONG_TEXT_CHARS:
            return prompt
        fewest = await self._texts.run(tokenizer.fewest_tokens, prompt)
        if fewest >= longest:
            raise RequestError(
                f"the prompt has at least {fewest} tokens; with max_model_len={longest} it may have {longest - 1}",
                "prompt",
            )
        return await self._texts.run(tokenizer.encode, prompt, job.add_special_tokens)

    def _tokenizer(self, param: str) -> Tokenizer:
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise RequestError("this model has no tokenizer: it takes and gives token ids only", param)
        return tokenizer

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model:
            raise HttpError(404, f"the model {name[:200]!r} does not exist; this server has {self._model!r}", "model")

    def _model_card(self) -> dict[str, object]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._started,
            "owned_by": "zmqexec",
            "root": str(Path(self._engine.info.model_dir)),
            "parent": None,
            "max_model_len": self._engine.info.max_model_len,
        }


async def _pump(
    prompt_index: int,
    run: AsyncGenerator[RequestOutput, None],
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None],
) -> None:
    try:
        async with contextlib.aclosing(run):
            async for item in run:
                queue.put_nowait((prompt_index, item))
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)


def _request_id(request: Request) -> str:
    """The client's x-request-id where it is harmless in a header and a log line, else a new one."""
    given = request.headers.get("x-request-id", "")
    if 0 < len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable():
        return given
    return uuid.uuid4().hex


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


async def _error_response(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone):
        return Response(status_code=400)  # nobody reads it
    if isinstance(error, HTTPException):
        what = {404: f"no such path: {request.url.path[:200]}", 405: f"{request.method} is not allowed here"}
        response = HttpError(error.status_code, what.get(error.status_code, error.detail)).response()
        response.headers.update(error.headers or {})
        return response
    return HttpError.of(error).response()
