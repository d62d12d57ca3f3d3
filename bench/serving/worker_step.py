"""A process of its own: one rank without the bus, decoding one batch, to see where a decode step's time goes.

    python -m serving.worker_step JSON

All ranks of a group run this with the same job and make the same steps, each from a scheduler of its own. With a
run-ahead of 1 a step is launched while the one before it runs, as a worker does it; with 0 each waits for the last
one's tokens. One result for each of the job's `run_aheads`; the profile, with the largest of them, is in the last.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from serving.busy import PROFILED_STEPS, ROUND_STEPS, ROUNDS, SETTLING_STEPS, WARM_UP_STEPS, HostMark, Watch
from serving.cases import Case
from serving.children import emit
from serving.step_table import Work, group_rows, kernel_rows, without_overlaps
from zmqexec.config import EngineConfig, SamplingParams, parse_config
from zmqexec.driver.plan import Plan, make_plan
from zmqexec.driver.scheduler import ScheduledStep, Scheduler
from zmqexec.protocol import NewRequest, StepInput, StepOutput, pack

COLLECTIVE_TIMEOUT_S = 60.0


class Loop:
    """Scheduler and runner of one rank. Up to `run_ahead` steps are outstanding when the next one is launched."""

    def __init__(self, plan: Plan, runner: Any, num_blocks: int, case: Case, watch: Watch, run_ahead: int) -> None:
        self._runner = runner
        self._watch = watch
        self._is_ahead = hasattr(runner, "submit")
        self.run_ahead = run_ahead
        self._scheduler = Scheduler(plan.config, num_blocks, plan.max_model_len, [])
        self._outstanding: deque[tuple[ScheduledStep, Callable[[], StepOutput]]] = deque()
        self._last_had_prefills = True
        params = SamplingParams(temperature=0.0, max_tokens=case.output_len, ignore_eos=True)
        for index, prompt in enumerate(case.prompts(plan.model.vocab_size, seed=0)):
            self._scheduler.add(NewRequest(str(index), pack(prompt), params))

    @property
    def is_prefilling(self) -> bool:
        """True until every request is in."""
        return self._scheduler.stats.num_waiting > 0 or self._last_had_prefills

    def step(self) -> None:
        """Launch a step, then wait for the oldest one that may not be outstanding any more."""
        scheduled = self._scheduler.schedule()
        if scheduled is None:
            raise RuntimeError("the batch ended before the measurement")
        self._last_had_prefills = bool(scheduled.prefills)
        result = self._watch.step(lambda: self._launch(scheduled.message))
        self._outstanding.append((scheduled, result))
        while len(self._outstanding) > (self.run_ahead if self._is_ahead else 0):
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
    modes = job["run_aheads"]
    watch = watched(runner, len(modes))
    loop = Loop(plan, runner, num_blocks, case, watch, max(modes))
    while loop.is_prefilling:
        loop.step()
    for _ in range(WARM_UP_STEPS):
        loop.step()
    loop.drain()
    for _ in range(ROUNDS):
        for loop.run_ahead in modes:
            for _ in range(SETTLING_STEPS):
                loop.step()
            watch.begin(loop.run_ahead)
            for _ in range(ROUND_STEPS):
                loop.step()
            watch.end()
            loop.drain()
    loop.run_ahead = max(modes)
    profiled = {"table": [], "groups": []}
    for mode in modes:
        if job["profile"] and mode == modes[-1]:
            profiled = profile(loop, plan.model.num_layers)
        emit({**{name: job[name] for name in ("tp", "rank", "case")}, **watch.figures(mode), **profiled})
    sys.stdout.flush()
    os._exit(0)  # as a worker ends: without waiting for threads of libraries, or for peers


def watched(runner: Any, num_modes: int) -> Watch:
    """A watch around the runner's graphs and the parts of its `submit`; on the CPU, around its whole step.

    A step that is launched by one call is the part "call", and its graph's span includes its copies.
    """
    if not hasattr(runner, "submit"):
        watch = Watch(HostMark, num_modes)
        runner.run = watch.marked(runner.run)
        return watch
    is_cuda = runner._device.is_cuda
    watch = Watch(lambda: torch.cuda.Event(enable_timing=True), num_modes) if is_cuda else Watch(HostMark, num_modes)
    for graphs in (runner._greedy_graphs, runner._logits_graphs):
        graphs.run = watch.marked(watch.part("launch", graphs.run))
    begin = runner._decode_steps.begin
    in_one, in_parts = watch.marked(watch.part("call", begin)), watch.part("stage", begin)
    runner._decode_steps.begin = lambda step, graph: (in_one if graph else in_parts)(step, graph)
    runner._pending = watch.part("record", runner._pending)
    return watch


def make_job_plan(job: dict[str, Any], case: Case) -> tuple[Plan, int]:
    """The engine's plan, with a KV cache of just the blocks that the case needs: the same on every rank."""
    settings = {**job["settings"], "model": job["folder"]}
    plan = make_plan(parse_config(EngineConfig, settings))
    blocks_each = -(-(case.input_len + case.output_len) // plan.config.block_size)
    # And never too few for one sequence of the greatest length, which the engine insists on.
    num_blocks = max((case.batch + 2) * blocks_each, -(-plan.max_model_len // plan.config.block_size) + 1)
    settings["kv_cache_memory_bytes"] = num_blocks * plan.block_bytes
    return make_plan(parse_config(EngineConfig, settings)), num_blocks


def make_runner(plan: Plan, rank: int, tp: int, store_fd: int) -> Any:
    """What a worker makes of a `LoadModel`."""
    load = plan.load_message(epoch=0)
    timeout = {"timeout_s": COLLECTIVE_TIMEOUT_S, "join_timeout_s": COLLECTIVE_TIMEOUT_S}
    if load.device == "cuda":
        from zmqexec.worker.gpu.collectives import GpuCollectives, LocalGpuCollectives
        from zmqexec.worker.gpu.device import CudaDevice
        from zmqexec.worker.gpu.runner import GpuRunner

        device = CudaDevice(rank)
        group: GpuCollectives = LocalGpuCollectives()
        if tp > 1:
            from zmqexec.worker.gpu.nccl import NcclCollectives

            group = NcclCollectives(rank, tp, store_fd, **timeout)
        return GpuRunner(load, group, device)
    from zmqexec.worker.collectives import LocalCollectives
    from zmqexec.worker.runner import ModelRunner
    from zmqexec.worker.shared_memory import SharedMemoryCollectives

    return ModelRunner(load, SharedMemoryCollectives(rank, tp, store_fd, **timeout) if tp > 1 else LocalCollectives())


def profile(loop: Loop, num_layers: int) -> dict[str, Any]:
    """`table`: the kernels of a decode step (on a CPU: the operators); `groups`: what they are for, and the gaps."""
    is_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if is_cuda else activity.CPU]) as profiler:
        for _ in range(PROFILED_STEPS):
            loop.step()
        loop.drain()
        if is_cuda:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if is_cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == kind]
    spans = [(event.name, event.time_range.start, event.time_range.end) for event in events]
    if not spans:
        return {"table": [], "groups": []}
    if is_cuda:
        works = without_overlaps(spans)
    else:
        works = [Work(event.name, event.time_range.start, event.self_cpu_time_total) for event in events]
    whole_us = max(end for _, _, end in spans) - min(begin for _, begin, _ in spans)
    return {
        "table": kernel_rows(works, PROFILED_STEPS),
        "groups": group_rows(works, PROFILED_STEPS, whole_us / PROFILED_STEPS, num_layers),
    }


if __name__ == "__main__":
    main()
