"""A request's id may come again as soon as its predecessor has ended, however that ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from zmqexec import AsyncEngine, CompletionOutput, Engine, SamplingParams

PROMPT = "12+30="
LONG = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
STOPS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop="4")
"""Ends by a stop string, which only the front end sees: the driver learns of it a step later."""
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


def run(engine: Engine, params: SamplingParams) -> CompletionOutput:
    engine.add_request("x", PROMPT, params)
    for _ in range(100):
        for output in engine.step():
            if output.request_id == "x" and output.finished:
                return output.outputs[0]
    raise AssertionError("100 steps did not finish a request of 12 tokens")


def test_a_request_is_not_touched_by_what_is_left_of_its_namesake(engine: Engine) -> None:
    expected = run(engine, LONG).token_ids
    assert run(engine, STOPS).stop_reason == "4"
    assert run(engine, LONG).token_ids == expected, "after a stop string"
    engine.add_request("x", PROMPT, LONG)
    engine.step()
    engine.step()
    engine.abort_request("x")
    assert run(engine, LONG).token_ids == expected, "after an abort"


def test_streams_are_not_touched_by_what_is_left_of_their_namesakes() -> None:
    async def last(engine: AsyncEngine, params: SamplingParams) -> CompletionOutput:
        async for output in engine.generate(PROMPT, params, request_id="x", output="final"):
            return output.outputs[0]
        raise AssertionError("no output")

    async def check() -> None:
        async with await AsyncEngine.start() as engine:
            expected = (await last(engine, LONG)).token_ids
            for _ in range(5):
                assert (await last(engine, STOPS)).stop_reason == "4"
                assert (await last(engine, LONG)).token_ids == expected, "after a stop string"
            endless = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
            reference = (await last(engine, endless)).token_ids
            aborted = engine.generate(PROMPT, endless, request_id="x", output="delta")
            outputs = [await anext(aborted)]
            await engine.abort("x")
            successor = asyncio.create_task(last(engine, LONG))
            await asyncio.sleep(0)  # it has begun when the loop goes on
            outputs += [output async for output in aborted]
            tokens = [token for output in outputs for token in output.outputs[0].token_ids]
            assert outputs[-1].outputs[0].finish_reason == "abort"
            assert tokens == reference[: len(tokens)], "a delta brings nothing twice"
            assert (await successor).token_ids == expected, "after an abort"

    asyncio.run(asyncio.wait_for(check(), TIMEOUT_S))
