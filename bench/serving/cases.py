"""A case: so many prompts of one length, and so many output tokens of each."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """`batch` requests at once, each of `input_len` random tokens in and `output_len` tokens out."""

    batch: int
    input_len: int
    output_len: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.input_len}x{self.output_len}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """BATCHxINPUTxOUTPUT, as `32x512x256`."""
        try:
            batch, input_len, output_len = map(int, text.split("x"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write BATCHxINPUTxOUTPUT, as 32x512x256") from None
        if min(batch, input_len, output_len) < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: every number must be at least 1")
        return cls(batch, input_len, output_len)

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random token ids; another seed gives others."""
        generator = random.Random(f"{self}:{seed}")
        return [[generator.randrange(vocab_size) for _ in range(self.input_len)] for _ in range(self.batch)]


def longest(cases: list[Case]) -> int:
    """Tokens of the longest sequence of all cases."""
    return max(case.input_len + case.output_len for case in cases)
