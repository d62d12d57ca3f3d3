"""How fast is the all-reduce between the GPUs of this machine, beside NCCL and torch's symmetric memory?

    python bench/allreduce.py [--label 2-h100]

First whether its sums are right, over a million replays of CUDA graphs too, then microseconds per call for sizes from
8 KiB to 1 MiB. Needs two GPUs. What is measured is gpu_kernels/all_reduce.py. Prints a table and writes
bench/results/allreduce-LABEL.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from serving.kernel_runs import add_arguments, run_script

QUESTION = "correctness and microseconds of an all-reduce between GPUs, beside NCCL and torch's symmetric memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    run_script("allreduce", QUESTION, ["all_reduce"], parser.parse_args())


if __name__ == "__main__":
    main()
