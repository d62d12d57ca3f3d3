"""Times one case on an engine with vLLM's interface: step by step, and `generate` as a whole.

Step by step, prefill and decode come apart exactly: the decode window begins with the step that gave the last request
its first token and ends with the step that ended the first request. Every step in between decodes the whole batch and
nothing else. `generate` has no such window; there the time of a call for one token is taken off.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serving.cases import Case

WARM_UP_TOKENS = 16


class SteppedEngine(Protocol):
    """What `Engine` and vLLM's `LLMEngine` have in common."""

    def add_request(self, request_id: str, prompt: Any, params: Any) -> Any: ...
    def step(self) -> Sequence[Any]: ...
    def has_unfinished_requests(self) -> bool: ...


@dataclass(frozen=True)
class Timeline:
    """One run, step by step.

    ttft_s        [batch] seconds from before the first `add_request` to each request's first token
    decode_s      seconds of each step of the decode window; empty where there is none
    total_s       all of it
    tokens        output of each request, in the order of the prompts
    """

    ttft_s: list[float]
    decode_s: list[float]
    total_s: float
    tokens: list[list[int]]


def run_steps(engine: SteppedEngine, prompts: list[list[int]], params: Any) -> Timeline:
    """Add all prompts, then step until they are done."""
    begin = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    moments: list[float] = []
    first: dict[str, float] = {}
    last: dict[str, Any] = {}
    window_begin = window_end = None
    while engine.has_unfinished_requests():
        outputs = engine.step()
        moment = time.perf_counter()
        if not outputs:
            continue  # only published, with run-ahead
        moments.append(moment)
        for output in outputs:
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, moment)
                last[output.request_id] = output
        if window_begin is None and len(first) == len(prompts):
            window_begin = len(moments) - 1
        if window_end is None and any(output.finished for output in outputs):
            window_end = len(moments) - 1
    end = time.perf_counter()
    decode_s = []
    if window_begin is not None and window_end is not None:
        window = moments[window_begin : window_end + 1]
        decode_s = [after - before for before, after in itertools.pairwise(window)]
    return Timeline(
        ttft_s=[first[str(index)] - begin for index in range(len(prompts))],
        decode_s=decode_s,
        total_s=end - begin,
        tokens=[list(last[str(index)].outputs[0].token_ids) for index in range(len(prompts))],
    )


def run_generate(
    generate: Callable[..., Sequence[Any]], prompts: list[list[int]], params: Any
) -> tuple[float, list[list[int]]]:
    """(seconds, output tokens of each prompt) of one call."""
    wrapped = [{"prompt_token_ids": prompt} for prompt in prompts]
    begin = time.perf_counter()
    outputs = generate(wrapped, params, use_tqdm=False)
    return time.perf_counter() - begin, [list(output.outputs[0].token_ids) for output in outputs]


def measure_case(
    case: Case,
    vocab_size: int,
    repetitions: int,
    make_params: Callable[[int], Any],
    generate: Callable[..., Sequence[Any]],
    stepped: SteppedEngine | None,
) -> dict[str, Any]:
    """The figures of one case. Without `stepped`, those of `generate` alone.

    `make_params(n)` gives greedy parameters for exactly n output tokens.
    """
    warm = make_params(min(case.output_len, WARM_UP_TOKENS))
    run_generate(generate, case.prompts(vocab_size, seed=-1), warm)
    if stepped is not None:
        run_steps(stepped, case.prompts(vocab_size, seed=-2), warm)
    whole, one = make_params(case.output_len), make_params(1)
    timelines: list[Timeline] = []
    whole_s: list[float] = []
    one_s: list[float] = []
    num_same = 0
    for repetition in range(repetitions):
        prompts = case.prompts(vocab_size, repetition)
        seconds, tokens = run_generate(generate, prompts, whole)
        _check_lengths(case, tokens)
        whole_s.append(seconds)
        one_s.append(run_generate(generate, prompts, one)[0])
        if stepped is not None:
            timelines.append(run_steps(stepped, prompts, whole))
            _check_lengths(case, timelines[-1].tokens)
            num_same += sum(map(list.__eq__, tokens, timelines[-1].tokens))
    figures: dict[str, Any] = {
        "generate_s": spread(whole_s),
        "generate_one_token_s": spread(one_s),
        "output_tokens_per_s": round(case.batch * case.output_len / statistics.median(whole_s), 1),
        "tpot_generate_ms": None,
        "ttft_ms": None,
        "ttft_last_ms": None,
        "tpot_ms": None,
        "decode_step_ms": None,
        "same_tokens": None,
    }
    if case.output_len > 1:
        pairs = zip(whole_s, one_s, strict=True)
        figures["tpot_generate_ms"] = spread([1e3 * (many - one) / (case.output_len - 1) for many, one in pairs])
    if timelines:
        figures["ttft_ms"] = spread([1e3 * statistics.mean(timeline.ttft_s) for timeline in timelines])
        figures["ttft_last_ms"] = spread([1e3 * max(timeline.ttft_s) for timeline in timelines])
        figures["same_tokens"] = f"{num_same} of {case.batch * repetitions}"
    windows = [timeline.decode_s for timeline in timelines if timeline.decode_s]
    if windows:
        figures["tpot_ms"] = spread([1e3 * statistics.mean(window) for window in windows])
        figures["decode_step_ms"] = percentiles([1e3 * seconds for window in windows for seconds in window])
    return figures


def spread(values: list[float]) -> dict[str, Any]:
    """Median, least and most, and each value."""
    return {
        "median": round(statistics.median(values), 6),
        "min": round(min(values), 6),
        "max": round(max(values), 6),
        "all": [round(value, 6) for value in values],
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90, p99 and the number of values."""
    ordered = sorted(values)
    found = {f"p{share}": round(ordered[(len(ordered) - 1) * share // 100], 4) for share in (50, 90, 99)}
    return {**found, "count": len(ordered)}


def _check_lengths(case: Case, tokens: list[list[int]]) -> None:
    wrong = [len(own) for own in tokens if len(own) != case.output_len]
    if wrong or len(tokens) != case.batch:
        raise RuntimeError(f"{case}: {len(tokens)} outputs, of which {len(wrong)} have another length: {wrong[:4]}")
