"""A user's program that generates without a pause, and says what: the same each time, whatever is done to it.

    python busy_process.py SETTINGS_JSON

With `"fork": true` among the settings it forks in the ways programs do while the engine is open, and keeps the forks.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time

from zmqexec import Engine, SamplingParams

PROMPTS = [[token] * 20 for token in range(10, 18)]
PARAMS = [SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=seed) for seed in range(len(PROMPTS))]


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def fork_in_every_way() -> list[int]:
    """Processes that sleep: as a data loader starts them, as `os.fork` does, and as programs are started."""
    loader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    loader.start()
    fork = os.fork()
    if fork == 0:
        time.sleep(60)
        os._exit(0)
    program = subprocess.Popen(["sleep", "60"], close_fds=False)
    assert loader.pid is not None
    return [loader.pid, fork, program.pid]


def main() -> None:
    settings = json.loads(sys.argv[1])
    forks = settings.pop("fork", False)
    with Engine(**settings) as engine:
        say(forks=fork_in_every_way() if forks else [])
        while True:
            outputs = engine.generate(PROMPTS, PARAMS, use_tqdm=False)
            say(tokens=[output.outputs[0].token_ids for output in outputs])


if __name__ == "__main__":
    main()
