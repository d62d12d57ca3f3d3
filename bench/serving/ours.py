"""The cases on `zmqexec.Engine`, in this process. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable

from serving.cases import Case
from serving.clock import measure_case
from serving.setting import Setting
from serving.tally import Tally
from zmqexec import Engine, SamplingParams, ZmqexecError, __version__

NAME = "zmqexec"
OpenEngine = Callable[[int, int], Engine]
"""(tp, run_ahead) → an engine."""


def greedy(count: int) -> SamplingParams:
    """Exactly `count` tokens."""
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


def measure_engine(
    setting: Setting, tp: int, run_ahead: int, cases: list[Case], tally: Tally, *, whole_only: bool
) -> None:
    """Every case on one engine; on another one after a case that broke it."""
    left = list(cases)
    while left:
        if tally.left_s <= 0:
            tally.give_up(NAME, tp, " ".join(map(str, left)), "the budget was spent")
            return
        try:
            left = _measure_until_broken(setting, tp, run_ahead, left, tally, whole_only)
        except (ZmqexecError, OSError) as error:
            tally.give_up(NAME, tp, " ".join(map(str, left)), f"the engine did not start: {_in_short(error)}")
            return


def _measure_until_broken(
    setting: Setting, tp: int, run_ahead: int, cases: list[Case], tally: Tally, whole_only: bool
) -> list[Case]:
    """The cases that are still to be measured."""
    begin = time.perf_counter()
    with Engine(setting.folder, **setting.engine_settings(tp, run_ahead)) as engine:
        loaded = time.perf_counter()
        engine.generate([[1, 2, 3, 4, 5]], greedy(1), use_tqdm=False)
        end = time.perf_counter()
        tally.add_start(
            {
                "way": NAME,
                "version": __version__,
                "tp": tp,
                "run_ahead": run_ahead,
                "engine_s": round(loaded - begin, 2),
                "first_token_s": round(end - loaded, 3),
                "total_s": round(end - begin, 2),
                "num_blocks": engine.info.num_blocks,
            }
        )
        for index, case in enumerate(cases):
            if tally.left_s <= 0:
                return cases[index:]
            preemptions = engine.stats.preemptions
            stepped = None if whole_only else engine
            try:
                figures = measure_case(
                    case, engine.info.vocab_size, setting.repetitions, greedy, engine.generate, stepped
                )
            except (ZmqexecError, RuntimeError) as error:
                tally.give_up(NAME, tp, str(case), _in_short(error))
                return cases[index + 1 :]
            figures["preemptions"] = engine.stats.preemptions - preemptions
            tally.add(NAME, __version__, tp, run_ahead, setting.cuda_graphs, case, figures)
    return []


def _in_short(error: BaseException) -> str:
    """The first and the last line of an error, without folders."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
    words = (word.rpartition("/")[2] if word.strip("'\"(").startswith("/") else word for word in said.split())
    return f"{type(error).__name__}: {' '.join(words)}"[:600]
