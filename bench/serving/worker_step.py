"""A process of its own: one rank without the bus, decoding one batch, to see where a decode step's time goes.

    python -m serving.worker_step JSON

All ranks of a group run this with the same job and make the same steps, each from a scheduler of its own. The steps
are launched one ahead of their results, as a worker does it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from serving.cases import Case
from serving.children import emit
from zmqexec.config import EngineConfig, SamplingParams, parse_config
from zmqexec.driver.plan import Plan, make_plan
from zmqexec.driver.scheduler import ScheduledStep, Scheduler
from zmqexec.protocol import NewRequest, StepInput, StepOutput, pack

WARM_UP_STEPS = 10
TIMED_STEPS = 50
PROFILED_STEPS = 10
ROWS = 25
COLLECTIVE_TIMEOUT_S = 60.0


class Loop:
    """Scheduler and runner of one rank. `host_s` is what launching each step took, of the steps since `begin`."""

    def __init__(self, plan: Plan, runner: Any, num_blocks: int, case: Case, vocab_size: int) -> None:
        self._runner = runner
        self._is_ahead = hasattr(runner, "submit")
        self._scheduler = Scheduler(plan.config, num_blocks, plan.max_model_len, [])
        self._outstanding: deque[tuple[ScheduledStep, Callable[[], StepOutput]]] = deque()
        self._last_had_prefills = True
        self.host_s: list[float] = []
        params = SamplingParams(temperature=0.0, max_tokens=case.output_len, ignore_eos=True)
        for index, prompt in enumerate(case.prompts(vocab_size, seed=0)):
            self._scheduler.add(NewRequest(str(index), pack(prompt), params))

    @property
    def is_prefilling(self) -> bool:
        """True until every request is in."""
        return self._scheduler.stats.num_waiting > 0 or self._last_had_prefills

    def step(self) -> None:
        """Launch a step, then wait for the one before it."""
        scheduled = self._scheduler.schedule()
        if scheduled is None:
            raise RuntimeError("the batch ended before the measurement")
        self._last_had_prefills = bool(scheduled.prefills)
        begin = time.perf_counter()
        result = self._launch(scheduled.message)
        self.host_s.append(time.perf_counter() - begin)
        self._outstanding.append((scheduled, result))
        if len(self._outstanding) > int(self._is_ahead):
            self._collect()

    def drain(self) -> None:
        """Wait for what was launched."""
        while self._outstanding:
            self._collect()

    def _launch(self, message: StepInput) -> Callable[[], StepOutput]:
        if self._is_ahead:
            result: Callable[[], StepOutput] = self._runner.submit(message).result
            return result
        output = self._runner.run(message)
        return lambda: output

    def _collect(self) -> None:
        scheduled, result = self._outstanding.popleft()
        self._scheduler.update(scheduled, result())


def main() -> None:
    job = json.loads(sys.argv[1])
    case = Case.parse(job["case"])
    plan, num_blocks = make_job_plan(job, case)
    runner = make_runner(plan, job["rank"], job["tp"], job["store_fd"])
    runner.load()
    runner.init_cache(num_blocks)
    loop = Loop(plan, runner, num_blocks, case, plan.model.vocab_size)
    while loop.is_prefilling:
        loop.step()
    for _ in range(WARM_UP_STEPS):
        loop.step()
    loop.drain()
    loop.host_s.clear()
    begin = time.perf_counter()
    for _ in range(TIMED_STEPS):
        loop.step()
    loop.drain()
    wall_s = time.perf_counter() - begin
    emit(
        {
            "tp": job["tp"],
            "rank": job["rank"],
            "case": job["case"],
            "host_us": round(1e6 * statistics.median(loop.host_s), 1),
            "wall_us": round(1e6 * wall_s / TIMED_STEPS, 1),
            "table": profile(loop) if job["profile"] else [],
        }
    )
    os._exit(0)  # as a worker ends: without waiting for threads of libraries, or for peers


def make_job_plan(job: dict[str, Any], case: Case) -> tuple[Plan, int]:
    """The engine's plan, with a KV cache of just the blocks that the case needs: the same on every rank."""
    settings = {**job["settings"], "model": job["folder"]}
    plan = make_plan(parse_config(EngineConfig, settings))
    blocks_each = -(-max(plan.max_model_len, case.input_len + case.output_len) // plan.config.block_size)
    num_blocks = (case.batch + 2) * blocks_each
    settings["kv_cache_memory_bytes"] = num_blocks * plan.block_bytes
    return make_plan(parse_config(EngineConfig, settings)), num_blocks


def make_runner(plan: Plan, rank: int, tp: int, store_fd: int) -> Any:
    """What a worker makes of a `LoadModel`."""
    load = plan.load_message(epoch=0)
    timeout = {"timeout_s": COLLECTIVE_TIMEOUT_S, "join_timeout_s": COLLECTIVE_TIMEOUT_S}
    if load.device == "cuda":
        from zmqexec.worker.gpu.collectives import make_collectives
        from zmqexec.worker.gpu.device import CudaDevice
        from zmqexec.worker.gpu.runner import GpuRunner

        device = CudaDevice(rank)
        group = make_collectives(rank, tp, store_fd, COLLECTIVE_TIMEOUT_S, join_timeout_s=COLLECTIVE_TIMEOUT_S)
        return GpuRunner(load, group, device)
    from zmqexec.worker.collectives import LocalCollectives
    from zmqexec.worker.runner import ModelRunner
    from zmqexec.worker.shared_memory import SharedMemoryCollectives

    return ModelRunner(load, SharedMemoryCollectives(rank, tp, store_fd, **timeout) if tp > 1 else LocalCollectives())


def profile(loop: Loop) -> list[dict[str, Any]]:
    """The kernels of a decode step (on a CPU: the operators) by their own time, from torch's profiler.

    Where kernels overlap, their times add up to more than the step.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    is_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    if is_cuda:
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            loop.step()
        loop.drain()
        if is_cuda:
            torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages():
        own_us = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if own_us > 0:
            rows.append(
                {
                    "name": event.key[:100],
                    "calls_per_step": round(event.count / PROFILED_STEPS, 2),
                    "us_per_step": round(own_us / PROFILED_STEPS, 2),
                }
            )
    rows.sort(key=lambda row: row["us_per_step"], reverse=True)
    total = round(sum(row["us_per_step"] for row in rows), 2)
    rest = round(sum(row["us_per_step"] for row in rows[ROWS:]), 2)
    kept = rows[:ROWS]
    if rows[ROWS:]:
        kept.append({"name": f"{len(rows) - ROWS} others", "calls_per_step": None, "us_per_step": rest})
    return [*kept, {"name": "all", "calls_per_step": None, "us_per_step": total}]


if __name__ == "__main__":
    main()
