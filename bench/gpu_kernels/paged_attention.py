"""Does csrc/cuda/paged_attention.cu compute what it should on this GPU, and how near to the memory's speed is it?

    python bench/gpu_kernels/paged_attention.py [--check] [--measure] [--variants] > result.json

Times are of CUDA graphs. `cold`: the launches of a graph read as many different caches as take 512 MB, or the L2 is
overwritten before each graph; `warm`: all read one. GB/s are of keys and values, beside the speed of a copy (bytes read
and written). Peer: FlashAttention-3 over the same pages where it can be imported, else torch's scaled_dot_product_
attention over contiguous keys and values.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from zmqexec.worker.kernels import native, reference
from zmqexec.worker.kernels.paged_attention import AttentionWorkspace, choose_launch

ROTATED_BYTES = 512 << 20
FLUSHED_BYTES = 256 << 20
SETTLE_S = 0.3
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}

Row = dict[str, Any]


def guarded(rows: list[Row], case: Row, function: Callable[[], Row]) -> None:
    """One case's row; what goes wrong is a row, too."""
    try:
        rows.append(case | function())
    except Exception as error:
        traceback.print_exc()
        rows.append(case | {"ok": False, "error": f"{type(error).__name__}: {error}"})


# Correctness


class Batch:
    """Rows over a cache in which all that must not be read is NaN."""

    def __init__(
        self,
        device: torch.device,
        contexts: list[int],
        query_lens: list[int],
        *,
        num_kv_heads: int,
        group: int,
        head_dim: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        window: int = 0,
        softcap: float = 0.0,
        alibi: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        on_device = torch.Generator(device).manual_seed(seed)
        num_heads = num_kv_heads * group
        counts = [-(-context // block_size) for context in contexts]
        numbers = torch.randperm(sum(counts) + 3, generator=generator)
        shape = (len(numbers), 2, num_kv_heads, block_size, head_dim)
        cache = torch.randn(shape, generator=on_device, device=device).to(dtype)
        written = torch.zeros((len(numbers), block_size), dtype=torch.bool)
        tables = torch.full((len(contexts), max(counts) + 1), -(1 << 20), dtype=torch.int32)
        used = 0
        for row, (context, count) in enumerate(zip(contexts, counts, strict=True)):
            oldest = max(0, context - query_lens[row] + 1 - window) // block_size if window else 0
            tables[row, oldest:count] = numbers[used + oldest : used + count]
            tokens = torch.arange(oldest * block_size, context)
            written[numbers[used + tokens // block_size], tokens % block_size] = True
            used += count
        cache.masked_fill_(~written.to(device).view(len(numbers), 1, 1, block_size, 1), torch.nan)
        packed = torch.randn((sum(query_lens), num_heads * head_dim + 64), generator=on_device, device=device).to(dtype)
        self.contexts, self.query_lens, self.window, self.softcap = contexts, query_lens, window, softcap
        self.num_kv_heads, self.group, self.head_dim = num_kv_heads, group, head_dim
        self.scale = head_dim**-0.5
        self.query = packed[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
        self.cache, self.tables = cache, tables.to(device)
        self.context_lens = torch.tensor(contexts, dtype=torch.int32, device=device)
        self.starts = torch.tensor([0, *query_lens], device=device).cumsum(0, dtype=torch.int32)
        self.slopes = 2.0 ** -torch.linspace(1, 8, num_heads, device=device) if alibi else None

    def workspace(self, **options: Any) -> AttentionWorkspace:
        return AttentionWorkspace(
            self.cache.device,
            max_rows=len(self.contexts),
            num_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_context_len=max(self.contexts),
            max_query_len=max(self.query_lens),
            window=self.window,
            **options,
        )

    def attend(self, workspace: AttentionWorkspace, query: torch.Tensor, *, pdl: bool = True) -> torch.Tensor:
        out = torch.full(query.shape, torch.nan, dtype=query.dtype, device=query.device)
        options: Row = {"scale": self.scale, "softcap": self.softcap, "alibi_slopes": self.slopes, "pdl": pdl}
        workspace.attend(out, query, self.cache, self.tables, **options)
        return out

    def check(self, **options: Any) -> Row:
        workspace = self.workspace(**options)
        workspace.plan(self.context_lens, None, self.starts)
        outs = [self.attend(workspace, self.query) for _ in range(3)]
        expected = reference.paged_attention(
            self.query,
            self.cache,
            self.tables,
            self.context_lens,
            None,
            self.starts,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            alibi_slopes=self.slopes,
        )
        error, again = 0.0, all(torch.equal(outs[0].view(torch.int16), out.view(torch.int16)) for out in outs)
        untouched = True
        for (begin, end), context in zip(itertools.pairwise(self.starts.tolist()), self.contexts, strict=True):
            if context == 0:
                untouched = untouched and bool(outs[0][begin:end].isnan().all())
                continue
            wrong = (outs[0][begin:end].float() - expected[begin:end]).abs().max() / expected[begin:end].abs().max()
            error = max(error, float(wrong)) if wrong.isfinite() else torch.inf
        bound = TOLERANCE[self.query.dtype]
        return {"ok": error <= bound and again and untouched, "error": error, "bound": bound, "same_again": again}


def check(device: torch.device) -> list[Row]:
    """A row per case with `ok` and the largest error, relative to the largest value of its row of the batch."""
    rows: list[Row] = []
    generator = torch.Generator().manual_seed(0)

    def lens(count: int, most: int) -> list[int]:
        edges = torch.tensor([1, 15, 16, 17, 0, 32, 48, 255, 256, 257])
        drawn = torch.randint(1, most, (count,), generator=generator)
        picked = torch.rand(count, generator=generator) < 0.3
        choice = edges[torch.randint(0, len(edges), (count,), generator=generator)]
        return torch.where(picked, choice, drawn).tolist()

    for seed, (head_dim, group, dtype) in enumerate(
        itertools.product((64, 80, 96, 128, 256), (1, 4, 7, 16, 20), (torch.bfloat16, torch.float16))
    ):
        count = (1, 3, 17, 60)[seed % 4]
        query_lens = [1] * count if seed % 3 else torch.randint(1, 6, (count,), generator=generator).tolist()
        contexts = [0 if c == 0 else max(c, n) for c, n in zip(lens(count, 1500), query_lens, strict=True)]
        contexts[0] = max(contexts[0], query_lens[0])
        shape: Row = {"num_kv_heads": (2, 1, 8)[seed % 3], "group": group, "head_dim": head_dim, "dtype": dtype}
        shape |= {"block_size": (16, 32, 48)[seed % 3], "window": (0, 0, 100)[seed % 3]}
        shape |= {"softcap": (0.0, 0.0, 20.0)[seed % 3], "alibi": seed % 4 == 1, "seed": seed}
        options: Row = {"fixed_split_tokens": 256 if seed % 5 == 0 else 0}
        case = {"check": "any batch", "rows": count, **shape, **options, "dtype": str(dtype)}
        guarded(
            rows,
            case,
            lambda contexts=contexts, query_lens=query_lens, shape=shape, options=options: Batch(
                device, contexts, query_lens, **shape
            ).check(**options),
        )
    for variant in (0, 1, 2):
        for num_kv_heads, group in ((8, 4), (32, 1)):
            for contexts in ([5], [1000], [20_000], [300] * 20, [1, 9000, 30, 4000]):
                shape = {"num_kv_heads": num_kv_heads, "group": group, "head_dim": 128}
                case = {"check": "variant", "variant": variant, "contexts": contexts[:4], **shape}
                guarded(
                    rows,
                    case,
                    lambda contexts=contexts, variant=variant, shape=shape: Batch(
                        device, contexts, [1] * len(contexts), **shape
                    ).check(variant=variant),
                )

    def chained() -> Row:
        """Plan and layers that read what the layer before wrote, in one graph: a read before its write would show."""
        batch = Batch(device, [37, 1200, 5000, 1], [1] * 4, num_kv_heads=8, group=4, head_dim=128)
        workspace = batch.workspace()
        results = []
        for pdl in (False, True):
            query = batch.query.contiguous()
            out = torch.empty_like(query)
            context_lens = torch.zeros_like(batch.context_lens)

            def step(query: torch.Tensor = query, lens: torch.Tensor = context_lens, pdl: bool = pdl) -> torch.Tensor:
                lens.copy_(batch.context_lens)
                workspace.plan(lens, pdl=pdl)
                for _ in range(8):
                    query = batch.attend(workspace, query, pdl=pdl)
                return query

            graph = torch.cuda.CUDAGraph()
            step()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                out.copy_(step())
            for _ in range(20):
                graph.replay()
            torch.cuda.synchronize()
            results.append(out)
        return {"ok": torch.equal(*results) and bool(results[0].isfinite().all())}

    guarded(rows, {"check": "chain with and without PDL"}, chained)

    def same_bits() -> Row:
        options: Row = {"num_kv_heads": 8, "group": 4, "head_dim": 128}
        contexts = [3000, 17, 900, 4096, 1]
        whole = Batch(device, contexts, [1] * 5, **options)
        workspace = whole.workspace(fixed_split_tokens=512)
        workspace.plan(whole.context_lens)
        together = whole.attend(workspace, whole.query)
        same = True
        for row in range(5):
            workspace.plan(whole.context_lens[row : row + 1], torch.tensor([row], dtype=torch.int32, device=device))
            same = same and torch.equal(whole.attend(workspace, whole.query[row : row + 1]), together[row : row + 1])
        return {"ok": same}

    guarded(rows, {"check": "fixed splits do not depend on the batch"}, same_bits)
    return rows


# Times


def captured(function: Callable[[], None]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph


def graph_us(function: Callable[[], None], *, replays: int = 5, flush: torch.Tensor | None = None) -> float:
    """Of one replay: the best of some runs, or with `flush` the median of those right after it was written."""
    graph = captured(function)
    graph.replay()
    times = []
    for _ in range(3 if flush is None else 9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if flush is not None:
            flush.zero_()
        start.record()
        for _ in range(replays if flush is None else 1):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (replays if flush is None else 1))
    return min(times) if flush is None else sorted(times)[len(times) // 2]


def copy_gb_per_s(device: torch.device) -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(51)]
    for mark in marks:  # not in a graph: there, a copy reaches 2.8 TB/s on an H200, where this one reaches 4.3
        mark.record()
        target.copy_(source)
    torch.cuda.synchronize()
    best_ms = min(begin.elapsed_time(end) for begin, end in itertools.pairwise(marks))
    return 2 * source.numel() / best_ms / 1e6


class Decode:
    """`num_caches` layers of a decode step, each of its own cache."""

    def __init__(self, device: torch.device, batch: int, context: int, heads: int, kv_heads: int, cold: bool) -> None:
        self.device, self.batch, self.context, self.heads, self.kv_heads = device, batch, context, heads, kv_heads
        self.num_blocks = batch * -(-context // 16)
        self.kv_bytes = batch * context * kv_heads * 128 * 2 * 2
        num_caches = min(32, -(-ROTATED_BYTES // self.kv_bytes)) if cold else 1
        shape = (self.num_blocks, 2, kv_heads, 16, 128)
        self.caches = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(num_caches)]
        self.launches = max(num_caches, 1 if self.kv_bytes > ROTATED_BYTES else 32)
        self.flush = (
            torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
            if cold and num_caches * self.kv_bytes < ROTATED_BYTES
            else None
        )
        self.tables = torch.randperm(self.num_blocks, device=device).to(torch.int32).view(batch, -1)
        self.context_lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.query = torch.randn((batch, heads, 128), dtype=torch.bfloat16, device=device)
        self.out = torch.empty_like(self.query)

    def ours_us(self, **options: Any) -> float:
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        launch = choose_launch(128, self.batch, self.kv_heads, native.module_of(self.device))
        chosen = {"variant": launch.variant, "per_sm": launch.blocks_per_sm, "min_split_tiles": launch.min_split_tiles}
        options = chosen | options
        options["num_blocks"] = sms * options.pop("per_sm")
        workspace = AttentionWorkspace(
            self.device,
            max_rows=self.batch,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=128,
            max_context_len=self.context,
            **options,
        )
        workspace.plan(self.context_lens)

        def layers() -> None:
            for _, cache in zip(range(self.launches), itertools.cycle(self.caches), strict=False):
                workspace.attend(self.out, self.query, cache, self.tables, scale=128**-0.5)

        return graph_us(layers, flush=self.flush) / self.launches

    def peer(self) -> tuple[str, float]:
        """Its name and µs."""
        query = self.query.unsqueeze(1)
        try:
            from flash_attn_interface import flash_attn_with_kvcache  # type: ignore[import-not-found]

            name = "FlashAttention-3, paged"
            pages = [
                tuple(cache[:, i].transpose(1, 2).contiguous() for i in (0, 1)) for cache in self.caches
            ]  # its layout: [pages, 16, kv_heads, 128]

            def call(index: int) -> None:
                keys, values = pages[index]
                options = {"cache_seqlens": self.context_lens, "page_table": self.tables, "causal": True}
                flash_attn_with_kvcache(query, keys, values, **options)

        except Exception:  # absent, or built for another torch
            name = "torch scaled_dot_product_attention, contiguous"
            query = query.transpose(1, 2)
            size = self.batch * self.kv_heads * self.context * 128
            shape = (self.batch, self.kv_heads, self.context, 128)
            # Contiguous keys and values of the same memory: other numbers, as many bytes.
            flat = [cache.view(-1) for cache in self.caches]
            both = [(memory[:size].view(shape), memory[size : 2 * size].view(shape)) for memory in flat]

            def call(index: int) -> None:
                options = {"enable_gqa": self.heads != self.kv_heads}
                torch.nn.functional.scaled_dot_product_attention(query, *both[index], **options)

        def layers() -> None:
            for launch in range(self.launches):
                call(launch % len(self.caches))

        return name, graph_us(layers, flush=self.flush) / self.launches


def free_caches() -> None:
    """Give the last shape's memory back, and wait until it is clean: for a while after gigabytes were freed, kernels
    read a tenth slower (64 × 1024 tokens of 32 KV heads after 64 × 4096: 280 µs at once, 249 a moment later)."""
    torch.cuda.empty_cache()
    time.sleep(SETTLE_S)


SHAPES = [
    # batch, context, heads, KV heads, cold
    (64, 4096, 32, 8, True),
    (64, 4096, 32, 32, True),
    (64, 1024, 32, 32, True),
    (256, 1024, 32, 8, True),
    (8, 4096, 32, 8, True),
    (1, 32768, 32, 8, True),
    (1, 4096, 32, 32, True),
    (64, 4096, 8, 1, True),
    (1, 1024, 32, 8, False),
    (1, 1024, 32, 8, True),
    (1, 1000, 32, 32, True),
    (1, 300, 32, 32, True),
    (1, 100, 32, 32, True),
    (1, 5, 32, 32, True),
    (8, 300, 32, 32, True),
    (128, 600, 32, 32, True),
    (256, 40, 32, 8, True),
]


def measure(device: torch.device) -> list[Row]:
    """Every shape beside its peer, and the plan."""
    rows: list[Row] = []
    copy = copy_gb_per_s(device)
    rows.append({"measure": "copy", "gb_per_s": copy})

    def attention(*shape: Any) -> Row:
        decode = Decode(device, *shape)
        us = decode.ours_us()
        row: Row = {"us": us, "gb_per_s": decode.kv_bytes / us / 1e3, "of_copy": decode.kv_bytes / us / 1e3 / copy}
        try:
            row["peer"], row["peer_us"] = decode.peer()
        except Exception as error:
            row["peer_error"] = f"{type(error).__name__}: {error}"
        return row

    for shape in SHAPES:
        case = dict(zip(("batch", "context", "heads", "kv_heads", "cold"), shape, strict=True))
        guarded(rows, {"measure": "attention", **case}, lambda shape=shape: attention(*shape))
        free_caches()

    def plan(batch: int, context: int, kv_heads: int) -> Row:
        options = {"max_rows": batch, "num_heads": 32, "num_kv_heads": kv_heads, "head_dim": 128}
        workspace = AttentionWorkspace(device, max_context_len=context, **options)
        lens = torch.randint(1, context + 1, (batch,), device=device).to(torch.int32)

        def plans() -> None:
            for _ in range(32):
                workspace.plan(lens)

        return {"us": graph_us(plans) / 32}

    for shape in ((1, 1000, 32), (16, 1000, 8), (64, 4096, 8), (256, 4096, 8), (256, 4096, 32), (1024, 4096, 8)):
        case = dict(zip(("batch", "context", "kv_heads"), shape, strict=True))
        guarded(rows, {"measure": "plan", **case}, lambda shape=shape: plan(*shape))
    return rows


def measure_variants(device: torch.device) -> list[Row]:
    """µs of every shape for kernels of head_dim 128 and launch sizes: which default is best."""
    options: list[Row] = [{"variant": v, "per_sm": n} for v, n in ((0, 2), (0, 1), (0, 3), (0, 4), (1, 1), (1, 2))]
    options += [{"variant": 2, "per_sm": 1}, {"variant": 2, "per_sm": 2}]
    options += [{"variant": 0, "per_sm": 3, "min_split_tiles": tiles} for tiles in (16, 24, 32)]
    few: list[Row] = [
        {"variant": v, "per_sm": n, "min_split_tiles": tiles}
        for v, n in ((0, 2), (1, 2), (2, 1), (2, 2))
        for tiles in (4, 8, 12, 20, 24)
    ]
    rows: list[Row] = []
    for shape in SHAPES:

        def all_of_shape(shape: tuple[Any, ...] = shape) -> Row:
            decode = Decode(device, *shape)
            small = decode.batch * decode.kv_heads <= 256
            found = {}
            for option in options + (few if small else []):
                name = ", ".join(f"{key} {value}" for key, value in option.items())
                try:
                    found[name] = round(decode.ours_us(**option), 2)
                except Exception as error:
                    found[name] = f"{type(error).__name__}: {error}"
            return {"us": found}

        case = dict(zip(("batch", "context", "heads", "kv_heads", "cold"), shape, strict=True))
        guarded(rows, {"measure": "variants", **case}, all_of_shape)
        free_caches()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("check", "measure", "variants"):
        parser.add_argument(f"--{name}", action="store_true")
    asked = parser.parse_args()
    device = torch.device("cuda")
    everything = not (asked.check or asked.measure or asked.variants)
    result: Row = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name, function in (("check", check), ("measure", measure), ("variants", measure_variants)):
        if everything or getattr(asked, name):
            result[name] = function(device)
    json.dump(result, sys.stdout, indent=1)
    print()
    failed = [row for row in result.get("check", []) if not row["ok"]]
    print(f"{len(failed)} of {len(result.get('check', []))} checks failed", file=sys.stderr)


if __name__ == "__main__":
    main()
