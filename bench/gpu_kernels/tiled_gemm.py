"""Does csrc/cuda/tiled_gemm_sm90a.cu compute what it should on this GPU, and what do a layer's products cost with it?

    python bench/kernels.py tiled_gemm

Times are of CUDA graphs, as in skinny_gemm.py. A chain is a layer without its attention: by our kernels, and by cuBLAS
with our norm, rotation and activation around it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from gpu_kernels.skinny_gemm import HEAD_DIM, Chain, Row, copy_bandwidth, graph_us, guarded, matrices

from zmqexec.worker.kernels import reference
from zmqexec.worker.kernels import tiled_gemm as tg
from zmqexec.worker.kernels.tiled_gemm import ROWS, SPLITS, Tile

POOL_BYTES = 512 << 20


def check(device: torch.device) -> list[Row]:
    """A row per shape with `ok`, how many tiles were tried and the largest error, relative to the largest result."""
    rows: list[Row] = []
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    def errors(m: int, n: int, k: int, dtype: torch.dtype) -> Row:
        x, weight, bias = random(m, k, dtype=dtype), random(n, k, dtype=dtype, scale=k**-0.5), random(n, dtype=dtype)
        before = random(m, n, dtype=dtype)
        torch.cuda.synchronize()  # weights may be read before the kernel just before has ended
        product = x.float() @ weight.float().T + bias.float()
        gated = reference.silu_mul(product.to(dtype)).float()
        worst = 0.0
        tiles = [Tile(tile_rows, splits) for tile_rows in ROWS for splits in SPLITS]
        for tile in tiles:
            out = torch.full_like(before, torch.nan)
            residual = before.clone()
            results = [
                (tg.linear(x, weight, bias, out=out, tile=tile), product),
                (tg.linear_residual_(residual, x, weight, bias, tile=tile), before.float() + product),
                (tg.linear_silu_mul(x, weight, bias, tile=tile), gated),
            ]
            for ours, expected in results:
                error = float((ours.float() - expected).abs().max() / expected.abs().max())
                worst = max(worst, error if error == error else torch.inf)
        bound = 8 * torch.finfo(dtype).eps
        return {"ok": worst <= bound, "error": worst, "bound": bound, "tiles": len(tiles)}

    shapes = [shape for tp in (1, 2) for name, shape in matrices(tp).items() if name != "lm_head"]
    shapes += [(16, 8), (176, 520), (1008, 1032), (28672, 1024)]
    for n, k in shapes:
        for m in (1, 17, 32, 33, 64, 65, 100, 128):
            for dtype in (torch.bfloat16, torch.float16):
                case = {"check": "all tiles", "m": m, "n": n, "k": k, "dtype": str(dtype)}
                guarded(rows, case, lambda m=m, n=n, k=k, dtype=dtype: errors(m, n, k, dtype))
    return rows


class TiledChain(Chain):
    """`Chain`, by other products."""

    def run_tiled(self) -> None:
        for weights in self.layers:
            self.rms_norm(pdl=True)
            tg.linear(self.normed, weights["qkv"], out=self.mm_out["qkv"])
            self.rope()
            tg.linear_residual_(self.hidden, self.query.flatten(1), weights["o"])
            self.rms_norm(pdl=True)
            tg.linear_silu_mul(self.normed, weights["gate_up"], out=self.inner)
            tg.linear_residual_(self.hidden, self.inner, weights["down"])

    def run_cublas(self) -> None:
        for weights in self.layers:
            torch.mm(self.normed, weights["qkv"].T, out=self.mm_out["qkv"])
            self.rope()
            torch.mm(self.query.flatten(1), weights["o"].T, out=self.mm_out["o"])
            self.rms_norm(pdl=True, of=self.mm_out["o"])
            torch.mm(self.normed, weights["gate_up"].T, out=self.mm_out["gate_up"])
            self.silu_mul()
            torch.mm(self.inner, weights["down"].T, out=self.mm_out["down"])
            self.rms_norm(pdl=True, of=self.mm_out["down"])

    def rope(self) -> None:
        module, stream = importlib.import_module("zmqexec._cuda"), torch.cuda.current_stream().cuda_stream
        tensors = (self.query, self.mm_out["qkv"], self.cache, self.slots, self.positions, self.cos, self.sin)
        sizes = (len(self.hidden), self.num_heads, self.num_heads, HEAD_DIM, self.cache.shape[3])
        module.rope_write_kv(*(tensor.data_ptr() for tensor in tensors), *sizes, False, module.BFLOAT16, stream, True)

    def silu_mul(self) -> None:
        module, stream = importlib.import_module("zmqexec._cuda"), torch.cuda.current_stream().cuda_stream
        addresses = (self.inner.data_ptr(), self.mm_out["gate_up"].data_ptr())
        module.silu_mul(*addresses, *self.inner.shape, module.BFLOAT16, stream, True)


def measure(device: torch.device) -> list[Row]:
    """Microseconds of each product, by tile and by cuBLAS, then of a layer of a chain."""
    bandwidth = copy_bandwidth(device)
    rows: list[Row] = [{"measure": "copy", "device": torch.cuda.get_device_name(device), "gb_s": bandwidth / 1e9}]
    pool = torch.empty(POOL_BYTES // 2, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def product(n: int, k: int, m: int, tile: Tile | None) -> Row:
        weights = [pool[i * n * k : (i + 1) * n * k].view(n, k) for i in range(min(12, pool.numel() // (n * k)))]
        x, out = torch.randn(m, k, device=device).bfloat16(), torch.empty(m, n, device=device, dtype=torch.bfloat16)

        def run() -> None:
            for weight in weights:
                if tile is None:
                    torch.mm(x, weight.T, out=out)
                else:
                    tg.linear(x, weight, out=out, tile=tile)

        return {"us": graph_us(run, replays=4) / len(weights), "floor_us": 2 * n * k / bandwidth * 1e6}

    for tp in (1, 2):
        for name, (n, k) in matrices(tp).items():
            if name == "lm_head":
                continue
            blocks = {Tile(r, s): -(-n // r) * s for r in ROWS for s in SPLITS}
            tiles = [tile for tile, count in blocks.items() if 0.7 * num_sms <= count <= 2 * num_sms]
            for m in (32, 64, 128):
                for tile in (None, *tiles):
                    case = {"measure": "matrix", "tp": tp, "matrix": name, "m": m, "by": str(tile or "cublas")}
                    guarded(rows, case, lambda n=n, k=k, m=m, tile=tile: product(n, k, m, tile))
    pool = pool.new_empty(0)
    for tp in (1, 2):
        for m in (16, 17, 24, 32, 48, 64, 96, 128):
            chain = TiledChain(device, tp, m)
            floor_us = chain.layer_bytes / bandwidth * 1e6

            def per_layer(run: Callable[[], None], chain: Chain = chain, floor_us: float = floor_us) -> Row:
                us = graph_us(run, replays=3) / len(chain.layers)
                chain.reset()
                return {"us_per_layer": us, "floor_us": floor_us, "of_copy_bandwidth": floor_us / us}

            for by, run in (("tiled", chain.run_tiled), ("cublas", chain.run_cublas)):
                case = {"measure": "chain", "tp": tp, "m": m, "by": by}
                guarded(rows, case, lambda run=run, per_layer=per_layer: per_layer(run))
    return rows
