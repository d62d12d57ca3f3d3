"""How long does a token take? Time to the first one and time per output token, beside the roofline and the peers.

    python bench/latency.py --geometry llama-2-7b --tp 1 2 --cases 1x5x1000 8x128x256 32x512x256
    python bench/latency.py --geometry tiny --cases 2x8x4 --ways zmqexec        # anywhere, to try it out

Random weights, random prompts, greedy, end tokens ignored. For each `--tp` and `--run-ahead` an engine is started
(seconds to its first token are a result, too) and runs every case a few times. TPOT is the mean step of the decode
window, in which the whole batch decodes and nothing else happens (serving/clock.py); `whole` is the same from
`generate`: its time less that of a call for one token, over the other tokens. The roofline reads the weights once at
the speed of a copy, measured in the same run, divided by tp.

vLLM and transformers run after ours, each in a process of its own; what is not installed or fails is left out and
named. The file is rewritten after every result.

`--profile` shows where a decode step's microseconds go: which share of it the device is busy, by marks around every
graph, with and without run-ahead (`--run-ahead 0 1`); what the host does; and what the kernels are for. `--ways
--profile` does that alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from serving.run import run
from serving.setting import add_arguments

CASES = ["1x5x1000", "8x128x256", "32x512x256", "128x512x128"]
QUESTION = "time to the first token and per output token of random prompts, greedy, on random weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, CASES, repetitions=3)
    parser.add_argument("--profile", action="store_true", help="what a decode step consists of; after all cases")
    arguments = parser.parse_args()
    run(arguments, "latency", QUESTION, whole_only=False, profile=arguments.profile)


if __name__ == "__main__":
    main()
