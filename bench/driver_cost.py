"""What does a step cost the driver, with 256 sequences decoding?

    python bench/driver_cost.py [--sequences 256] [--tokenizer FOLDER] [--geometry llama-2-7b]

The real scheduler, front end and bus, and a worker process that replies at once with random tokens. The driver waits
out each reply before it takes it, so that no figure contains a wait. Against 0.8 ms, about what four H200 need to read
a 7B model once: while a step runs, the driver has at least that long to do all of this (run-ahead).

    collect     the reply from the ring, decoded
    update      `Scheduler.update`: tokens recorded, ends found, full blocks offered to the prefix cache
    detokenize  `FrontEnd.apply`: tokens to text, stop strings
    schedule    `Scheduler.schedule`: the next step
    publish     encoding and copying into the ring, and waking the worker; `encode` is a part of it
    outputs     `RequestOutput` of every request that moved: `Engine.step` makes them, `generate` does not, and so they
                are not in the total

On a machine with GPUs, the host time of a worker per decode step as well: taking in a step and launching it.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parent))

import geometries
import msgspec
import provenance
from serving.cases import Case
from serving.clock import percentiles
from serving.ranks import measure_ranks
from serving.setting import Setting

from zmqexec.bus.channel import DriverChannel, WorkerChannel
from zmqexec.config import EngineConfig, SamplingParams
from zmqexec.demo import CHECKPOINT
from zmqexec.driver.gpus import num_visible_gpus, torch_cuda_version
from zmqexec.driver.scheduler import Scheduler
from zmqexec.errors import BusClosed
from zmqexec.frontend import FrontEnd, load_tokenizer
from zmqexec.protocol import EngineInfo, StepInput, StepOutput, pack

BUDGET_MS = 0.8
INPUT_LEN = 128
OUTPUT_LEN = 400
WARM_UP_STEPS = 50
REPLY_S = 0.0015
"""Long enough for the worker's reply, and about as long as a step."""
RANKS_TIMEOUT_S = 240.0
PARTS = ("collect", "update", "detokenize", "schedule", "publish")
BESIDE = {"encode": "a part of publish", "outputs": "of Engine.step alone"}

Value = TypeVar("Value")


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    if arguments.worker is not None:
        run_worker(arguments.worker, arguments.sequences)
        return
    times = measure(arguments.sequences, arguments.tokenizer)
    parts = {name: percentiles([1e6 * seconds for seconds in found]) for name, found in times.items()}
    total = percentiles([1e6 * sum(step) for step in zip(*(times[name] for name in PARTS), strict=True)])
    result = {
        "question": f"microseconds of the driver per decode step of {arguments.sequences} sequences",
        "date": provenance.now(),
        "command": provenance.command("bench/driver_cost.py"),
        "machine": provenance.machine(),
        "versions": provenance.versions(("zmqexec", "msgspec", "tokenizers", "torch")),
        "sequences": arguments.sequences,
        "budget_us": 1e3 * BUDGET_MS,
        "parts_us": parts,
        "total_us": total,
        "share_of_budget": round(total["p50"] / (1e3 * BUDGET_MS), 3),
        "workers": [],
        "not_measured": [],
    }
    path = arguments.out / f"driver-cost-{arguments.label}.json"
    provenance.write_json(path, result)
    print_parts(result)
    if num_visible_gpus() and torch_cuda_version() is not None:
        measure_workers(arguments, result)
        provenance.write_json(path, result)
    print(path.name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokenizer", type=Path, default=CHECKPOINT, help="folder; default: the demo model's")
    parser.add_argument("--geometry", choices=list(geometries.GEOMETRIES), default="llama-2-7b", help="of the worker")
    parser.add_argument("--tp", type=int, nargs="+", default=[1], help="of the worker")
    parser.add_argument("--label", default="local", help="of the file in --out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # the bus's file descriptor, in the child
    return parser.parse_args()


def run_worker(bus_fd: int, num_sequences: int) -> None:
    """The other side of the bus: as many tokens as the step samples, which here is one for each of its rows."""
    vocab_size = load_vocab_size()
    tokens = [random.Random(0).randrange(vocab_size) for _ in range(2 * num_sequences)]
    with WorkerChannel.attach(bus_fd, 0) as channel:
        while True:
            try:
                message = channel.receive(60.0)
            except BusClosed:
                return
            if isinstance(message, StepInput):
                count = len(message.prefills) // 8 + int.from_bytes(message.decodes, "little").bit_count()
                begin = message.step_id % num_sequences
                channel.reply(StepOutput(message.epoch, message.step_id, pack(tokens[begin : begin + count])), 10.0)


def load_vocab_size() -> int:
    """Of the demo model, whose ids every tokenizer has."""
    tokenizer = load_tokenizer(CHECKPOINT)
    assert tokenizer is not None
    return tokenizer.vocab_size


def measure(num_sequences: int, tokenizer_folder: Path) -> dict[str, list[float]]:
    """Seconds of every part in every step of the decode phase."""
    with DriverChannel.create(1, epoch=0, name="driver-cost") as channel:
        command = [sys.executable, __file__, "--worker", str(channel.fd), "--sequences", str(num_sequences)]
        worker = subprocess.Popen(command, pass_fds=[channel.fd])
        try:
            return Steps(channel, num_sequences, tokenizer_folder).run()
        finally:
            channel.close()
            try:
                worker.wait(5.0)
            except subprocess.TimeoutExpired:
                worker.kill()


class Steps:
    """The driver's turn, part by part. `times` holds what the parts took, of steps in which everybody decodes."""

    def __init__(self, channel: DriverChannel, num_sequences: int, tokenizer_folder: Path) -> None:
        self._channel = channel
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()
        self._is_counting = False
        self.times: dict[str, list[float]] = defaultdict(list)
        max_model_len = INPUT_LEN + OUTPUT_LEN
        num_blocks = (num_sequences + 2) * -(-max_model_len // 16)
        # All prompts in one step: the decode phase begins for all at once.
        config = EngineConfig(max_num_seqs=num_sequences, max_num_batched_tokens=num_sequences * INPUT_LEN)
        self._scheduler = Scheduler(config, num_blocks, max_model_len, [])
        vocab_size = load_vocab_size()
        info = EngineInfo("", max_model_len, vocab_size, num_blocks, config.block_size, "cpu", "float32", [])
        self._front = FrontEnd(info, load_tokenizer(tokenizer_folder))
        params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_LEN, ignore_eos=True)
        for index, prompt in enumerate(Case(num_sequences, INPUT_LEN, OUTPUT_LEN).prompts(vocab_size, seed=0)):
            request, sequences = self._front.prepare(str(index), prompt, params)
            self._front.open(request)
            self._scheduler.add(sequences[0])

    def run(self) -> dict[str, list[float]]:
        """As `Driver.step` with one step of run-ahead: step n + 1 is published, then step n collected."""
        outstanding = [self._publish()]
        for number in range(OUTPUT_LEN - 2):
            self._is_counting = number >= WARM_UP_STEPS
            outstanding.append(self._publish())
            time.sleep(REPLY_S)
            output = self._timed("collect", self._collect)
            updates = self._timed("update", self._scheduler.update, outstanding.pop(0), output)
            moved = self._timed("detokenize", lambda updates=updates: list(self._front.apply(updates)))
            self._timed("outputs", lambda moved=moved: [request.output("cumulative") for request, _, _ in moved])
        return self.times

    def _publish(self) -> Any:
        scheduled = self._timed("schedule", self._scheduler.schedule)
        assert scheduled is not None
        self._timed("encode", self._encoder.encode_into, scheduled.message, self._buffer)
        self._timed("publish", self._channel.publish, scheduled.message, 10.0)
        return scheduled

    def _collect(self) -> StepOutput:
        received = self._channel.receive(30.0)
        assert received is not None and isinstance(received[1], StepOutput)
        return received[1]

    def _timed(self, part: str, call: Callable[..., Value], *arguments: Any) -> Value:
        begin = time.perf_counter()
        value = call(*arguments)
        if self._is_counting:
            self.times[part].append(time.perf_counter() - begin)
        return value


def measure_workers(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Host time of every rank's worker per decode step of as many sequences."""
    case = Case(arguments.sequences, INPUT_LEN, OUTPUT_LEN)
    with tempfile.TemporaryDirectory(prefix="geometry-") as scratch:
        folder = geometries.write_folder(arguments.geometry, Path(scratch) / arguments.geometry)
        setting = Setting(
            geometry=arguments.geometry,
            folder=folder,
            device="cuda",
            repetitions=1,
            max_model_len=INPUT_LEN + OUTPUT_LEN,
            max_num_seqs=arguments.sequences,
            max_num_batched_tokens=None,
            cuda_graphs=True,
            tokenizer=None,
            peer_python=None,
        )
        for tp in arguments.tp:
            found, why = measure_ranks(setting, tp, case, RANKS_TIMEOUT_S, profile=False)
            for row in found:
                print(f"worker tp={tp} rank {row['rank']}: {row['host_us']} µs of {row['wall_us']} µs per decode step")
                result["workers"].append({**row, "geometry": arguments.geometry})
            if why is not None:
                print(f"worker tp={tp}: not measured: {why}")
                result["not_measured"].append({"way": "worker", "tp": tp, "why": why})


def print_parts(result: dict[str, Any]) -> None:
    """The table."""
    print(f"{result['question']}, against {result['budget_us']:.0f} µs\n")
    print(f"{'':12} {'p50':>8} {'p90':>8} {'p99':>8}")
    parts = result["parts_us"]
    for name in PARTS:
        print(f"{name:12} {parts[name]['p50']:8.1f} {parts[name]['p90']:8.1f} {parts[name]['p99']:8.1f}")
    total = result["total_us"]
    share = f"  {100 * result['share_of_budget']:.0f} % of the budget"
    print(f"{'all':12} {total['p50']:8.1f} {total['p90']:8.1f} {total['p99']:8.1f}{share}")
    for name, note in BESIDE.items():
        print(f"{name:12} {parts[name]['p50']:8.1f} {parts[name]['p90']:8.1f} {parts[name]['p99']:8.1f}  {note}")


if __name__ == "__main__":
    main()
