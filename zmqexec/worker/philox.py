"""Random numbers as a pure function: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Runs in: worker. No state: the number of a sample depends on its request's seed, its index and its position, and on
nothing that happened before, so that a seeded request gives the same tokens in any batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UIntArray = npt.NDArray[np.uint64]

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter: UIntArray, key: UIntArray) -> UIntArray:
    """Ten rounds of Philox4x32.

    counter  [4, n]  uint64 words < 2**32
    key      [2, n]  uint64 words < 2**32
    returns  [4, n]  uint64 words < 2**32
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (second >> HALF) ^ c1 ^ k0, second & LOW, (first >> HALF) ^ c3 ^ k1, first & LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return np.stack([c0, c1, c2, c3])


def uniforms(
    seeds: UIntArray, sample_indices: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each (seed, sample index, position).

    seeds           [n]  uint64
    sample_indices  [n]  in [0, 2**32)
    positions       [n]  index of the token in its sequence, in [0, 2**32)
    """
    zeros = np.zeros_like(seeds)
    counter = np.stack([positions.astype(np.uint64), sample_indices.astype(np.uint64), zeros, zeros])
    words = philox4x32(counter, np.stack([seeds & LOW, seeds >> HALF]))
    mantissas: npt.NDArray[np.float64] = ((words[0] << HALF | words[1]) >> np.uint64(11)).astype(np.float64)
    return mantissas * 2.0**-53
