"""Does csrc/cuda/skinny_gemm.cu compute what it should on this GPU, and how near to the memory's speed does it come?

    python bench/gpu_kernels/skinny_gemm.py [--check] [--measure] > result.json

Times are of CUDA graphs. Every launch of a graph reads another copy of its matrix, so that L2 never holds it. Beside
each matrix: torch.mm (cuBLAS) in a graph of the same kind, and the time of its bytes at this GPU's copy bandwidth.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from zmqexec.worker.kernels import reference
from zmqexec.worker.kernels import skinny_gemm as sg
from zmqexec.worker.kernels.skinny_gemm import Tuning

HIDDEN, INNER, HEADS, HEAD_DIM, VOCAB, LAYERS = 4096, 11008, 32, 128, 32000, 32
ROTATED_BYTES = 512 << 20
CHAIN_BYTES = 2 << 30
"""The layers of a chain share as many sets of weights as fit here: far more than L2 keeps."""
EPS = 1e-5


def matrices(tp: int) -> dict[str, tuple[int, int]]:
    """Llama-2-7B's, [out, in] of one rank."""
    return {
        "qkv": (3 * HIDDEN // tp, HIDDEN),
        "o": (HIDDEN, HIDDEN // tp),
        "gate_up": (2 * INNER // tp, HIDDEN),
        "down": (HIDDEN, INNER // tp),
        "lm_head": (VOCAB // tp, HIDDEN),
    }


Row = dict[str, Any]


def guarded(rows: list[Row], case: Row, function: Callable[[], Row]) -> None:
    """One case's row; what goes wrong is a row, too."""
    try:
        rows.append(case | function())
    except Exception as error:
        traceback.print_exc()
        rows.append(case | {"ok": False, "error": f"{type(error).__name__}: {error}"})


# Correctness


def check(device: torch.device) -> list[Row]:
    """A row per case with `ok` and the largest error, relative to the largest result."""
    rows: list[Row] = []
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        values = (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)
        torch.cuda.synchronize()  # weights may be read before the kernel just before has ended
        return values

    def compared(out: torch.Tensor, expected: torch.Tensor, ulps: float = 4) -> Row:
        error = float((out.float() - expected.float()).abs().max() / expected.float().abs().max())
        bound = ulps * torch.finfo(expected.dtype).eps
        return {"ok": error <= bound, "error": error, "bound": bound}

    def linear(m: int, n: int, k: int, dtype: torch.dtype, tuning: Tuning) -> Row:
        x, weight, bias = random(m, k, dtype=dtype), random(n, k, dtype=dtype, scale=k**-0.5), random(n, dtype=dtype)
        out = sg.linear(x, weight, bias, tuning=tuning)
        return compared(out, (x.float() @ weight.float().T + bias.float()).to(dtype))

    shapes = [shape for tp in (1, 2, 4) for shape in matrices(tp).values()]
    shapes += [(1, 8), (7, 64), (100, 520), (4096, 1032), (33, 4104), (28672, 8192), (8192, 28672), (5120, 13824)]
    for n, k in shapes:
        for m in (1, 2, 5, 8, 11, 16, 32):
            case = {"check": "linear", "m": m, "n": n, "k": k}
            guarded(rows, case, lambda m=m, n=n, k=k: linear(m, n, k, torch.bfloat16, Tuning()))
    for m in (1, 4, 8):
        for dtype in (torch.bfloat16, torch.float16):
            for tuning in [Tuning(stages=s, x_mode=x) for s in (1, 2, 3, 4) for x in (1, 2)] + [Tuning(pdl=False)]:
                case = {"check": "tuning", "m": m, "dtype": str(dtype), "tuning": str(tuning)}
                guarded(rows, case, lambda m=m, dtype=dtype, tuning=tuning: linear(m, 1000, 3072, dtype, tuning))

    def epilogues(m: int) -> list[tuple[str, Callable[[], Row]]]:
        x = random(m, HIDDEN)
        wide_x = x.float()

        def wide() -> Row:
            weight = random(1000, HIDDEN, scale=HIDDEN**-0.5)
            out = sg.linear(x, weight, out_dtype=torch.float32)
            error = float((out - wide_x @ weight.float().T).abs().max())
            return {"ok": error < 0.02, "error": error, "bound": 0.02}

        def residual() -> Row:
            weight, before = random(HIDDEN, HIDDEN, scale=HIDDEN**-0.5), random(m, HIDDEN)
            expected = (before.float() + wide_x @ weight.float().T).bfloat16()
            return compared(sg.linear_residual_(before, x, weight), expected)

        def silu() -> Row:
            weight = random(2 * INNER, HIDDEN, scale=HIDDEN**-0.5)
            expected = reference.silu_mul((wide_x @ weight.float().T).bfloat16())
            return compared(sg.linear_silu_mul(x, weight), expected, 8)

        def rope() -> Row:
            heads, kv_heads, block_size = HEADS, HEADS // 4, 16
            weight = random((heads + 2 * kv_heads) * HEAD_DIM, HIDDEN, scale=HIDDEN**-0.5)
            cache = torch.full((m + 1, 2, kv_heads, block_size, HEAD_DIM), torch.nan, device=device).bfloat16()
            slots = torch.arange(m, device=device) * block_size + 5
            angles = torch.randn(2048, HEAD_DIM // 2, generator=generator, device=device)
            positions = torch.randint(0, 2048, (m,), generator=generator, device=device)
            out = sg.qkv_rope_write(
                x,
                weight,
                None,
                cache,
                slots.int(),
                positions.int(),
                angles.cos(),
                angles.sin(),
                num_heads=heads,
            )
            expected = (wide_x @ weight.float().T).bfloat16().view(m, -1, HEAD_DIM)
            reference.rope_(expected[:, : heads + kv_heads], angles[positions].cos(), angles[positions].sin())
            stored = cache[:m, :, :, 5].flatten(1, 2)
            written = int((~cache.isnan()).sum()) == stored.numel()
            row = compared(torch.cat([out, stored], 1), expected)
            return row | {"ok": row["ok"] and written}

        return [("float32", wide), ("residual", residual), ("silu_mul", silu), ("rope_write", rope)]

    for m in (1, 3, 8, 16, 32):
        for name, function in epilogues(m):
            guarded(rows, {"check": name, "m": m}, function)

    def same_bits(n: int, k: int) -> Row:
        x, weight = random(32, k), random(n, k, scale=k**-0.5)
        whole = sg.linear(x, weight)
        parts = [(0, 1), (7, 8), (3, 5), (8, 16), (9, 25), (0, 31)]
        tunings = (Tuning(), Tuning(blocks=50, stages=2, x_mode=2))
        return {
            "ok": all(
                torch.equal(sg.linear(x[a:b], weight, tuning=tuning), whole[a:b])
                for a, b in parts
                for tuning in tunings
            )
        }

    for n, k in [matrices(1)["qkv"], matrices(4)["down"]]:
        guarded(rows, {"check": "same bits for every m", "n": n, "k": k}, lambda n=n, k=k: same_bits(n, k))

    for tp in (1, 4):
        for m in (1, 8):

            def chained(tp: int = tp, m: int = m) -> Row:
                """A read before the predecessor's write would show as another result."""
                results = []
                for tuning in (Tuning(pdl=False), Tuning(), Tuning(stages=4)):
                    chain = Chain(device, tp, m, num_layers=8, seed=5)
                    graph = captured(lambda chain=chain, tuning=tuning: chain.run(tuning))
                    for _ in range(5):
                        chain.reset()
                        graph.replay()
                    torch.cuda.synchronize()
                    results.append((chain.hidden.clone(), chain.cache.clone()))
                same = all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
                return {"ok": same and bool(results[0][0].isfinite().all())}

            guarded(rows, {"check": "chain with and without PDL", "tp": tp, "m": m}, chained)
    return rows


# Times


def captured(function: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph


def graph_us(function: Callable[[], None], replays: int = 10) -> float:
    """Of one replay, the best of three runs of them."""
    graph = captured(function)
    graph.replay()
    times = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / replays)
    return min(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(51)]
    for mark in marks:  # not in a graph: there, a copy reaches 2.8 TB/s on an H200, where this one reaches 4.3
        mark.record()
        target.copy_(source)
    torch.cuda.synchronize()
    return 2 * source.numel() / min(begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)) * 1e3


class Chain:
    """Layers of a decode step without their attention: what follows one another is what would, in sizes and data."""

    def __init__(self, device: torch.device, tp: int, m: int, *, num_layers: int = LAYERS, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.empty(*shape, dtype=torch.bfloat16, device=device).normal_(0, scale, generator=generator)

        shapes = {name: shape for name, shape in matrices(tp).items() if name != "lm_head"}
        self.layer_bytes = sum(2 * n * k for n, k in shapes.values())
        sets = max(1, min(num_layers, CHAIN_BYTES // self.layer_bytes))
        weights = [{name: random(n, k, scale=k**-0.5) for name, (n, k) in shapes.items()} for _ in range(sets)]
        self.layers = [weights[i % sets] for i in range(num_layers)]
        self.norm_weight = random(HIDDEN)
        self.num_heads = HEADS // tp
        self.start = random(m, HIDDEN)
        self.hidden = self.start.clone()
        self.normed = self.start.clone()
        self.query = random(m, self.num_heads, HEAD_DIM)
        self.inner = random(m, INNER // tp)
        self.cache = random(m, 2, self.num_heads, 16, HEAD_DIM)
        self.slots = torch.arange(m, dtype=torch.int32, device=device) * 16
        self.positions = torch.arange(m, dtype=torch.int32, device=device)
        angles = torch.randn(max(64, m), HEAD_DIM // 2, generator=generator, device=device)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.mm_out = {name: random(m, n) for name, (n, _) in shapes.items()}

    def reset(self) -> None:
        self.hidden.copy_(self.start)

    def run(self, tuning: Tuning) -> None:
        for weights in self.layers:
            self.rms_norm(tuning.pdl)
            sg.qkv_rope_write(
                *(self.normed, weights["qkv"], None, self.cache, self.slots, self.positions, self.cos, self.sin),
                num_heads=self.num_heads,
                out=self.query,
                tuning=tuning,
            )
            sg.linear_residual_(self.hidden, self.query.flatten(1), weights["o"], tuning=tuning)
            self.rms_norm(tuning.pdl)
            sg.linear_silu_mul(self.normed, weights["gate_up"], out=self.inner, tuning=tuning)
            sg.linear_residual_(self.hidden, self.inner, weights["down"], tuning=tuning)

    def rms_norm(self, pdl: bool, of: torch.Tensor | None = None) -> None:
        """Of the hidden state, after `of` was added to it."""
        module = importlib.import_module("zmqexec._cuda")
        rows, cols = self.hidden.shape
        tensors = (self.normed, None, self.hidden) if of is None else (self.normed, self.hidden, of)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*tensors, self.norm_weight)]
        stream = torch.cuda.current_stream().cuda_stream
        module.rms_norm(*addresses, rows, cols, cols, EPS, module.BFLOAT16, stream, pdl)

    def run_mm(self) -> None:
        """The products alone, by cuBLAS."""
        for weights in self.layers:
            torch.mm(self.hidden, weights["qkv"].T, out=self.mm_out["qkv"])
            torch.mm(self.query.flatten(1), weights["o"].T, out=self.mm_out["o"])
            torch.mm(self.hidden, weights["gate_up"].T, out=self.mm_out["gate_up"])
            torch.mm(self.inner, weights["down"].T, out=self.mm_out["down"])


CHAIN_TUNINGS = {
    "default": Tuning(),
    "no PDL": Tuning(pdl=False),
    "2 stages": Tuning(stages=2),
    "4 stages": Tuning(stages=4),
    "x resident": Tuning(x_mode=1),
    "x streamed": Tuning(x_mode=2),
    "x streamed, 2 stages": Tuning(x_mode=2, stages=2),
}


def measure(device: torch.device) -> list[Row]:
    """Microseconds and GB/s (weights only) per launch, then per layer of a chain."""
    bandwidth = copy_bandwidth(device)
    rows: list[Row] = [{"measure": "copy", "device": torch.cuda.get_device_name(device), "gb_s": bandwidth / 1e9}]
    pool = torch.empty(ROTATED_BYTES // 2, dtype=torch.bfloat16, device=device).normal_(0, 0.02)

    def single(n: int, k: int, m: int, *, wide: bool, tuning: Tuning | None) -> Row:
        copies = max(1, min(40, pool.numel() // (n * k)))
        weights = [pool[i * n * k : (i + 1) * n * k].view(n, k) for i in range(copies)]
        x = torch.randn(m, k, device=device).bfloat16()
        out = torch.empty(m, n, device=device, dtype=torch.float32 if wide and tuning else torch.bfloat16)

        def run() -> None:
            for weight in weights:
                if tuning is None:
                    torch.mm(x, weight.T, out=out)
                else:
                    sg.linear(x, weight, out=out, tuning=tuning)

        us = graph_us(run) / copies
        row: Row = {"us": us, "gb_s": 2 * n * k / us / 1e3, "floor_us": 2 * n * k / bandwidth * 1e6}
        if tuning is not None and device.type == "cuda":
            module = importlib.import_module("zmqexec._cuda")
            plan = module.skinny_gemm_plan(m, n, k, module.device_info(device.index or 0)[0], 0, 0)
            row |= dict(zip(("stages", "x_streamed", "shared_bytes"), plan, strict=False))
        return row

    for tp in (1, 2, 4):
        for name, (n, k) in matrices(tp).items():
            for m in (1, 2, 4, 8, 16, 32) if tp == 1 else (1, 8, 32):
                for peer, tuning in (("cublas", None), ("pdl", Tuning()), ("no pdl", Tuning(pdl=False))):
                    case = {"measure": "matrix", "tp": tp, "matrix": name, "m": m, "by": peer}
                    wide = name == "lm_head"
                    guarded(rows, case, lambda n=n, k=k, m=m, w=wide, t=tuning: single(n, k, m, wide=w, tuning=t))
    pool = pool.new_empty(0)
    for tp in (1, 2, 4):
        for m in (1, 8) if tp > 1 else (1, 2, 4, 8, 16):
            chain = Chain(device, tp, m)
            floor_us = chain.layer_bytes / bandwidth * 1e6

            def per_layer(run: Callable[[], None], chain: Chain = chain, floor_us: float = floor_us) -> Row:
                us = graph_us(run, replays=3) / len(chain.layers)
                chain.reset()
                return {"us_per_layer": us, "floor_us": floor_us, "of_copy_bandwidth": floor_us / us}

            case = {"measure": "chain", "tp": tp, "m": m}
            guarded(rows, case | {"by": "cublas"}, lambda chain=chain: per_layer(chain.run_mm))
            for name, tuning in CHAIN_TUNINGS.items():
                guarded(
                    rows,
                    case | {"by": name},
                    lambda chain=chain, tuning=tuning: per_layer(lambda: chain.run(tuning)),
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measure", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    result = {}
    if arguments.check or not arguments.measure:
        result["check"] = check(device)
        wrong = [row for row in result["check"] if not row["ok"]]
        print(f"{len(result['check'])} checks, {len(wrong)} wrong", *wrong[:20], sep="\n", file=sys.stderr)
    if arguments.measure or not arguments.check:
        result["measure"] = measure(device)
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
