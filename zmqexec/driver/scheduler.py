"""Chooses what each step computes: continuous batching with chunked prefill, paged blocks and run-ahead.

Runs in: driver. Imports no torch and waits for nothing, so that random traces can be checked against a model of it.

The rules, in the order in which a step's budget of tokens is given out:

1. Every running sequence that has its last token computed or in flight decodes one token.
2. Running sequences that are not through their prompt compute the next chunk of it.
3. Waiting sequences enter, strictly in order of arrival: the first that does not fit holds up those behind it.

When decoding needs more blocks than are free, the sequence that arrived last is preempted: its blocks are released and
it waits for recomputation, ahead of everything that arrived after it. So the oldest sequence always advances, and since
every sequence fits alone (`EngineConfig` is checked for that), each one ends after a bounded number of steps.

Run-ahead: a step may be scheduled before the results of earlier ones are known, since it needs token positions, not
token values. Stops by length are known when scheduling; other stops are seen when a step is collected, and the token
that was in flight then is discarded. A sequence's slot and blocks are released when no outstanding step names it, and
nothing is preempted while steps are outstanding: the driver drains them first.
"""

from __future__ import annotations

import bisect
import random
from dataclasses import dataclass
from typing import NamedTuple

from zmqexec.config import EngineConfig
from zmqexec.driver.block_pool import BlockPool
from zmqexec.driver.request import Request
from zmqexec.errors import InternalError
from zmqexec.protocol import (
    Admission,
    EngineStats,
    Logprobs,
    NewRequest,
    RequestUpdate,
    StepInput,
    StepOutput,
    pack,
    unpack,
)


class Chunk(NamedTuple):
    """A prefill row: positions [start, start + length) of a request."""

    request: Request
    start: int
    length: int


@dataclass(frozen=True)
class ScheduledStep:
    """A step on its way: the message for the workers, and whose rows it holds.

    prefills  in the order of `message.prefills`
    decodes   in the order of their slots
    sampled   the requests whose rows sample a token, in the order of `StepOutput.token_ids`
    """

    message: StepInput
    prefills: list[Chunk]
    decodes: list[Request]
    sampled: list[Request]

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return len(self.decodes) + sum(chunk.length for chunk in self.prefills)


class Roster(NamedTuple):
    """Sequences that decode in one step, in both orders, and the bitmap of their slots."""

    by_arrival: list[Request]
    by_slot: list[Request]
    bitmap: bytes

    @classmethod
    def of(cls, decodes: list[Request]) -> Roster:
        """`decodes` is in order of arrival."""
        slots = sum(1 << request.slot for request in decodes)
        by_slot = sorted(decodes, key=lambda request: request.slot)
        return cls(decodes, by_slot, slots.to_bytes((slots.bit_length() + 7) // 8, "little"))


NOBODY = Roster([], [], b"")


class Scheduler:
    """All requests of an engine, and the blocks and slots they run in.

    A request is in exactly one place: `_waiting` (sorted by arrival), `_running` (sorted by arrival, owns a slot), or
    `_leaving` (finished, but named by an outstanding step). Slots: `_free_slots`, or owned by one running or leaving
    request.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: list[int],
        epoch: int = 0,
        longest_shared_prompt: int | None = None,
    ) -> None:
        self._config = config
        self._block_size = config.block_size
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._epoch = epoch
        self._longest_shared_prompt = longest_shared_prompt
        self._pool = BlockPool(num_blocks)
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._leaving: list[Request] = []
        self._roster = NOBODY
        """Of the last step: mostly the same ones decode in the next. Whoever gets a slot is missing in a step first."""
        self._aborted: list[RequestUpdate] = []
        self._num_outstanding = 0
        self._next_step_id = 0
        self._next_arrival = 0
        self._seeds = random.Random(config.seed)
        self._prompt_tokens = self._cached_prompt_tokens = self._generation_tokens = self._preemptions = 0

    @property
    def has_unfinished(self) -> bool:
        """True while a request runs or waits, a step is outstanding, or an abort is yet to be reported."""
        return bool(self._waiting or self._running or self._num_outstanding or self._aborted)

    @property
    def has_requests(self) -> bool:
        """True while a request runs or waits."""
        return bool(self._waiting or self._running)

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters of this moment."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks_used=self._pool.num_owned,
            num_blocks=self._pool.num_blocks,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            generation_tokens=self._generation_tokens,
            preemptions=self._preemptions,
            steps=self._next_step_id,
        )

    def add(self, new: NewRequest) -> None:
        """Queue a request. The front end has checked it against the model."""
        if new.request_id in self._requests:
            raise InternalError(f"request {new.request_id!r} is open already")
        seed = new.params.seed if new.params.seed is not None else self._seeds.getrandbits(64)
        request = Request(
            new,
            self._next_arrival,
            seed % 2**64,
            self._eos_token_ids,
            self._max_model_len,
            self._longest_shared_prompt,
        )
        self._next_arrival += 1
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        """End a request early; `update` or `take_aborted` bring its last update. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.slot < 0:
            self._waiting.remove(request)
            request.finish_reason = "abort"
            del self._requests[request_id]
        else:
            self._finish(request, "abort")
        self._aborted.append(RequestUpdate(request_id, [], "abort", num_cached_tokens=request.num_cached_tokens))

    def take_aborted(self) -> list[RequestUpdate]:
        """The updates of requests aborted since the last call."""
        aborted, self._aborted = self._aborted, []
        return aborted

    # ── choosing a step ─────────────────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None if nothing can run before an outstanding step is collected."""
        chosen = self._choose_decodes()
        if chosen is None:
            return None
        decodes, growing = chosen
        new_blocks = self._grow(growing)
        budget = self._config.step_tokens - len(decodes)
        prefills: list[Chunk] = []
        admitted: list[Admission] = []
        if len(decodes) < len(self._running):
            for request in [request for request in self._running if request.is_prefilling]:
                if budget <= 0:
                    break
                prefills.append(self._prefill(request, budget))
                budget -= prefills[-1].length
        while self._waiting and budget > 0:
            admission = self._try_admit(self._waiting[0], budget)
            if admission is None:
                break
            admitted.append(admission)
            request = self._waiting.pop(0)
            bisect.insort(self._running, request, key=lambda running: running.arrival)
            prefills.append(self._prefill(request, budget))
            budget -= prefills[-1].length
        if not decodes and not prefills:
            return None
        return self._step(decodes, prefills, admitted, new_blocks)

    def _choose_decodes(self) -> tuple[list[Request], list[Request]] | None:
        """The sequences that decode, and those of them that need a block, of which enough are free; None: drain first.

        A sequence decodes when its prefill is scheduled, and one uncomputed token has room for another behind it.
        """
        block_size = self._block_size
        while True:
            decodes = [one for one in self._running if one.prefill_end <= one.num_computed < one.max_len - 1]
            growing = [one for one in decodes if one.num_computed == len(one.block_table) * block_size]
            if len(growing) <= self._pool.num_free:
                return decodes, growing
            if self._num_outstanding:
                return None
            self._preempt(self._running[-1])

    def _preempt(self, request: Request) -> None:
        if len(self._running) == 1:
            raise InternalError(f"request {request.request_id!r} does not fit into the KV cache alone")
        self._preemptions += 1
        self._running.remove(request)
        self._release(request)
        request.evict()
        bisect.insort(self._waiting, request, key=lambda waiting: waiting.arrival)

    def _grow(self, growing: list[Request]) -> list[int]:
        """Give a block to each of these sequences; flat (slot, block) pairs."""
        new_blocks = []
        for request, block in zip(growing, self._pool.allocate(len(growing)), strict=True):
            request.block_table.append(block)
            new_blocks += [request.slot, block]
        return new_blocks

    def _try_admit(self, request: Request, budget: int) -> Admission | None:
        """Give `request` a slot and blocks for all its known tokens; None if it has to wait."""
        if not self._free_slots:
            return None
        cached = self._cached_blocks(request)
        num_cached = len(cached) * self._block_size
        if not self._config.enable_chunked_prefill and len(request.token_ids) - num_cached > budget:
            return None
        missing = -(-len(request.token_ids) // self._block_size) - len(cached)
        # Every running sequence may need a block soon: without this reserve, admissions would cause preemptions.
        reserve = len(self._running)
        if missing + reserve > self._pool.num_free_after_sharing(cached):
            return None
        self._pool.share(cached)
        admission = request.admit(self._free_slots.pop(), cached + self._pool.allocate(missing), num_cached)
        if request.num_output == 0:
            self._prompt_tokens += request.num_prompt
            self._cached_prompt_tokens += num_cached
        return admission

    def _cached_blocks(self, request: Request) -> list[int]:
        """Cached blocks that `request` can begin with. Its last token is always computed: its logits are needed."""
        if not self._config.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return []
        usable = (len(request.token_ids) - 1) // self._block_size
        return self._pool.match(request.block_hashes(self._block_size)[:usable])

    def _prefill(self, request: Request, budget: int) -> Chunk:
        """Schedule the next chunk of `request`, of at most `budget` tokens."""
        chunk = Chunk(request, request.num_computed, min(budget, request.prefill_end - request.num_computed))
        request.num_computed += chunk.length
        request.last_step_id = self._next_step_id
        # Steps run in order and a step writes its KV before it reads any, so whoever is scheduled from here on,
        # in this very step too, may read these blocks.
        self._offer_full_blocks(request)
        return chunk

    def _offer_full_blocks(self, request: Request) -> None:
        """Register the blocks that are full of computed tokens with known values."""
        if not self._config.enable_prefix_caching:
            return
        full = min(request.num_computed, len(request.token_ids)) // self._block_size
        if full > request.num_hashed_blocks:
            hashes = request.block_hashes(self._block_size)
            for index in range(request.num_hashed_blocks, full):
                self._pool.register(request.block_table[index], hashes[index])
            request.num_hashed_blocks = full

    def _step(
        self, decodes: list[Request], prefills: list[Chunk], admitted: list[Admission], new_blocks: list[int]
    ) -> ScheduledStep:
        step_id = self._next_step_id
        for request in decodes:
            request.num_computed += 1
            request.last_step_id = step_id
        if decodes != self._roster.by_arrival:
            self._roster = Roster.of(decodes)
        message = StepInput(
            epoch=self._epoch,
            step_id=step_id,
            decodes=self._roster.bitmap,
            prefills=pack(number for chunk in prefills for number in (chunk.request.slot, chunk.length)),
            new_blocks=pack(new_blocks),
            admitted=admitted,
        )
        decodes = self._roster.by_slot
        sampled = [chunk.request for chunk in prefills if not chunk.request.is_prefilling] + decodes
        self._next_step_id += 1
        self._num_outstanding += 1
        return ScheduledStep(message, prefills, decodes, sampled)

    # ── recording its result ────────────────────────────────────────────────────────────────────────────────────────

    def update(self, step: ScheduledStep, output: StepOutput) -> list[RequestUpdate]:
        """Record what `step`, the oldest outstanding one, sampled; one update for each request that moved."""
        token_ids = unpack(output.token_ids)
        if output.step_id != step.message.step_id or len(token_ids) != len(step.sampled):
            raise InternalError(
                f"step {step.message.step_id} with {len(step.sampled)} sampled rows was answered by "
                f"step {output.step_id} with {len(token_ids)}"
            )
        self._num_outstanding -= 1
        logprobs = {entry.row: entry for entry in output.logprobs}
        prompt_logprobs = self._new_prompt_logprobs(step, output)
        updates = []
        for row, (request, token) in enumerate(zip(step.sampled, token_ids, strict=True)):
            if request.finish_reason is None:
                own = (logprobs[row],) if row in logprobs else ()
                updates.append(self._record(request, token, own, prompt_logprobs.pop(request.request_id, ())))
        self._generation_tokens += len(updates)
        updates += [
            RequestUpdate(request_id, [], prompt_logprobs=entries) for request_id, entries in prompt_logprobs.items()
        ]
        for request in [leaving for leaving in self._leaving if not self._is_in_flight(leaving)]:
            self._leaving.remove(request)
            self._release(request)
        return self.take_aborted() + updates

    def _record(
        self, request: Request, token: int, logprobs: tuple[Logprobs, ...], prompt_logprobs: tuple[Logprobs, ...]
    ) -> RequestUpdate:
        """Every running sequence comes here in every step: what does not concern this token is not called."""
        tokens = request.token_ids
        tokens.append(token)
        num_known = len(tokens)
        if num_known >= (request.num_hashed_blocks + 1) * self._block_size:
            self._offer_full_blocks(request)
        finish_reason = stop_reason = None
        if num_known >= request.max_len or token in request.end_token_ids:
            finish_reason, stop_reason = request.stop_check(token)
            if finish_reason is not None:
                self._finish(request, finish_reason)
        return RequestUpdate(
            request.request_id,
            [token],
            finish_reason,
            stop_reason,
            request.num_cached_tokens,
            request.queue_s or 0.0,
            logprobs,
            prompt_logprobs,
        )

    def _new_prompt_logprobs(self, step: ScheduledStep, output: StepOutput) -> dict[str, tuple[Logprobs, ...]]:
        """Prompt log-probabilities by request, without those that were reported before a preemption."""
        new: dict[str, tuple[Logprobs, ...]] = {}
        for entry in output.prompt_logprobs:
            request, start, _ = step.prefills[entry.row]
            # A chunk that starts at `start` reports positions start + 1 and on; `num_prompt_logprobs` are known.
            count = len(entry.ranks) // 4
            known = min(max(request.num_prompt_logprobs - start, 0), count)
            request.num_prompt_logprobs += count - known
            if request.finish_reason is None and known < count:
                new[request.request_id] = (_without_first(entry, known),)
        return new

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        del self._requests[request.request_id]
        self._running.remove(request)
        if self._is_in_flight(request):
            self._leaving.append(request)
        else:
            self._release(request)

    def _is_in_flight(self, request: Request) -> bool:
        """Whether an outstanding step names `request`."""
        return request.last_step_id >= self._next_step_id - self._num_outstanding

    def _release(self, request: Request) -> None:
        """Give back the slot and the blocks of a request that no outstanding step names."""
        self._pool.release(request.block_table)
        self._free_slots.append(request.slot)


def _without_first(entry: Logprobs, count: int) -> Logprobs:
    """`entry` without its first `count` positions."""
    start = 4 * count * entry.width
    return Logprobs(entry.row, entry.width, entry.token_ids[start:], entry.values[start:], entry.ranks[4 * count :])
