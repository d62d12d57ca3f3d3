"""Scheduling as users see it: however steps run ahead, preempt, chunk and share, the tokens are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from zmqexec import Engine, SamplingParams

SETTINGS: dict[str, Any] = {"num_threads": 1, "max_model_len": 128, "block_size": 4, "seed": 0}
TOKEN_BYTES = 2 * 3 * 4 * 16 * 4  # keys and values of 3 layers with 4 KV heads of 16 float32
TIGHT = {"kv_cache_memory_bytes": 128 * TOKEN_BYTES}
"""Blocks for one sequence of the longest length: a few shorter ones soon crowd each other out."""

ROOMY = {"kv_cache_memory_bytes": 4096 * TOKEN_BYTES}


@dataclass
class Trace:
    """What happened to a fixed script of arrivals, aborts and stops.

    most_outstanding  steps that were on the workers, or had not been collected, at one time
    """

    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, str | None] = field(default_factory=dict)
    most_outstanding: int = 0
    preemptions: int = 0


ARRIVALS: dict[int, list[tuple[str, Any, SamplingParams]]] = {
    0: [
        ("greedy", "The driver", SamplingParams(temperature=0.0, max_tokens=70, ignore_eos=True)),
        ("seeded", "The bus", SamplingParams(temperature=1.3, seed=1, max_tokens=60, ignore_eos=True)),
        ("ends by itself", "count: 17 18 19", SamplingParams(temperature=0.0, max_tokens=60)),
        ("stop string", "sort: 7 3 9 1 =", SamplingParams(temperature=0.0, max_tokens=40, stop=" 7 9")),
    ],
    3: [
        ("stop token", "12+30=", SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=[23])),
        ("aborted", "Who are you?", SamplingParams(temperature=1.0, seed=2, max_tokens=90, ignore_eos=True)),
        ("penalties", [7] * 30, SamplingParams(temperature=0.8, seed=3, max_tokens=40, frequency_penalty=1.0)),
    ],
    9: [
        ("late", [9] * 50, SamplingParams(temperature=0.0, max_tokens=30, min_tokens=5, logprobs=1)),
        ("n", "Does", SamplingParams(temperature=1.5, seed=4, max_tokens=20, n=2, ignore_eos=True)),
    ],
}


def play(engine: Engine, *, abort_at: int = 12, max_turns: int = 2000) -> Trace:
    """Run the script to its end."""
    trace = Trace()
    executor = engine._driver._executor
    collect = type(executor).collect

    def counting() -> Any:
        trace.most_outstanding = max(trace.most_outstanding, engine._driver.num_outstanding)
        return collect(executor)

    executor.collect = counting  # type: ignore[method-assign]
    for turn in range(max_turns):
        for request in ARRIVALS.get(turn, []):
            engine.add_request(*request)
        if turn == abort_at:
            engine.abort_request("aborted")
        if turn > max(ARRIVALS) and not engine.has_unfinished_requests():
            trace.preemptions = engine.stats.preemptions
            assert engine.stats.num_blocks_used == 0
            return trace
        for output in engine.step():
            trace.tokens[output.request_id] = [token for sample in output.outputs for token in sample.token_ids]
            trace.ends[output.request_id] = output.outputs[0].finish_reason
    raise AssertionError(f"not finished after {max_turns} turns")


def complete(trace: Trace) -> dict[str, list[int]]:
    """The tokens of all requests that ran to their end."""
    return {name: tokens for name, tokens in trace.tokens.items() if name != "aborted"}


@pytest.fixture(scope="module")
def reference() -> Iterator[Trace]:
    """The script with room for everyone, one step at a time."""
    with Engine(run_ahead=0, **SETTINGS, **ROOMY) as engine:
        yield play(engine)


def test_the_script_holds_every_kind_of_end_and_depth_0_has_one_step_at_a_time(reference: Trace) -> None:
    assert reference.ends["greedy"] == reference.ends["seeded"] == "length"
    assert reference.ends["ends by itself"] == reference.ends["stop string"] == reference.ends["stop token"] == "stop"
    assert "aborted" not in reference.ends or reference.ends["aborted"] is None
    assert reference.most_outstanding == 1
    assert reference.preemptions == 0


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_run_ahead_and_preemption_change_no_token(reference: Trace, run_ahead: int) -> None:
    with Engine(run_ahead=run_ahead, **SETTINGS, **TIGHT) as engine:
        trace = play(engine)
        assert trace.preemptions > 0
        assert trace.most_outstanding == run_ahead + 1
        assert complete(trace) == complete(reference) and trace.ends["late"] == reference.ends["late"]
        assert complete(play(engine)) == complete(reference), "and again, with prefixes in the cache"


def test_chunks_of_any_size_and_no_chunks_give_the_same_tokens(reference: Trace) -> None:
    with Engine(max_num_seqs=8, max_num_batched_tokens=8, enable_prefix_caching=False, **SETTINGS, **ROOMY) as engine:
        assert complete(play(engine)) == complete(reference)
        assert engine.stats.cached_prompt_tokens == 0
        for _ in range(2):
            (output,) = engine.generate([[5] * 40], SamplingParams(max_tokens=1), use_tqdm=False)
            assert output.num_cached_tokens == 0, "prefix caching is off"
    with Engine(
        max_num_seqs=8, max_num_batched_tokens=128, enable_chunked_prefill=False, **SETTINGS, **ROOMY
    ) as engine:
        prefills: list[int] = []
        submit = engine._driver._executor.submit

        def noting(step: Any) -> None:
            prefills.append(len(step.prefills) // 8)
            submit(step)

        engine._driver._executor.submit = noting  # type: ignore[method-assign]
        assert complete(play(engine)) == complete(reference)
        # Without chunks every prompt is one row: as many rows as sequences were admitted.
        assert sum(prefills) == sum(params.n for requests in ARRIVALS.values() for *_, params in requests)
