"""Does csrc/cuda/prefill_attention_sm90a.cu compute what it should on this GPU, and how fast beside torch's?

    python bench/kernels.py prefill_attention

Keys and values lie in the pages of a cache in random order, where torch's flash attention (FlashAttention-2) gets them
contiguous. Times are of CUDA graphs.
"""

from __future__ import annotations

from collections import Counter

import torch
from gpu_kernels.skinny_gemm import Row, graph_us, guarded

from zmqexec.worker.kernels.paged_prefill import items_of, prefill_attention

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
AT_ONCE = 4  # launches of a graph

Chunks = list[tuple[int, int]]
"""(tokens of a cached prefix, tokens of the chunk) of each sequence."""


class Case:
    """Random chunks, and a cache that holds NaN wherever they have nothing."""

    def __init__(
        self,
        device: torch.device,
        chunks: Chunks,
        heads: int,
        kv_heads: int,
        *,
        head_dim: int = 128,
        block_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        sharpness: float = 1.0,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        contexts = [prefix + count for prefix, count in chunks]
        counts = [-(-context // block_size) for context in contexts]
        order = torch.randperm(sum(counts) + 3, generator=generator, device=device).int()
        shape = (len(order), 2, kv_heads, block_size, head_dim)
        self.chunks, self.heads, self.kv_heads = chunks, heads, kv_heads
        self.cache = torch.full(shape, torch.nan, device=device, dtype=dtype)
        self.tables = torch.zeros((len(chunks), max(counts)), dtype=torch.int32, device=device)
        self.slots = torch.arange(len(chunks), dtype=torch.int32, device=device)
        self.starts = [0]
        for _, count in chunks:
            self.starts.append(self.starts[-1] + count)
        self.cu_query = torch.tensor(self.starts, dtype=torch.int32, device=device)
        self.context_lens = torch.tensor(contexts, dtype=torch.int32, device=device)
        items = items_of([count for _, count in chunks], contexts)
        self.items = torch.from_numpy(items).to(device)
        self.longest = max(count for _, count in chunks)
        self.qkv = (random(self.starts[-1], heads + 2 * kv_heads, head_dim) * sharpness).to(dtype)
        self.scale = head_dim**-0.5
        self.kv = []
        used = 0
        for index, (prefix, count) in enumerate(chunks):
            blocks = order[used : used + counts[index]]
            used += counts[index]
            self.tables[index, : len(blocks)] = blocks
            kv = random(contexts[index], 2, kv_heads, head_dim).to(dtype)
            own = self.qkv[self.starts[index] : self.starts[index] + count, heads:]
            kv[prefix:] = own.unflatten(1, (2, kv_heads))
            tokens = torch.arange(contexts[index], device=device)
            self.cache[blocks.long()[tokens // block_size], :, :, tokens % block_size] = kv
            self.kv.append(kv)

    def run(self, out: torch.Tensor) -> None:
        chunks = (self.tables, self.slots, self.cu_query, self.context_lens, self.items)
        prefill_attention(out, self.qkv[:, : self.heads], self.cache, *chunks, self.scale)

    def run_flash(self) -> None:
        """Of whole contexts."""
        keys_end = self.heads + self.kv_heads
        torch.ops.aten._flash_attention_forward(
            query=self.qkv[:, : self.heads],
            key=self.qkv[:, self.heads : keys_end],
            value=self.qkv[:, keys_end:],
            cum_seq_q=self.cu_query,
            cum_seq_k=self.cu_query,
            max_q=self.longest,
            max_k=self.longest,
            dropout_p=0.0,
            is_causal=True,
            return_debug_mask=False,
            scale=self.scale,
        )

    def empty(self) -> torch.Tensor:
        return torch.full_like(self.qkv[:, : self.heads], torch.nan, memory_format=torch.contiguous_format)

    def expected(self) -> torch.Tensor:
        """In float32, a head at a time."""
        out = self.empty().float()
        group = self.heads // self.kv_heads
        for index, (prefix, count) in enumerate(self.chunks):
            rows = slice(self.starts[index], self.starts[index] + count)
            kv = self.kv[index].float()
            tokens = torch.arange(prefix + count, device=out.device)
            hidden = tokens > tokens[prefix:].unsqueeze(1)
            for head in range(self.heads):
                scores = self.qkv[rows, head].float() @ kv[:, 0, head // group].T * self.scale
                out[rows, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ kv[:, 1, head // group]
        return out

    @property
    def operations(self) -> int:
        """Of the products, without what is hidden."""
        pairs = sum(count * prefix + count * (count + 1) // 2 for prefix, count in self.chunks)
        return 4 * self.qkv.shape[2] * self.heads * pairs


def check(device: torch.device) -> list[Row]:
    """A row per case with `ok` and the largest error, relative to the largest result."""
    rows: list[Row] = []

    def compared(case: Case) -> Row:
        out, expected = case.empty(), case.expected()
        case.run(out)
        error = float((out.float() - expected).abs().nan_to_num(torch.inf).max() / expected.abs().max())
        again = case.empty()
        case.run(again)
        bound = TOLERANCE[out.dtype]
        return {"ok": error <= bound and torch.equal(out, again), "error": error, "bound": bound}

    several: Chunks = [(257, 70), (0, 333), (1000, 129)]
    for block_size in (8, 16, 32, 64, 128, 256):
        for head_dim in (64, 128):
            for dtype in TOLERANCE:
                sizes = {"block_size": block_size, "head_dim": head_dim}
                row = {"check": "blocks", **sizes, "dtype": str(dtype)}
                guarded(
                    rows,
                    row,
                    lambda sizes=sizes, dtype=dtype: compared(Case(device, several, 4, 2, **sizes, dtype=dtype)),
                )
    cases: list[tuple[Chunks, int, int]] = [
        ([(0, 1)], 1, 1),
        ([(1000, 1)], 4, 1),
        ([(0, 4096)], 8, 8),
        ([(0, 512)] * 16, 32, 8),
        ([(3000, 700), (513, 1), (16, 127), (0, 1)], 16, 4),
        ([(6000, 512)] * 4, 8, 8),
    ]
    for chunks, heads, kv_heads in cases:
        for sharpness in (1.0, 4.0):
            row = {"check": "chunks", "chunks": str(chunks), "heads": heads, "kv_heads": kv_heads, "sharp": sharpness}
            guarded(
                rows,
                row,
                lambda chunks=chunks, heads=heads, kv_heads=kv_heads, sharpness=sharpness: compared(
                    Case(device, chunks, heads, kv_heads, sharpness=sharpness)
                ),
            )
    return rows


def measure(device: torch.device) -> list[Row]:
    """Microseconds and TFLOP/s, ours and torch's."""
    rows: list[Row] = []

    def timed(case: Case) -> Row:
        out = case.empty()
        us = graph_us(lambda: [case.run(out) for _ in range(AT_ONCE)]) / AT_ONCE
        row: Row = {"us": us, "tflop_s": case.operations / us / 1e6}
        if all(prefix == 0 for prefix, _ in case.chunks):
            row["flash_us"] = graph_us(lambda: [case.run_flash() for _ in range(AT_ONCE)]) / AT_ONCE
        return row

    cases: list[tuple[Chunks, int, int]] = [
        ([(0, 512)], 32, 32),
        ([(0, 512)] * 16, 32, 32),
        ([(0, 512)] * 16, 32, 8),
        ([(0, 2048)] * 4, 32, 32),
        ([(0, 8192)], 32, 32),
        ([(4096, 512)], 32, 8),
        ([(0, 4096), *[(0, 128)] * 32], 32, 32),
    ]
    for chunks, heads, kv_heads in cases:
        name = " + ".join(f"{count} x {chunk}" for chunk, count in Counter(chunks).items())
        row = {"measure": "prefill", "chunks": name, "heads": heads, "kv_heads": kv_heads}
        guarded(
            rows,
            row,
            lambda chunks=chunks, heads=heads, kv_heads=kv_heads: timed(Case(device, chunks, heads, kv_heads)),
        )
    return rows
