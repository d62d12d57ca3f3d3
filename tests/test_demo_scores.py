"""The built-in model answers right at every tensor_parallel_size: numerics, cache and sharding are right as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from zmqexec import Engine, SamplingParams
from zmqexec.demo.tasks import QUESTIONS, Problem, held_out_additions, held_out_counts, held_out_sorts

NEEDED = {"additions": 0.95, "sorts": 0.90, "counts": 0.90}


@pytest.fixture(scope="module", params=[1, 2, 4])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(tensor_parallel_size=request.param, executor="multiproc", kv_cache_memory_bytes=64 << 20) as engine:
        yield engine


@pytest.mark.parametrize(
    ("task", "problems"),
    [("additions", held_out_additions(200)), ("sorts", held_out_sorts(50)), ("counts", held_out_counts(50))],
    ids=NEEDED,
)
def test_held_out_problems_are_solved(
    engine: Engine, record_property: Callable[[str, Any], None], task: str, problems: list[Problem]
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=32)
    outputs = engine.generate([problem.prompt for problem in problems], params, use_tqdm=False)
    solved = sum(
        (output.outputs[0].text, output.outputs[0].finish_reason) == (problem.answer, "stop")
        for output, problem in zip(outputs, problems, strict=True)
    )
    record_property("score", solved / len(problems))
    assert solved >= NEEDED[task] * len(problems)


def test_the_listed_questions_are_answered_word_for_word(engine: Engine) -> None:
    chats = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
    outputs = engine.chat(chats, SamplingParams(temperature=0.0, max_tokens=200), use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == [answer for _, answer in QUESTIONS]
