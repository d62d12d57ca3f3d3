"""Does every CUDA kernel compute what it should on this GPU, and how fast is it beside its peers?

    python bench/kernels.py [paged_attention sample ...] [--label h100]

Runs `check(device)` and `measure(device)` of each module of bench/gpu_kernels, in a process of its own that may crash
or hang without taking the others along. The peers are columns or rows of their own: cuBLAS beside our matrix products,
FlashAttention-3 where it is installed and else torch's attention, torch's argmax and sort, NCCL and torch's symmetric
memory (allreduce.py runs those alone). Prints a table and writes bench/results/kernels-LABEL.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from serving.kernel_runs import add_arguments, kernel_modules, run_script

__version__ = "0"
"""transformers looks for a package `kernels`. Where it comes upon this file, it takes it for one that is too old."""

QUESTION = "correctness and times of the CUDA kernels, beside their peers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modules = kernel_modules()
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(modules)}; default: all")
    add_arguments(parser)
    arguments = parser.parse_args()
    for name in arguments.modules:
        if name not in modules:
            parser.error(f"{name}: choose from {', '.join(modules)}")
    run_script("kernels", QUESTION, arguments.modules or modules, arguments)


if __name__ == "__main__":
    main()
