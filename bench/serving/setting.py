"""What a run of cases is given: parsed once, then passed along."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geometries import GEOMETRIES

from serving.cases import Case, longest

WAYS = ("zmqexec", "vllm", "transformers")
ROUND_TO = 64


@dataclass(frozen=True)
class Setting:
    """The engine's settings that all ways share.

    folder         holds the geometry's config.json
    max_num_seqs   sequences at the same time: the default of `EngineConfig`, or more where a case needs more
    peer_python    interpreter that has the peers; None: this one
    """

    geometry: str
    folder: Path
    device: str
    repetitions: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int | None
    cuda_graphs: bool
    tokenizer: str | None
    peer_python: str | None

    def engine_settings(self, tp: int, run_ahead: int) -> dict[str, Any]:
        """Keyword arguments of `Engine`. Without prefix caching: every repetition computes everything."""
        settings: dict[str, Any] = {
            "tensor_parallel_size": tp,
            "load_format": "dummy",
            "device": self.device,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "run_ahead": run_ahead,
            "cuda_graphs": self.cuda_graphs,
            "enable_prefix_caching": False,
        }
        if self.max_num_batched_tokens is not None:
            settings["max_num_batched_tokens"] = self.max_num_batched_tokens
        if self.tokenizer is not None:
            settings["tokenizer"] = self.tokenizer
        return settings


def add_arguments(parser: argparse.ArgumentParser, default_cases: list[str], repetitions: int) -> None:
    """The options that latency.py and throughput.py share."""
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="llama-2-7b")
    parser.add_argument("--tp", type=int, nargs="+", default=[1], help="tensor-parallel sizes, one engine each")
    parser.add_argument(
        "--cases",
        type=Case.parse,
        nargs="+",
        default=[Case.parse(case) for case in default_cases],
        help="BATCHxINPUTxOUTPUT",
    )
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="what to measure; default: all")
    parser.add_argument("--run-ahead", type=int, nargs="+", default=[1], help="steps; an engine for each")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repetitions", type=int, default=repetitions)
    parser.add_argument("--max-model-len", type=int, help="default: what the longest case needs")
    parser.add_argument("--max-num-batched-tokens", type=int, help="of our engine; default: its own")
    parser.add_argument("--tokenizer", help="folder; default: none, outputs are token ids")
    parser.add_argument("--peer-python", help="interpreter that has the peers installed; default: this one")
    parser.add_argument("--copy-tb-per-s", type=float, help="of a GPU, for the roofline; default: it is measured")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="what has not begun by then is left out")
    parser.add_argument("--label", default="local", help="of the file in --out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder for the JSON")


def setting_of(arguments: argparse.Namespace, folder: Path, default_max_num_seqs: int) -> Setting:
    """What the options say, with what follows from the cases filled in."""
    needed = -(-longest(arguments.cases) // ROUND_TO) * ROUND_TO
    limit = GEOMETRIES[arguments.geometry]["max_position_embeddings"]
    return Setting(
        geometry=arguments.geometry,
        folder=folder,
        device=arguments.device,
        repetitions=arguments.repetitions,
        max_model_len=arguments.max_model_len or min(needed, limit),
        max_num_seqs=max(default_max_num_seqs, *(case.batch for case in arguments.cases)),
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        cuda_graphs=not arguments.no_cuda_graphs,
        tokenizer=arguments.tokenizer,
        peer_python=arguments.peer_python,
    )
