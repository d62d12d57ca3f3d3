"""How many output tokens per second, over the whole of a call?

    python bench/throughput.py [--repetitions 5]
    python bench/throughput.py --geometry llama-2-7b --tp 1 2 --cases 128x512x128

With `--cases`, and on a machine with GPUs (there `--cases 256x512x128` is the default): random weights and prompts;
`generate` as a whole, prefill included, then vLLM and transformers on the same cases, each in a process of its own. The
options are those of latency.py.

Else, or with `--device cpu`: the CPU, beside transformers `generate` on the same batch with the same threads in all,
every way taking turns (serving/cpu_comparison.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from serving.cases import Case
from serving.children import search_here_last
from serving.run import run
from serving.setting import add_arguments

from zmqexec.driver.gpus import num_visible_gpus, torch_cuda_version

CPU_RESULT = Path(__file__).parent / "results" / "throughput-cpu.json"
CPU_REPETITIONS = 5
GPU_REPETITIONS = 3
GPU_CASES = ["256x512x128"]
QUESTION = "output tokens per second of a whole call with random prompts, greedy, on random weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, default_cases=[], repetitions=0)
    parser.add_argument("--output", type=Path, default=CPU_RESULT, help="JSON of the CPU's comparison")
    arguments = parser.parse_args()
    has_gpus = num_visible_gpus() > 0 and torch_cuda_version() is not None
    if not arguments.cases and has_gpus and arguments.device != "cpu":
        arguments.cases = [Case.parse(case) for case in GPU_CASES]
    if not arguments.cases:
        search_here_last()
        # It imports torch, which whoever drives an engine on GPUs does not.
        from serving.cpu_comparison import compare

        compare(arguments.repetitions or CPU_REPETITIONS, arguments.output)
        return
    arguments.repetitions = arguments.repetitions or GPU_REPETITIONS
    run(arguments, "throughput", QUESTION, whole_only=True)


if __name__ == "__main__":
    main()
