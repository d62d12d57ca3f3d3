"""Is the one-shot all-reduce right on these GPUs, over a million replays too, and how fast is it beside NCCL?

    python bench/gpu_kernels/all_reduce.py [--check] [--measure] [--ranks 2] > result.json

Starts one process per GPU, each of which joins as a worker does (`NcclCollectives`), and ends them after a minute each
if they hang. Times are of CUDA graphs of 50 calls; each waits for all ranks, so a call's time is its latency. Beside
ours: NCCL through cupy, and torch's symmetric memory without multicast. `check` and `measure` give rows, for scripts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STARTING_S = 40.0
"""What a mode may take beyond its seconds until its processes are killed."""
GRAPH_CALLS = 50
RANDOM_CALLS = 300
MODULUS = 1021
REPLAYS, REPLAYS_PER_ROUND = 1_000_000, 20_000
KIB = 1 << 10
SIZES_KIB = (8, 16, 64, 256, 1024, 32, 128, 512)
COLS = 4096
EPS = 1e-5
WORDS, FLAGS = 0, 1

Row = dict[str, Any]


def check(device: Any, ranks: int | None = None, seconds: float = 20.0) -> list[Row]:
    """A row per case with `ok`. Needs two GPUs."""
    return launched("check", ranks, seconds)


def measure(device: Any, ranks: int | None = None, seconds: float = 20.0) -> list[Row]:
    """A row per case with microseconds per call. Needs two GPUs."""
    return launched("measure", ranks, seconds)


def launched(mode: str, ranks: int | None, seconds: float) -> list[Row]:
    """The rows that rank 0 printed, and one for each rank that ended badly."""
    if ranks is None:
        import torch

        ranks = torch.cuda.device_count()
    if ranks < 2:
        return [{"kernel": "all_reduce", "case": mode, "skipped": f"{ranks} GPU"}]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    }
    stores = [os.memfd_create(name) for name in ("store", "process-group")]
    arguments = [mode, str(seconds), str(ranks), *map(str, stores)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(rank), *arguments],
            pass_fds=stores,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    deadline = time.monotonic() + seconds + STARTING_S
    rows: list[Row] = []
    outputs: list[str] = []
    try:
        for process in processes:
            try:
                outputs.append(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                break
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        text = outputs[rank] if rank < len(outputs) else process.communicate()[0]
        said = []
        for line in text.splitlines():
            if line.startswith("ROW "):
                rows.append(json.loads(line[4:]))
            else:
                said.append(line)
        if process.returncode != 0 or said:
            ended = {"ok": False, "error": f"exit code {process.returncode}"} if process.returncode else {}
            rows.append({"kernel": "all_reduce", "case": f"{mode}: rank {rank}"} | ended | {"said": said[-30:]})
    for store in stores:
        os.close(store)
    return rows


class Ranked:
    """What one rank does."""

    def __init__(self, rank: int, mode: str, seconds: float, ranks: int, store_fd: int, group_fd: int) -> None:
        import torch

        from zmqexec.worker.gpu.nccl import NcclCollectives

        self.torch = torch
        self.rank, self.ranks, self.mode, self.group_fd = rank, ranks, mode, group_fd
        self.started = time.monotonic()
        self.seconds = seconds
        self.collectives = NcclCollectives(rank, ranks, store_fd, 5.0, join_timeout_s=30.0)
        self.device = torch.device(NcclCollectives.device_type, rank)
        self.report({"case": "start-up", "seconds": round(time.monotonic() - self.started, 2)})

    def run(self) -> None:
        if self.collectives.one_shot is None:
            self.report({"case": "start-up", "ok": False, "error": "one-shot is not used; rank 0 says why"})
        if self.mode == "check":
            self.guarded("random calls", self.check_random_calls)
            self.guarded("replays", self.check_replays)
            self.guarded("a rank that does not come", self.check_absence)
        else:
            self.measure_sizes()
        started = time.monotonic()
        self.collectives.close()
        self.report({"case": "close", "seconds": round(time.monotonic() - started, 2)})

    def report(self, row: Row) -> None:
        if self.rank == 0:
            print("ROW " + json.dumps({"kernel": "all_reduce", "ranks": self.ranks} | row), flush=True)

    def guarded(self, case: str, function: Callable[[], Row]) -> Row:
        """Reports a row also where the case fails. What fails on one rank alone ends at the others' deadlines."""
        try:
            row = function()
        except Exception as error:
            traceback.print_exc()
            row = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            if self.rank:
                print(row, flush=True)
        self.report({"case": case} | row)
        return row

    def all_agree(self, ok: bool) -> bool:
        """Whether it holds on every rank."""
        flag = self.torch.tensor([int(ok)], dtype=self.torch.int32, device=self.device)
        return bool(self.collectives.all_gather(flag).min().item())

    def captured(self, function: Callable[[], Any]) -> Callable[[], None]:
        """A CUDA graph of it, run once before. It keeps what `function` refers to.

        A graph knows addresses alone. A tensor that nobody else keeps would be freed, and its memory given to the next
        one, while every replay still writes there.
        """
        torch = self.torch
        function()
        torch.cuda.synchronize()
        if self.device.type == "cpu":
            return function
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
            function()

        def replay(kept: Callable[[], Any] = function) -> None:
            graph.replay()

        return replay

    # ── correctness ─────────────────────────────────────────────────────────────────────────────────────────────────

    def check_random_calls(self) -> Row:
        """Sums, residuals and norms over sizes, dtypes and both protocols, against float32 sums in rank order."""
        torch, one_shot = self.torch, self.collectives.one_shot
        assert one_shot is not None
        from zmqexec.worker.kernels import reference

        chosen = random.Random(0)
        wrong: list[Row] = []
        num_calls = 0
        while num_calls < RANDOM_CALLS:  # the same number on every rank
            num_calls += 1
            rows, cols = chosen.choice([1, 1, 2, 3, 8, 33, 97]), chosen.choice([1, 7, 64, 100, 1000, 4096, 5120, 8192])
            dtype = chosen.choice([torch.bfloat16, torch.float16, torch.float32])
            kind, protocol = chosen.choice(["sum", "residual", "norm"]), chosen.randrange(2)
            generator = torch.Generator(self.device).manual_seed(num_calls)
            make = {"generator": generator, "device": self.device}
            parts = [torch.randn(rows, cols, **make).to(dtype) for _ in range(self.ranks)]
            hidden, weight = torch.randn(rows, cols, **make).to(dtype), torch.randn(cols, **make).to(dtype)
            if not one_shot.takes(parts[0], by_rows=True):
                continue
            total = parts[0].float()
            for part in parts[1:]:
                total = total + part.float()
            summed = (total + hidden.float()).to(dtype)
            own = parts[self.rank].clone()
            if kind == "sum":
                one_shot.all_reduce(own, own, protocol=protocol)
                ok = torch.equal(own, total.to(dtype))
            elif kind == "residual":
                one_shot.all_reduce_residual_(hidden, own, protocol=protocol)
                ok = torch.equal(hidden, summed)
            else:
                out = one_shot.all_reduce_residual_norm(hidden, own, weight, EPS, protocol=protocol)
                expected = reference.rms_norm(summed, weight, EPS)
                ok = torch.equal(hidden, summed) and torch.allclose(
                    out.float(), expected.float(), rtol=4 * torch.finfo(dtype).eps, atol=1e-5
                )
                same = self.collectives.all_gather(out)
                ok = ok and bool((same == same[0]).all())
            if not ok:
                wrong.append({"rows": rows, "cols": cols, "dtype": str(dtype), "kind": kind, "protocol": protocol})
        ok = self.all_agree(not wrong)
        return {"ok": ok, "calls": num_calls, "wrong": wrong[:5], "health": self.collectives.health()}

    def check_replays(self) -> Row:
        """Graphs of 1, 3 and 5 calls in a random order, each call's input made from the last one's sum.

        On every element, x becomes (3 · sum of all ranks' x + a number of the rank's) modulo MODULUS, in float32
        without rounding. One stale word at one rank leaves this path and never comes back. The path depends on how
        often each graph was replayed alone, and a table of the map, squared again and again, gives its end. It is
        compared after every round; the first one that is wrong is the last, and each rank says what it found.
        """
        torch, one_shot = self.torch, self.collectives.one_shot
        assert one_shot is not None
        shapes = [
            (1, 2000, [(WORDS, "sum")]),
            (8, COLS, [(WORDS, "sum"), (FLAGS, "residual"), (WORDS, "residual")]),
            (1, 300, [(FLAGS, "sum"), (WORDS, "sum"), (FLAGS, "sum"), (FLAGS, "sum"), (WORDS, "sum")]),
        ]
        states = []
        graphs = []
        wrong: list[Row] = []
        for rows, cols, kinds in shapes:
            x = (torch.arange(rows * cols, device=self.device) % MODULUS).float().view(rows, cols)
            total = torch.zeros_like(x)
            own_number = torch.full_like(x, self.rank * 7 + 1)
            states.append(x)

            def calls(
                x: Any = x, total: Any = total, own_number: Any = own_number, kinds: list[tuple[int, str]] = kinds
            ) -> None:
                for protocol, kind in kinds:
                    if kind == "sum":
                        one_shot.all_reduce(x, total, protocol=protocol)
                    else:
                        total.zero_()
                        one_shot.all_reduce_residual_(total, x, protocol=protocol)
                    torch.remainder(torch.add(own_number, total, alpha=3), MODULUS, out=x)

            graphs.append(self.captured(calls))  # has run once
        replays = [1] * len(shapes)
        chosen, own = random.Random(1), random.Random(self.rank)
        begin = time.monotonic()
        while sum(replays) < REPLAYS:
            for _ in range(REPLAYS_PER_ROUND):
                graph = chosen.randrange(3)
                graphs[graph]()
                replays[graph] += 1
                if own.random() < 0.0005:
                    time.sleep(own.random() * 0.002)
            torch.cuda.synchronize()
            if self.collectives.health() is not None:
                break
            steps = [times * len(kinds) for (_, _, kinds), times in zip(shapes, replays, strict=True)]
            wrong = self.wrong_states(states, steps)
            if not self.all_agree(not wrong and time.monotonic() - self.started < self.seconds):
                break
        seconds = time.monotonic() - begin
        ok = self.all_agree(not wrong and self.collectives.health() is None)
        num_calls = sum(times * len(kinds) for (_, _, kinds), times in zip(shapes, replays, strict=True))
        row = {"ok": ok, "replays": sum(replays), "calls": num_calls, "seconds": round(seconds, 1)}
        if wrong and self.rank:  # rank 0's are in the row
            print({"replays": sum(replays), "wrong graphs": wrong}, flush=True)
        return row | {"wrong graphs": wrong, "health": self.collectives.health()}

    def wrong_states(self, states: list[Any], steps: list[int]) -> list[Row]:
        """A row for each graph whose state is not what so many calls make of it: where, and what is there instead."""
        rows = []
        for number, (x, done) in enumerate(zip(states, steps, strict=True)):
            expected = self.expected(x, done)
            if self.torch.equal(x, expected):
                continue
            found, right = x.flatten().tolist(), expected.flatten().tolist()
            differing = [index for index, value in enumerate(found) if value != right[index]]
            some = [{"element": index, "is": found[index], "should be": right[index]} for index in differing[:4]]
            rows.append({"graph": number, "calls": done, "elements": len(differing), "of": len(found), "first": some})
        return rows

    def expected(self, x: Any, steps: int) -> Any:
        """This rank's state after `steps` calls."""
        torch = self.torch
        sums = torch.arange(self.ranks * MODULUS)
        step = sum((3 * sums + 7 * rank + 1) % MODULUS for rank in range(self.ranks))
        # The sum that call number `steps` sees: `steps - 1` of the map after the first.
        power, table = steps - 1, sums.clone()
        while power:
            if power % 2:
                table = step[table]
            step = step[step]
            power //= 2
        first = self.ranks * (torch.arange(x.numel()) % MODULUS)
        return ((3 * table[first] + 7 * self.rank + 1) % MODULUS).float().view(x.shape).to(x.device)

    def check_absence(self) -> Row:
        """The last rank leaves a call out. The others end in time and name it; then nothing works any more."""
        torch, one_shot = self.torch, self.collectives.one_shot
        assert one_shot is not None
        one_shot.set_timeout(0.5)
        self.all_agree(True)
        x = torch.ones(1000, device=self.device)
        started = time.monotonic()
        if self.rank != self.ranks - 1:
            one_shot.all_reduce(x, x)
            one_shot.all_reduce(x, x)
        torch.cuda.synchronize()
        seconds = time.monotonic() - started
        health = self.collectives.health() or ""
        ok = health.startswith(f"rank {self.ranks - 1} did not join") if self.rank != self.ranks - 1 else not health
        if self.device.type != "cpu":
            ok = ok and seconds < 2.0
        return {"ok": self.all_agree(ok), "health": health, "seconds": round(seconds, 3)}

    # ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def measure_sizes(self) -> None:
        torch, collectives, one_shot = self.torch, self.collectives, self.collectives.one_shot
        for kib in SIZES_KIB:
            if not self.all_agree(time.monotonic() - self.started < self.seconds):
                break
            rows = kib * KIB // (2 * COLS)
            x = torch.zeros(rows, COLS, dtype=torch.bfloat16, device=self.device)
            hidden, weight = torch.zeros_like(x), torch.ones(COLS, dtype=torch.bfloat16, device=self.device)

            cases: dict[str, Callable[[], Any]] = {"NCCL": lambda x=x: collectives.nccl_all_reduce_(x)}

            def nccl_norm(x: Any = x, hidden: Any = hidden, weight: Any = weight) -> None:
                collectives.nccl_all_reduce_(x)
                self.residual_norm(hidden, x, weight)

            cases["NCCL, then residual and norm"] = nccl_norm
            if one_shot is not None and one_shot.takes(x, by_rows=True):
                for protocol, name in enumerate(("words", "flags")):
                    for threads in (64, 128, 256, 512) if protocol == 0 else (128, 256):

                        def plain(x: Any = x, protocol: int = protocol, threads: int = threads) -> None:
                            one_shot.all_reduce(x, x, protocol=protocol, threads=threads)

                        cases[f"one-shot, {name}, {threads} threads"] = plain

                    def residual(x: Any = x, hidden: Any = hidden, protocol: int = protocol) -> None:
                        one_shot.all_reduce_residual_(hidden, x, protocol=protocol)

                    def norm(x: Any = x, hidden: Any = hidden, weight: Any = weight, protocol: int = protocol) -> None:
                        one_shot.all_reduce_residual_norm(hidden, x, weight, EPS, protocol=protocol)

                    cases[f"one-shot, {name}, residual"] = residual
                    cases[f"one-shot, {name}, residual and norm"] = norm

                def split(x: Any = x, hidden: Any = hidden, weight: Any = weight) -> None:
                    one_shot.all_reduce(x, x)
                    self.residual_norm(hidden, x, weight)

                cases["one-shot, words, then residual and norm"] = split
            for name, function in cases.items():

                def timed(function: Callable[[], Any] = function) -> Row:
                    return {"us": self.us_per_call(function)}

                self.guarded(f"{kib} KiB: {name}", timed)
        self.report({"case": "health", "ok": collectives.health() is None, "health": collectives.health()})
        # Last, for it is the one thing here that might hang.
        symmetric = self.symmetric_memory()
        for kib in SIZES_KIB if symmetric is not None else ():
            count = kib * KIB // 2

            def timed(count: int = count) -> Row:
                return {"us": self.us_per_call(lambda: symmetric(count))}

            self.guarded(f"{kib} KiB: torch symmetric memory, one-shot", timed)

    def residual_norm(self, hidden: Any, x: Any, weight: Any) -> None:
        """hidden += x and its norm, by our own kernel."""
        from zmqexec import _cuda

        torch = self.torch
        out = torch.empty_like(hidden)
        rows, cols = x.shape
        addresses = (out.data_ptr(), hidden.data_ptr(), x.data_ptr(), weight.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream
        _cuda.rms_norm(*addresses, rows, cols, cols, EPS, _cuda.BFLOAT16, stream, True)

    def us_per_call(self, function: Callable[[], Any]) -> float:
        """The median of 15 replays of a graph of GRAPH_CALLS calls."""
        torch = self.torch

        def calls() -> None:
            for _ in range(GRAPH_CALLS):
                function()

        function()
        replay = self.captured(calls)
        for _ in range(3):
            replay()
        self.all_agree(True)
        if self.device.type == "cpu":
            return 0.0
        times = []
        for _ in range(15):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000 / GRAPH_CALLS)
        return round(statistics.median(times), 2)

    def symmetric_memory(self) -> Callable[[int], Any] | None:
        """torch.ops.symm_mem.one_shot_all_reduce of n bfloat16, where it works."""
        torch = self.torch
        try:
            import torch.distributed as dist
            import torch.distributed._symmetric_memory as symm_mem

            store = dist.FileStore(f"/proc/self/fd/{self.group_fd}", self.ranks)
            dist.init_process_group("nccl", store=store, rank=self.rank, world_size=self.ranks, device_id=self.device)
            buffer = symm_mem.empty(512 * KIB, dtype=torch.bfloat16, device=self.device)
            group = dist.group.WORLD.group_name
            symm_mem.rendezvous(buffer, group)
            buffer.zero_()

            def all_reduce(count: int) -> Any:
                return torch.ops.symm_mem.one_shot_all_reduce(buffer[:count], "sum", group)

            all_reduce(8)
            torch.cuda.synchronize()
        except Exception as error:
            self.report({"case": "torch symmetric memory", "error": f"{type(error).__name__}: {error}"})
            return None
        return all_reduce


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rank", nargs=6, metavar=("RANK", "MODE", "SECONDS", "RANKS", "FD", "FD"), help="internal")
    options = parser.parse_args()
    if options.rank is not None:
        rank, mode, seconds, *numbers = options.rank
        Ranked(int(rank), mode, float(seconds), *map(int, numbers)).run()
        sys.stdout.flush()
        os._exit(0)
    rows: list[Row] = []
    if options.check or not options.measure:
        rows += check(None, options.ranks, options.seconds)
    if options.measure or not options.check:
        rows += measure(None, options.ranks, options.seconds)
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
