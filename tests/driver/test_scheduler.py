"""The scheduler, against brute force: whatever it decides, every request gets the tokens it would get alone."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import VOCAB_SIZE, FakeWorker, generate
from zmqexec.config import EngineConfig, SamplingParams
from zmqexec.driver.scheduler import ScheduledStep, Scheduler
from zmqexec.protocol import NewRequest, RequestUpdate, StepOutput, pack

EOS = 7
MAX_MODEL_LEN = 32


def make_config(**settings: object) -> EngineConfig:
    defaults: dict[str, object] = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "block_size": 4, "seed": 0}
    return EngineConfig(**(defaults | settings))  # type: ignore[arg-type]


def new_request(request_id: str, prompt: list[int], salt: str | None = None, **params: object) -> NewRequest:
    defaults: dict[str, object] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    return NewRequest(request_id, pack(prompt), SamplingParams(**(defaults | params)), 0, salt)  # type: ignore[arg-type]


@dataclass
class Arrival:
    at_turn: int
    prompt: list[int]
    max_tokens: int
    ignore_eos: bool
    salt: str | None
    abort_after: int | None


class Simulation:
    """A scheduler with a fake worker behind it, `depth` steps ahead, checked at every turn."""

    def __init__(self, config: EngineConfig, num_blocks: int, depth: int) -> None:
        self.config = config
        self.scheduler = Scheduler(config, num_blocks, MAX_MODEL_LEN, [EOS])
        self.worker = FakeWorker(num_blocks, config.block_size)
        self.depth = depth
        self.outstanding: deque[tuple[ScheduledStep, StepOutput]] = deque()
        self.tokens: dict[str, list[int]] = {}
        self.finished: Counter[str] = Counter()
        self.first_tokens: list[str] = []
        self.most_outstanding = 0

    def add(self, new: NewRequest) -> None:
        self.tokens[new.request_id] = []
        self.scheduler.add(new)

    def turn(self) -> None:
        scheduled = self.scheduler.schedule()
        if scheduled is not None:
            assert 0 < scheduled.num_tokens <= self.config.max_num_batched_tokens
            self.outstanding.append((scheduled, self.worker.run(scheduled.message)))
            self.most_outstanding = max(self.most_outstanding, len(self.outstanding))
        self.check_ownership()
        if scheduled is not None and len(self.outstanding) <= self.depth:
            self.record(self.scheduler.take_aborted())
        elif self.outstanding:
            self.record(self.scheduler.update(*self.outstanding.popleft()))
        else:
            self.record(self.scheduler.take_aborted())
        self.check_ownership()

    def record(self, updates: list[RequestUpdate]) -> None:
        for update in updates:
            assert not self.finished[update.request_id], "an update after the end"
            if update.token_ids and not self.tokens[update.request_id]:
                self.first_tokens.append(update.request_id)
            self.tokens[update.request_id] += update.token_ids
            self.finished[update.request_id] += update.finish_reason is not None

    def check_ownership(self) -> None:
        """Every block is free or owned by exactly the block tables it is in; every slot by one request."""
        scheduler, pool = self.scheduler, self.scheduler._pool
        holders = scheduler._running + scheduler._leaving
        owned = Counter(block for request in holders for block in request.block_table)
        assert [owned[block] for block in range(pool.num_blocks)] == pool._owners
        assert set(pool._free) == {block for block in range(pool.num_blocks) if not owned[block]}
        assert {block: digest for digest, block in pool._cached.items()} == pool._hash_of
        slots = [request.slot for request in holders] + scheduler._free_slots
        assert sorted(slots) == list(range(self.config.max_num_seqs))
        arrivals = [request.arrival for request in scheduler._running]
        assert arrivals == sorted(arrivals)

    def run_to_the_end(self, bound: int) -> None:
        for _ in range(bound):
            if not self.scheduler.has_unfinished:
                assert self.scheduler._pool.num_owned == 0
                return
            self.turn()
        raise AssertionError(f"requests are still open after {bound} turns")


arrivals = st.lists(
    st.builds(
        Arrival,
        at_turn=st.integers(0, 20),
        prompt=st.one_of(
            st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=24),
            st.integers(1, 24).map(lambda length: list(range(length))),  # shared prefixes
        ),
        max_tokens=st.integers(1, 40),
        ignore_eos=st.booleans(),
        salt=st.sampled_from([None, None, "a", "b"]),
        abort_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    trace=arrivals,
    depth=st.integers(0, 3),
    block_size=st.sampled_from([1, 3, 4, 16]),
    spare_blocks=st.integers(0, 12),
    budget=st.integers(4, 40),
    caching=st.booleans(),
    chunked=st.booleans(),
)
def test_every_request_gets_its_tokens_once_in_bounded_steps(
    trace: list[Arrival], depth: int, block_size: int, spare_blocks: int, budget: int, caching: bool, chunked: bool
) -> None:
    config = make_config(
        block_size=block_size,
        max_num_batched_tokens=budget if chunked else 40,
        enable_prefix_caching=caching,
        enable_chunked_prefill=chunked,
    )
    simulation = Simulation(config, -(-MAX_MODEL_LEN // block_size) + spare_blocks, depth)
    expected: dict[str, list[int]] = {}
    aborts: dict[int, list[str]] = {}
    for turn in range(40):
        for number, arrival in enumerate(trace):
            if arrival.at_turn == turn:
                name = str(number)
                params = {"max_tokens": arrival.max_tokens, "ignore_eos": arrival.ignore_eos}
                simulation.add(new_request(name, arrival.prompt, arrival.salt, **params))
                limit = min(arrival.max_tokens, MAX_MODEL_LEN - len(arrival.prompt))
                expected[name] = generate(arrival.prompt, limit, [] if arrival.ignore_eos else [EOS])
                if arrival.abort_after is not None:
                    aborts.setdefault(turn + arrival.abort_after, []).append(name)
        simulation.turn()
        for name in aborts.get(turn, []):
            simulation.scheduler.abort(name)
    simulation.run_to_the_end(bound=200 + 40 * sum(len(arrival.prompt) + 40 for arrival in trace))

    aborted = {name for names in aborts.values() for name in names}
    for name, tokens in simulation.tokens.items():
        assert simulation.finished[name] == 1
        assert tokens == expected[name][: len(tokens)] if name in aborted else tokens == expected[name]
    order = sorted(
        (name for name in simulation.tokens if name not in aborted), key=lambda n: (trace[int(n)].at_turn, int(n))
    )
    assert [name for name in simulation.first_tokens if name not in aborted] == order


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_run_ahead_keeps_that_many_steps_outstanding_without_token_values(depth: int) -> None:
    simulation = Simulation(make_config(), num_blocks=8, depth=depth)
    simulation.add(new_request("a", [1, 2, 3], max_tokens=6))
    simulation.run_to_the_end(bound=30)
    assert simulation.most_outstanding == depth + 1
    assert simulation.tokens["a"] == generate([1, 2, 3], 6)


def test_a_stop_seen_late_discards_the_token_in_flight() -> None:
    prompt = next(
        [first, second]
        for first in range(VOCAB_SIZE)
        for second in range(VOCAB_SIZE)
        if EOS in generate([first, second], 4)[:3]
    )
    simulation = Simulation(make_config(), num_blocks=8, depth=2)
    simulation.add(new_request("a", prompt, ignore_eos=False))
    simulation.run_to_the_end(bound=30)
    assert simulation.tokens["a"] == generate(prompt, 8, [EOS])
    assert simulation.tokens["a"][-1] == EOS


def test_what_a_sequence_owns_is_free_when_the_last_step_that_names_it_is_collected() -> None:
    simulation = Simulation(make_config(), num_blocks=8, depth=1)
    simulation.add(new_request("a", [1, 2, 3]))
    for _ in range(2):
        simulation.turn()
    simulation.scheduler.abort("a")
    assert len(simulation.outstanding) == 1
    assert simulation.scheduler.stats.num_blocks_used == 1
    simulation.turn()
    assert not simulation.outstanding
    assert simulation.scheduler.stats.num_blocks_used == 0


def test_the_newest_sequence_is_preempted_and_finishes_later_with_the_same_tokens() -> None:
    simulation = Simulation(make_config(enable_prefix_caching=False), num_blocks=8, depth=1)
    prompts = {"old": [1] * 8, "new": [2] * 8}
    for name, prompt in prompts.items():
        simulation.add(new_request(name, prompt, max_tokens=20))
    simulation.run_to_the_end(bound=200)
    assert simulation.scheduler.stats.preemptions > 0
    assert {name: generate(prompt, 20) for name, prompt in prompts.items()} == simulation.tokens


def test_nothing_is_preempted_while_a_step_is_outstanding() -> None:
    simulation = Simulation(make_config(enable_prefix_caching=False), num_blocks=8, depth=1)
    for name in ("old", "new"):
        simulation.add(new_request(name, [len(name)] * 8, max_tokens=20))
    while simulation.scheduler.has_unfinished:
        before = simulation.scheduler.stats.preemptions
        num_outstanding = len(simulation.outstanding)
        simulation.turn()
        if simulation.scheduler.stats.preemptions > before:
            assert num_outstanding == 0


def test_a_long_prompt_is_not_overtaken_by_a_short_one_behind_it() -> None:
    simulation = Simulation(make_config(max_num_batched_tokens=4), num_blocks=16, depth=1)
    simulation.add(new_request("long", list(range(20)), max_tokens=1))
    simulation.add(new_request("short", [1], max_tokens=1))
    simulation.run_to_the_end(bound=30)
    assert simulation.first_tokens == ["long", "short"]


def test_prompts_with_a_common_beginning_share_blocks_already_in_the_same_step() -> None:
    simulation = Simulation(make_config(max_num_batched_tokens=40), num_blocks=16, depth=0)
    for name in ("a", "b"):
        simulation.add(new_request(name, [*range(12), len(name)], max_tokens=1))
    simulation.turn()
    stats = simulation.scheduler.stats
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (26, 12)
    simulation.run_to_the_end(bound=10)


def test_the_last_token_of_a_cached_prompt_is_computed_for_its_logits() -> None:
    simulation = Simulation(make_config(), num_blocks=16, depth=0)
    for name in ("first", "again"):
        simulation.add(new_request(name, list(range(8)), max_tokens=2))
        simulation.run_to_the_end(bound=10)
    assert simulation.scheduler.stats.cached_prompt_tokens == 4
    assert simulation.tokens["first"] == simulation.tokens["again"]


def test_a_block_of_output_is_shared_once_it_is_full() -> None:
    simulation = Simulation(make_config(), num_blocks=16, depth=1)
    prompt = [1, 2, 3, 4]
    simulation.add(new_request("turn 1", prompt, max_tokens=5))
    simulation.run_to_the_end(bound=20)
    simulation.add(new_request("turn 2", prompt + simulation.tokens["turn 1"], max_tokens=1))
    simulation.run_to_the_end(bound=20)
    assert simulation.scheduler.stats.cached_prompt_tokens == 8


def test_a_salt_keeps_equal_prompts_apart() -> None:
    simulation = Simulation(make_config(), num_blocks=16, depth=0)
    for name, salt in (("a", "tenant-1"), ("b", "tenant-2"), ("c", None), ("d", "tenant-1")):
        before = simulation.scheduler.stats.cached_prompt_tokens
        simulation.add(new_request(name, list(range(9)), salt, max_tokens=1))
        simulation.run_to_the_end(bound=10)
        assert simulation.scheduler.stats.cached_prompt_tokens - before == (8 if name == "d" else 0)


def test_the_least_recently_used_prefix_is_forgotten_first() -> None:
    simulation = Simulation(make_config(), num_blocks=8, depth=0)
    prompts = {"a": [1] * 9, "b": [2] * 9, "a again": [1] * 9, "c": [3] * 20, "a third": [1] * 9, "b again": [2] * 9}
    hits = {}
    for name, prompt in prompts.items():
        before = simulation.scheduler.stats.cached_prompt_tokens
        simulation.add(new_request(name, prompt, max_tokens=1))
        simulation.run_to_the_end(bound=20)
        hits[name] = simulation.scheduler.stats.cached_prompt_tokens - before
    assert hits == {"a": 0, "b": 0, "a again": 8, "c": 0, "a third": 8, "b again": 0}


def test_a_decode_step_of_an_unchanged_batch_of_256_is_a_few_dozen_bytes() -> None:
    import msgspec

    config = make_config(max_num_seqs=256, max_num_batched_tokens=2048, block_size=16)
    scheduler = Scheduler(config, 1024, MAX_MODEL_LEN, [EOS])
    for number in range(256):
        scheduler.add(new_request(str(number), [number % VOCAB_SIZE] * 4, max_tokens=8))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None
    assert len(second.decodes) == 256
    assert len(msgspec.msgpack.encode(second.message)) < 60


def test_seeds_of_requests_without_one_come_from_the_engine_seed() -> None:
    def seeds(engine_seed: int) -> list[int]:
        scheduler = Scheduler(make_config(seed=engine_seed), 64, MAX_MODEL_LEN, [EOS])
        for name in ("a", "b", "c"):
            scheduler.add(new_request(name, [1, 2], temperature=1.0, seed=5 if name == "c" else None))
        step = scheduler.schedule()
        assert step is not None
        return [admission.sampling.seed for admission in step.message.admitted if admission.sampling]

    assert seeds(1) == seeds(1)
    assert seeds(1)[:2] != seeds(2)[:2]
    assert seeds(1)[2] == seeds(2)[2] == 5
    assert len(set(seeds(1))) == 3


def test_random_long_traces_with_many_preemptions_end() -> None:
    rng = random.Random(0)
    simulation = Simulation(make_config(max_num_seqs=8, max_num_batched_tokens=16), num_blocks=9, depth=1)
    prompts = {str(n): [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 12))] for n in range(60)}
    for name, prompt in prompts.items():
        simulation.add(new_request(name, prompt, max_tokens=18))
    simulation.run_to_the_end(bound=5000)
    assert simulation.scheduler.stats.preemptions > 5
    assert simulation.tokens == {name: generate(prompt, 18) for name, prompt in prompts.items()}
