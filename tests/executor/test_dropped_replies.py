"""Replies that nobody asked for are dropped and counted, by what is wrong with them."""

from __future__ import annotations

import os
from contextlib import ExitStack

from zmqexec import Engine, SamplingParams
from zmqexec.bus.observer import engines_of
from zmqexec.executor.multiproc import MultiprocExecutor
from zmqexec.protocol import StepOutput, pack


def test_stale_replies_and_those_of_another_epoch_are_counted_apart_and_change_nothing() -> None:
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(tensor_parallel_size=2, name="dropping"))
        (observer,) = (one for one in engines_of(os.getpid()) if one.name == "dropping")
        stack.callback(observer.close)
        executor = engine._driver._executor
        assert isinstance(executor, MultiprocExecutor)
        no_such_step = StepOutput(0, 12345, pack([7]))
        of_rank_1 = StepOutput(0, 0, pack([7]))
        earlier_group = StepOutput(1, 0, pack([7]))
        executor._early.extend(
            [(0, no_such_step), (0, earlier_group), (1, of_rank_1), (1, earlier_group), (0, earlier_group)]
        )
        out = engine.generate("12+30=", SamplingParams(temperature=0.0), use_tqdm=False)
        assert out[0].outputs[0].text == "42"
        assert (engine.stats.stale_replies, engine.stats.wrong_epoch_replies) == (2, 3)
        assert observer.snapshot().engine == engine.stats
