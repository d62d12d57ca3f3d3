"""An engine without processes: the real front end, and a driver that answers a prompt with its tokens in reverse.

The reply to "abc" is "cba", then the end token; with ignore_eos it begins again. Every step gives one token to every
open sequence. `pause` holds the steps, `die` ends the engine.
"""

import asyncio
import json

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from zmqexec.async_engine import Stream
from zmqexec.config import SamplingParams
from zmqexec.frontend import FrontEnd
from zmqexec.protocol import EngineInfo, EngineStats, Logprobs, RequestUpdate, pack, unpack
from zmqexec.text import Tokenizer

SPECIALS = ("<|eos|>", "<|user|>", "<|assistant|>", "<|system|>")
EOS = 256
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder):
    """One token per byte, and a few special ones."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(models.BPE({char: n for n, char in enumerate(sorted(alphabet))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIALS])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|eos|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


class FakeEngine:
    """The parts of `AsyncEngine` that the server uses. Lives in one event loop."""

    def __init__(self, folder, *, max_model_len=4096, step_s=0.0):
        write_tokenizer(folder)
        self.tokenizer = Tokenizer.load(folder)
        self.info = EngineInfo(
            model_dir=str(folder), max_model_len=max_model_len, vocab_size=260, num_blocks=100, block_size=16,
            device="cpu", dtype="float32", eos_token_ids=[EOS],
        )  # fmt: skip
        self.error = None
        self.bus = None
        self.stats = EngineStats(num_blocks=100)
        self.step_s = step_s
        self.aborted = []
        self._front = FrontEnd(self.info, self.tokenizer)
        self._streams = {}
        self._sequences = {}
        self._running = asyncio.Event()
        self._running.set()
        self._work = asyncio.Event()
        self._dead = asyncio.Event()
        self._count = 0
        self._stepper = asyncio.ensure_future(self._run())

    def pause(self, paused=True):
        self._running.clear() if paused else self._running.set()

    def die(self, error):
        self.error = error
        self._dead.set()
        for stream in self._streams.values():
            stream.items.put_nowait(error)

    def bus_snapshot(self):
        return self.bus

    async def wait_dead(self):
        await self._dead.wait()
        return self.error

    async def close(self):
        self._stepper.cancel()

    async def generate(
        self, prompt, params=None, *, request_id=None, cache_salt=None, add_special_tokens=True, output="cumulative"
    ):
        if self.error is not None:
            raise self.error
        self._count += 1
        request_id = request_id or f"r{self._count}"
        request, sequences = self._front.prepare(
            request_id, prompt, params or SamplingParams(), cache_salt=cache_salt, add_special_tokens=add_special_tokens
        )
        stream = self._streams[request_id] = Stream(request, output)
        self._front.open(request)
        for sequence in sequences:
            self._sequences[sequence.request_id] = Sequence(sequence)
        self._count_running()
        self._work.set()
        try:
            while True:
                item = await stream.items.get()
                if isinstance(item, Exception):
                    raise item
                result = request.output("cumulative") if item is None else item
                yield result
                if result.finished:
                    return
        finally:
            self._streams.pop(request_id, None)
            for name in self._front.abort(request_id):
                self.aborted.append(name)
                self._sequences.pop(name, None)
            self._count_running()

    async def _run(self):
        while True:
            await self._work.wait()
            await self._running.wait()
            await asyncio.sleep(self.step_s)
            updates = []
            for name, sequence in list(self._sequences.items()):
                update = sequence.step()
                if update.finish_reason is not None:
                    del self._sequences[name]
                updates.append(update)
            for request, sample, must_abort in self._front.apply(updates):
                if must_abort:
                    self._sequences.pop(request.sequence_id(sample.index), None)
                if request.request_id in self._streams:
                    self._streams[request.request_id].take(sample)
            self._count_running()
            if not self._sequences:
                self._work.clear()

    def _count_running(self):
        count = len(self._sequences)
        self.stats = EngineStats(num_running=count, num_blocks_used=count, num_blocks=100, steps=self.stats.steps + 1)


class Sequence:
    """One sample in the fake driver."""

    def __init__(self, message):
        self.message = message
        self.prompt = unpack(message.prompt_token_ids)
        self.reply = [token for token in reversed(self.prompt) if token < EOS] or [ord("?")]
        self.count = 0

    def step(self):
        params, first = self.message.params, self.count == 0
        at_end = self.count >= len(self.reply) and not params.ignore_eos
        token = EOS if at_end else self.reply[self.count % len(self.reply)]
        self.count += 1
        reason = stop_reason = None
        if at_end:
            reason = "stop"
        elif token in (params.stop_token_ids or ()):
            reason, stop_reason = "stop", token
        elif self.count == params.max_tokens:
            reason = "length"
        return RequestUpdate(
            request_id=self.message.request_id,
            token_ids=[token],
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached_tokens=2 if self.message.cache_salt is None else 0,
            queue_s=0.001,
            logprobs=[fake_logprobs([token], params.logprobs)] if params.logprobs is not None else [],
            prompt_logprobs=[fake_logprobs(self.prompt[1:], params.prompt_logprobs)]
            if first and params.prompt_logprobs is not None
            else [],
        )


def fake_logprobs(tokens, count):
    """The chosen token has -0.5; the likeliest ones are tokens 0, 1, 2 … with -1, -2, …, the third -inf."""
    width = count + 1
    ids = np.array([[token, *range(count)] for token in tokens], "<i4").reshape(-1, width)
    values = np.tile(np.array([-0.5, *(-np.arange(1, width))], "<f4"), (len(tokens), 1))
    if count >= 3:
        values[:, 3] = -np.inf
    return Logprobs(0, width, ids.tobytes(), values.tobytes(), pack([1] * len(tokens)))
