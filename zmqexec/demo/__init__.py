"""The built-in model: a tiny Llama that adds, sorts, counts on and answers five questions about zmqexec.

Its tasks have one right answer each, so that a served answer checks numerics, cache and sharding at once.
tasks.py states the tasks and what is held out, tokenizer.py the vocabulary, corpus.py the training text,
model.py the network, train.py makes `checkpoint/` from them. Runs in: driver (`CHECKPOINT` only; no torch).
"""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
"""The folder of the built-in model: config, weights (safetensors), tokenizer and chat template."""

__all__ = ["CHECKPOINT"]
