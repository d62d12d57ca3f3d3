"""What AsyncEngine does beyond Engine: iterators that may be dropped, and a driver in a process of its own."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from tests.procs import roles, wait_gone
from zmqexec import AsyncEngine, CheckpointError, EngineClosed, RequestError, RequestOutput, SamplingParams

T = TypeVar("T")
LONG = SamplingParams(max_tokens=400, ignore_eos=True, temperature=0.0)
SHORT = SamplingParams(max_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def run() -> AsyncIterator[Callable[[Callable[[AsyncEngine], Awaitable[T]]], T]]:
    """Runs a coroutine function on one engine that all tests of this file share."""
    with asyncio.Runner() as runner:
        engine = runner.run(AsyncEngine.start(num_threads=1))
        yield lambda what: runner.run(what(engine))
        runner.run(engine.close())


async def settled(engine: AsyncEngine) -> None:
    """Until nothing runs any more. The last request's own update tells."""
    async for _ in engine.generate("1+1=", SHORT):
        pass
    async with asyncio.timeout(10):
        while engine.stats.num_running or engine.stats.num_waiting or engine.stats.num_blocks_used:
            await asyncio.sleep(0.01)


async def collect(outputs: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in outputs]


def test_the_bus_can_be_seen_until_the_engine_is_closed(run) -> None:  # type: ignore[no-untyped-def]
    async def check(engine: AsyncEngine) -> None:
        before = engine.bus_snapshot()
        await settled(engine)
        after = engine.bus_snapshot()
        assert before is not None and after is not None
        assert after.engine.steps > before.engine.steps and after.engine.num_running == 0
        assert after.driver_pid == roles(psutil.Process())["driver"].pid and len(after.ranks) == 1

    async def ends() -> None:
        async with await AsyncEngine.start(num_threads=1) as engine:
            seen = engine.bus_snapshot()
            assert seen is not None
            psutil.Process(seen.driver_pid).kill()
            await engine.wait_dead()
            assert engine.bus_snapshot() is not None, "how it stood when it died"
        assert engine.bus_snapshot() is None

    run(check)
    asyncio.run(ends())


def test_cumulative_delta_and_final_tell_the_same_story(run) -> None:  # type: ignore[no-untyped-def]
    async def check(engine: AsyncEngine) -> None:
        cumulative = await collect(engine.generate("12+30=", SHORT))
        deltas = await collect(engine.generate("12+30=", SHORT, output="delta"))
        (final,) = await collect(engine.generate("12+30=", SHORT, output="final"))
        assert cumulative[-1].outputs[0].text == final.outputs[0].text == "42"
        assert "".join(delta.outputs[0].text for delta in deltas) == "42"
        tokens = [token for delta in deltas for token in delta.outputs[0].token_ids]
        assert tokens == final.outputs[0].token_ids == cumulative[-1].outputs[0].token_ids
        assert [output.finished for output in deltas] == [False] * (len(deltas) - 1) + [True]

    run(check)


def test_an_iterator_that_is_left_or_dropped_aborts_its_request(run) -> None:  # type: ignore[no-untyped-def]
    async def check(engine: AsyncEngine) -> None:
        before = engine.stats.generation_tokens
        async for _ in engine.generate("left by break", LONG):
            break
        dropped = engine.generate("dropped", LONG)
        await anext(dropped)
        del dropped
        gc.collect()
        cancelled = asyncio.create_task(collect(engine.generate("cancelled", LONG)))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        await settled(engine)
        assert engine.stats.generation_tokens - before < 3 * 400

    run(check)


def test_abort_ends_an_iterator_with_finish_reason_abort(run) -> None:  # type: ignore[no-untyped-def]
    async def check(engine: AsyncEngine) -> None:
        outputs = []
        async for output in engine.generate("a long story", LONG, request_id="mine"):
            outputs.append(output)
            await engine.abort("mine")
        assert outputs[-1].outputs[0].finish_reason == "abort"
        await engine.abort("nobody's")
        await settled(engine)

    run(check)


def test_many_requests_at_once_get_what_each_gets_alone(run) -> None:  # type: ignore[no-untyped-def]
    async def check(engine: AsyncEngine) -> None:
        prompts = [f"{a}+{b}=" for a in range(0, 80, 10) for b in range(8)]
        batch = await asyncio.gather(*(collect(engine.generate(p, SHORT, output="final")) for p in prompts))
        assert [out[0].outputs[0].text for out in batch] == [str(sum(map(int, p[:-1].split("+")))) for p in prompts]

    run(check)


def test_a_wrong_request_raises_at_the_first_item_and_the_engine_goes_on(run) -> None:  # type: ignore[no-untyped-def]
    async def check(engine: AsyncEngine) -> None:
        with pytest.raises(RequestError, match="empty"):
            await anext(engine.generate([], SHORT))
        assert (await collect(engine.generate("2+2=", SHORT)))[-1].outputs[0].text == "4"

    run(check)


def test_a_closed_engine_refuses_and_leaves_no_process() -> None:
    async def check() -> None:
        others = psutil.Process().children(recursive=True)
        engine = await AsyncEngine.start(num_threads=1)
        assert set(roles(psutil.Process())) >= {"driver", "worker 0"}
        waiting = asyncio.create_task(collect(engine.generate("a long story", LONG)))
        await asyncio.sleep(0)
        children = set(psutil.Process().children(recursive=True)) - set(others)
        assert len(children) == 2
        await engine.close()
        await engine.close()
        with pytest.raises(EngineClosed):
            await waiting
        with pytest.raises(EngineClosed):
            await anext(engine.generate("1+1=", SHORT))
        assert not [child for child in children if child.is_running()]

    asyncio.run(check())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"model": "/no/such/model"}, "model folder"), ({"tokenizer": "/no/such/tokenizer"}, "tokenizer folder")],
)
def test_what_is_missing_is_named(settings: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        asyncio.run(AsyncEngine.start(**settings))


def test_a_broken_tokenizer_is_refused_before_a_process_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    monkeypatch.setattr("zmqexec.child.subprocess.Popen", lambda *args, **kwargs: pytest.fail("a process was started"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        asyncio.run(AsyncEngine.start(tokenizer=str(tmp_path)))


def test_closing_that_is_cancelled_still_ends_every_process() -> None:
    async def check() -> None:
        others = psutil.Process().children(recursive=True)
        engine = await AsyncEngine.start(num_threads=1)
        processes = [child for child in psutil.Process().children(recursive=True) if child not in others]
        assert len(processes) == 2
        (driver,) = (child for child in processes if child.ppid() == os.getpid())
        driver.suspend()  # so it does not leave by itself
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.close(), 0.2)
        wait_gone(processes, 10.0)

    asyncio.run(check())


@pytest.mark.parametrize("fork", [False, True], ids=["", "forked"])
def test_an_engine_that_nobody_closes_ends_with_the_program_or_with_its_last_reference(fork: bool) -> None:
    program = f"""
import asyncio, atexit, gc, os, psutil
from zmqexec import AsyncEngine
async def main():
    engine = await AsyncEngine.start(num_threads=1)
    if {fork} and os.fork() == 0:
        # As multiprocessing's children end. One that went on to close its copy of the event loop would take the
        # loop's descriptors out of the epoll set that it shares with its parent: asyncio, not the engine.
        engine = None
        gc.collect()
        atexit._run_exitfuncs()
        os._exit(0)
    async for _ in engine.generate("1+1="):
        pass
    return engine
engine = asyncio.run(main())
started = psutil.Process().children(recursive=True)
engine = None
gc.collect()
psutil.wait_procs(started, timeout=10)
assert not any(process.is_running() for process in started), started
"""
    program += "kept = asyncio.run(main())\n"
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)
