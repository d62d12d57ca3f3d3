"""A user's program to be killed: an Engine (or an AsyncEngine, as a server holds it) that does what stdin says.

    python engine_process.py sync|async SETTINGS_JSON

Commands, one a line: `generate N` starts a request with N prompt tokens; everything it learns is printed as JSON.
"""

import asyncio
import json
import os
import sys
import threading

from zmqexec import AsyncEngine, Engine, SamplingParams

PARAMS = SamplingParams(max_tokens=100_000, ignore_eos=True, temperature=0.0)


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def prompt_of(command: str) -> list[int]:
    return [1] * int(command.split()[1])


def run_sync(settings: dict[str, object]) -> None:
    with Engine(**settings) as engine:
        say(ready=True)
        for command in sys.stdin:
            engine.generate(prompt_of(command), PARAMS, use_tqdm=False)
            say(finished=True)


def read_lines() -> asyncio.Queue[str]:
    """Lines of stdin, read by a thread that nobody waits for at the end."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(lines.put_nowait, line)

    threading.Thread(target=read, daemon=True).start()
    return lines


async def run_async(settings: dict[str, object]) -> None:
    async def generate(prompt: list[int]) -> None:
        async for _ in engine.generate(prompt, PARAMS):
            pass

    async with await AsyncEngine.start(**settings) as engine:
        say(ready=True)
        dead = asyncio.create_task(engine.wait_dead())
        lines = read_lines()
        line = asyncio.create_task(lines.get())
        tasks = {dead, line}
        while True:
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {line, dead}:
                task.result()  # a request ends only by an error
            if dead in done:
                raise dead.result()
            if line in done:
                tasks.add(asyncio.create_task(generate(prompt_of(line.result()))))
                line = asyncio.create_task(lines.get())
                tasks.add(line)


def main() -> None:
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    try:
        if kind == "sync":
            run_sync(settings)
        else:
            asyncio.run(run_async(settings))
    except Exception as error:
        say(error=type(error).__name__, text=str(error))
        sys.stdout.flush()
        os._exit(1)  # a thread may still wait for stdin


if __name__ == "__main__":
    main()
