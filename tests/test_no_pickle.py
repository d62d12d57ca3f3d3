"""With every way to unpickle taken away in all processes, requests are served as before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SITE = """
import _pickle, os, pickle, sys

def refuse(*args, **kwargs):
    raise AssertionError("something was unpickled")

class Refusing(pickle.Unpickler):
    def load(self):
        refuse()

    def __init_subclass__(cls):
        cls.load = refuse

for module in (pickle, _pickle):
    module.load = module.loads = refuse
    module.Unpickler = Refusing
pickle._Unpickler = Refusing
if len(sys.orig_argv) > 3:
    with open(os.environ["PICKLE_GUARD_LOG"], "a") as log:
        print(sys.orig_argv[3], file=log)
"""

PROGRAM = """
import asyncio, json, pickle
from zmqexec import AsyncEngine, SamplingParams

async def main():
    async with await AsyncEngine.start(tensor_parallel_size=2) as engine:
        params = SamplingParams(max_tokens=8, temperature=0.7, seed=1, logprobs=2, prompt_logprobs=1, n=2)
        async for out in engine.generate("12+30=", params, output="final"):
            print(json.dumps([sample.finish_reason for sample in out.outputs]))
    try:
        pickle.loads(b"")
    except AssertionError:
        print("guarded")

asyncio.run(main())
"""


def test_requests_are_served_while_unpickling_raises_in_all_roles(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    log = tmp_path / "log"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PICKLE_GUARD_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    reasons, guarded = done.stdout.splitlines()
    assert guarded == "guarded"
    assert set(json.loads(reasons)) <= {"stop", "length"}
    assert sorted(role for role in log.read_text().split() if role in ("driver", "worker")) == [
        "driver",
        "worker",
        "worker",
    ]
