"""Does csrc/cuda/sample.cu choose the CPU's tokens on this GPU, and how long does it take?

    python bench/gpu_kernels/sample.py [--check] [--measure]

Times are of CUDA graphs in which every launch reads other logits, more than L2 holds together ("cold"), or the same
ones again ("warm": the product that writes them has just done so). Beside it torch.argmax, and a sampler of torch
operations that sorts the vocabulary.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from zmqexec.protocol import Sampling
from zmqexec.worker.choose import choose
from zmqexec.worker.kernels.decode_state import (
    DecodeRows,
    SlotState,
    begin_decode,
    finish_decode,
    step_ints,
    write_step,
)
from zmqexec.worker.kernels.sample import allocate_params, params_of, sample
from zmqexec.worker.philox import uniforms
from zmqexec.worker.sampler import make_filters

Row = dict[str, Any]

CHECKED = [(33, 32000), (9, 128256), (5, 151936), (6, 50257), (130, 4000)]
MEASURED = [(8, 32000), (256, 32000), (1, 128256), (64, 128256)]
ROTATED_BYTES = 160 << 20
"""More than three times the L2 of an H100."""
LAUNCHES = 24
REPLAYS = 7
BUDGET_S = 20.0

GREEDY = Sampling()
TOP_P = Sampling(temperature=0.8, top_p=0.95)
TOP_K = Sampling(temperature=0.7, top_k=50, top_p=0.9)
PLAIN = Sampling(temperature=1.0)
MIN_P = Sampling(temperature=1.2, min_p=0.05)
KINDS: dict[str, list[Sampling]] = {
    "greedy": [GREEDY],
    "top_p": [TOP_P],
    "top_k": [TOP_K],
    "plain": [PLAIN],
    "mixed": [GREEDY, TOP_P, TOP_K, PLAIN, MIN_P],
}


def peaked(generator: torch.Generator, rows: int, vocab: int) -> torch.Tensor:
    """As a language model's: most tokens far below a few."""
    logits = torch.randn(rows, vocab, generator=generator, device=generator.device) * 2.5
    raised = torch.rand(rows, vocab, generator=generator, device=generator.device) < 0.002
    return logits + raised * 10.0 * torch.rand(rows, vocab, generator=generator, device=generator.device)


def flat(generator: torch.Generator, rows: int, vocab: int) -> torch.Tensor:
    """No token stands out: half of the vocabulary is needed for most of the mass."""
    return torch.randn(rows, vocab, generator=generator, device=generator.device)


def tied(generator: torch.Generator, rows: int, vocab: int) -> torch.Tensor:
    """Thousands of equal logits."""
    return torch.randint(-4, 4, (rows, vocab), generator=generator, device=generator.device).float()


class Case:
    """Logits with everything else that the kernel needs."""

    def __init__(self, logits: torch.Tensor, params: list[Sampling]) -> None:
        device, rows = logits.device, len(logits)
        self.logits = logits
        self.params = list(islice(cycle(params), rows))
        packed = np.concatenate([params_of(one) for one in self.params])
        self.records = allocate_params(rows, device)
        self.records.copy_(torch.from_numpy(packed.view(np.uint8).reshape(rows, -1)))
        self.row_slots = torch.arange(rows, dtype=torch.int32, device=device)
        self.positions = torch.arange(1, rows + 1, dtype=torch.int32, device=device)
        self.out = torch.full((rows,), -1, dtype=torch.int32, device=device)

    def run(self, logits: torch.Tensor | None = None, threads: int = 0) -> torch.Tensor:
        """The tokens, for these logits or others."""
        logits = self.logits if logits is None else logits
        sample(self.out, logits, self.records, self.row_slots, self.positions, threads=threads)
        return self.out

    def expected(self, nudge: float = 0.0) -> list[int]:
        """The CPU's tokens; `nudge` moves the random numbers and top_p relatively."""
        logits = self.logits.cpu()
        tokens = logits.argmax(1)
        rows = [row for row, one in enumerate(self.params) if one.temperature >= 1e-5]
        if rows:
            drawn = [self.params[row] for row in rows]
            numbers = uniforms(
                np.array([one.seed for one in drawn], np.uint64),
                np.array([one.sample_index for one in drawn], np.int64),
                np.array(rows, np.int64) + 1,
            )
            filters = make_filters(drawn, logits.shape[1])
            filters.top_p.mul_(1 + nudge).clamp_(max=1.0)
            tokens[rows] = choose(logits[rows], filters, torch.from_numpy(numbers * (1 + nudge)))
        return [int(token) for token in tokens]


# Correctness


def check(device: torch.device) -> Iterator[Row]:
    """A row per case: how many tokens differ from the CPU's, and whether each of those was a close call."""
    device = torch.device(device)
    started = time.monotonic()
    generator = torch.Generator(device).manual_seed(0)
    for (rows, vocab), make in ((shape, make) for make in (peaked, flat, tied) for shape in CHECKED):
        name = f"sample {make.__name__} {rows}x{vocab}"
        if time.monotonic() - started > BUDGET_S:
            yield {"name": name, "skipped": "out of time"}
            continue
        yield guarded({"name": name}, lambda rows=rows, vocab=vocab, make=make: compared(make(generator, rows, vocab)))
    yield guarded({"name": "random_bits"}, lambda: random_bits(device))
    yield guarded({"name": "in a graph, with nothing but new logits and positions"}, lambda: replayed(device))
    yield guarded({"name": "decode_state"}, lambda: decode_state(device))


def compared(logits: torch.Tensor) -> Row:
    params = [
        Sampling(**dict_of(one) | {"seed": 1000 + i})
        for i, one in enumerate(islice(cycle(KINDS["mixed"]), len(logits)))
    ]
    case = Case(logits, params)
    expected = case.expected()
    row: Row = {"rows": len(logits), "vocab": logits.shape[1]}
    for threads in (0, 512, 1024):
        got = case.run(threads=threads).tolist()
        different = [i for i, (token, right) in enumerate(zip(got, expected, strict=True)) if token != right]
        near = [case.expected(nudge) for nudge in (-1e-11, 1e-11)] if different else []
        wrong = [i for i in different if got[i] not in (near[0][i], near[1][i])]
        row |= {f"different_{threads}": len(different), f"wrong_{threads}": [(i, got[i], expected[i]) for i in wrong]}
    return row | {"ok": not any(row[f"wrong_{threads}"] for threads in (0, 512, 1024))}


def dict_of(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}


def random_bits(device: torch.device) -> Row:
    rng, count = np.random.default_rng(0), 4096
    seeds = rng.integers(0, 1 << 64, count, dtype=np.uint64)
    indices, positions = rng.integers(0, 1 << 32, (2, count))
    words = (seeds.view(np.int64), *(array.astype(np.uint32).view(np.int32) for array in (indices, positions)))
    tensors = [torch.from_numpy(array).to(device) for array in words]
    out = torch.empty(count, dtype=torch.int64, device=device)
    native(device).random_bits(out.data_ptr(), *(tensor.data_ptr() for tensor in tensors), count, stream(device), False)
    return {"ok": bool(np.array_equal(out.cpu().numpy() * 2.0**-53, uniforms(seeds, indices, positions)))}


def replayed(device: torch.device) -> Row:
    generator = torch.Generator(device).manual_seed(1)
    case = Case(peaked(generator, 16, 32000), KINDS["mixed"])
    graph = captured([case.run])
    wrong = 0
    for _ in range(5):
        case.logits.copy_(peaked(generator, 16, 32000))
        graph.replay()
        got, expected = case.out.tolist(), case.expected()
        wrong += sum(token != right for token, right in zip(got, expected, strict=True))
    return {"ok": wrong == 0, "wrong": wrong}


def decode_state(device: torch.device) -> Row:
    """Steps of 200 of 256 slots, in a graph, against numpy."""
    rng = np.random.default_rng(0)
    state = SlotState.allocate(256, 2000, 16, device)
    tokens = rng.integers(0, 32000, (256, 2001)).astype(np.int32)
    known = rng.integers(1, 1900, 256).astype(np.int32)
    tables = rng.integers(0, 5000, (256, state.block_tables.shape[1])).astype(np.int32)
    for tensor, array in zip(
        (state.token_ids, state.num_known, state.block_tables), (tokens, known, tables), strict=True
    ):
        tensor.copy_(torch.from_numpy(array))
    rows = DecodeRows.allocate(224, device)
    step = torch.zeros(step_ints(256, 300), dtype=torch.int32, device=device)
    sampled, out = (torch.zeros(224, dtype=torch.int32, device=device) for _ in range(2))
    pdl = torch.cuda.get_device_capability(device) >= (9, 0)

    def both() -> None:
        begin_decode(step, 256, state, rows, pdl=pdl)
        finish_decode(sampled, rows, state, out, pdl=pdl)

    graph, wrong = captured([both], warm_up=False), []
    for number in range(20):
        slots = np.sort(rng.permutation(256)[:200])
        updates = np.stack([slots, (known[slots] - 1) // 16, rng.integers(0, 5000, 200)], axis=1)
        ints = np.zeros(step.numel(), np.int32)
        write_step(ints, 256, slots, updates)
        step.copy_(torch.from_numpy(ints))
        sampled.copy_(torch.from_numpy(rng.integers(0, 32000, 224).astype(np.int32)))
        graph.replay()
        tables[updates[:, 0], updates[:, 1]] = updates[:, 2]
        position = known[slots] - 1
        expected = {
            "input_ids": tokens[slots, position],
            "slot_mapping": tables[slots, position // 16] * 16 + position % 16,
            "context_lens": known[slots],
        }
        padding = {"input_ids": 0, "slot_mapping": -1, "context_lens": 0}
        for name, array in expected.items():
            whole = np.concatenate([array, np.full(24, padding[name])])
            if not np.array_equal(getattr(rows, name).cpu().numpy(), whole):
                wrong.append(f"{name} in step {number}")
        tokens[slots, known[slots]] = sampled[:200].cpu().numpy()
        known[slots] += 1
    for name, array in (("token_ids", tokens), ("num_known", known), ("block_tables", tables)):
        if not np.array_equal(getattr(state, name).cpu().numpy(), array):
            wrong.append(name)
    return {"ok": not wrong, "wrong": wrong[:5]}


# Times


def measure(device: torch.device) -> Iterator[Row]:
    """A row per case: µs a launch."""
    device = torch.device(device)
    started = time.monotonic()
    generator = torch.Generator(device).manual_seed(0)
    for rows, vocab in MEASURED:
        size = 4 * rows * vocab
        copies = max(2, -(-ROTATED_BYTES // size))
        cold = [peaked(generator, rows, vocab) for _ in range(copies)]
        variants: list[tuple[str, list[torch.Tensor], str, int]] = [
            *((kind, cold, "cold", 0) for kind in KINDS),
            ("greedy", cold[:1], "warm", 0),
            ("mixed", cold[:1], "warm", 0),
            ("top_p", cold[:1], "warm", 512),
            ("top_p", cold[:1], "warm", 1024),
            ("top_p", [flat(generator, rows, vocab)], "warm, flat", 0),
            ("plain", [tied(generator, rows, vocab)], "warm, tied", 0),
        ]
        for kind, logits, state, threads in variants:
            case = Case(logits[0], [Sampling(**dict_of(one) | {"seed": i}) for i, one in enumerate(KINDS[kind] * 7)])
            calls = [lambda part=part, case=case, threads=threads: case.run(part, threads) for part in logits]
            named = {"name": f"sample {kind} {rows}x{vocab} {state}" + (f" {threads} threads" if threads else "")}
            yield guarded(named, lambda calls=calls, size=size: timed(calls, size), started)
        peers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"torch.argmax": lambda x: x.argmax(1)}
        numbers = torch.rand(rows, 1, generator=generator, device=device)
        peers["torch sort, top_p"] = lambda x, numbers=numbers: sorting_sampler(x, 0.8, 0.95, numbers)
        for peer, function in peers.items():
            calls = [lambda part=part, function=function: function(part) for part in cold]
            yield guarded(
                {"name": f"{peer} {rows}x{vocab} cold"}, lambda calls=calls, size=size: timed(calls, size), started
            )
        del cold, variants
    yield guarded({"name": "begin_decode + finish_decode, 256 rows"}, lambda: timed_decode_state(device), started)


def sorting_sampler(logits: torch.Tensor, temperature: float, top_p: float, numbers: torch.Tensor) -> torch.Tensor:
    """What one writes without a kernel of one's own; float32 throughout."""
    values, ids = logits.div(temperature).softmax(1).sort(dim=1, descending=True)
    cumulative = values.cumsum(1)
    values = values.masked_fill(cumulative - values >= top_p, 0.0)
    cumulative = values.cumsum(1)
    index = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)
    return ids.gather(1, index)


def timed_decode_state(device: torch.device) -> Row:
    state, rows = SlotState.allocate(256, 4096, 16, device), DecodeRows.allocate(256, device)
    state.num_known.fill_(100)
    ints = np.zeros(step_ints(256, 32), np.int32)
    write_step(ints, 256, np.arange(256), [(i, 6, i) for i in range(16)])
    step = torch.from_numpy(ints).to(device)
    sampled, out = (torch.zeros(256, dtype=torch.int32, device=device) for _ in range(2))

    def both() -> torch.Tensor:
        begin_decode(step, 256, state, rows)
        finish_decode(sampled, rows, state, out)
        return out

    return {"us": round(median_us([both]), 2)}


def timed(calls: list[Callable[[], torch.Tensor]], num_bytes: int) -> Row:
    us = median_us(calls)
    return {"us": round(us, 2), "gb_s": round(num_bytes / us / 1e3, 1)}


def median_us(calls: list[Callable[[], Any]]) -> float:
    """Of one call, from a graph that makes each of them at least once, and LAUNCHES in all."""
    launches = list(islice(cycle(calls), max(LAUNCHES, len(calls))))
    graph = captured(launches)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times[1:])


def captured(calls: list[Callable[[], Any]], *, warm_up: bool = True) -> torch.cuda.CUDAGraph:
    """A graph of these calls; each is made once before, unless that would change something."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in {id(call): call for call in calls}.values() if warm_up else ():
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def native(device: torch.device) -> Any:
    return importlib.import_module("zmqexec._cuda" if device.type == "cuda" else "_cuda_emulated")


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def guarded(row: Row, function: Callable[[], Row], started: float | None = None) -> Row:
    """The case's row; what goes wrong is a row, too. Cases past the budget are skipped."""
    if started is not None and time.monotonic() - started > BUDGET_S:
        return row | {"skipped": "out of time"}
    try:
        return row | function()
    except Exception as error:
        traceback.print_exc()
        return row | {"ok": False, "error": f"{type(error).__name__}: {error}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measure", action="store_true")
    chosen = parser.parse_args()
    device = torch.device("cuda")
    for function in (check, measure):
        if getattr(chosen, function.__name__) or not (chosen.check or chosen.measure):
            for row in function(device):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
