"""Whether all ranks chose the same tokens: `EngineConfig.check_ranks`.

Runs in: worker. Ranks sample from bit-identical logits, so tokens that differ mean that a rank computes something else:
a broken GPU, or our bug.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from zmqexec.errors import InternalError


def check_ranks(step_id: int, token_ids: npt.NDArray[np.integer[Any]]) -> None:
    """`InternalError` with the first row whose tokens differ.

    token_ids  [tp_size, num_samples]  what every rank sampled in that step
    """
    rows = np.flatnonzero((token_ids != token_ids[0]).any(axis=0))
    if not len(rows):
        return
    chosen = ", ".join(f"rank {rank}: {token}" for rank, token in enumerate(token_ids[:, rows[0]].tolist()))
    more = f", and in {len(rows) - 1} more rows other ones too" if len(rows) > 1 else ""
    raise InternalError(f"step {step_id}: the ranks sampled different tokens in row {rows[0]} ({chosen}){more}")
