"""Log-probabilities of chosen and likeliest tokens, as they travel in a `StepOutput`.

Runs in: worker.
"""

from __future__ import annotations

import torch

from zmqexec.protocol import Logprobs

POSITIONS_AT_ONCE = 256
"""Bounds the memory of a prompt's log-probabilities: this many rows of the vocabulary at a time."""


class LogprobsBuilder:
    """Collects consecutive positions of one row of a step.

    row    as in `protocol.Logprobs`
    count  likeliest tokens per position besides the chosen one; -1: the whole vocabulary
    """

    def __init__(self, row: int, count: int) -> None:
        self._row = row
        self._count = count
        self._width = 0
        self._token_ids: list[bytes] = []
        self._values: list[bytes] = []
        self._ranks: list[bytes] = []

    def add(self, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        """Append positions.

        logits  [num_positions, vocab]  float32, as the model gave them
        chosen  [num_positions]         int64
        """
        logprobs = logits.log_softmax(dim=1)
        of_chosen = logprobs.gather(1, chosen.unsqueeze(1))
        ranks = (logprobs > of_chosen).sum(1) + 1
        vocab = logits.shape[1]
        if self._count == -1:
            values, ids = logprobs, torch.arange(vocab).expand(len(logits), -1)
        else:
            values, ids = logprobs.topk(min(self._count, vocab), dim=1)
        ids = torch.cat([chosen.unsqueeze(1), ids], dim=1)
        self._width = ids.shape[1]
        self._token_ids.append(ids.numpy().astype("<i4").tobytes())
        self._values.append(torch.cat([of_chosen, values], dim=1).numpy().astype("<f4").tobytes())
        self._ranks.append(ranks.numpy().astype("<i4").tobytes())

    def build(self) -> Logprobs:
        """All positions added so far."""
        return Logprobs(
            row=self._row,
            width=self._width,
            token_ids=b"".join(self._token_ids),
            values=b"".join(self._values),
            ranks=b"".join(self._ranks),
        )
