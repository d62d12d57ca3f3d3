"""Tokens from logits on the device: greedy, and temperature with top-k, top-p and min-p.

Runs in: worker. Everything else a request may ask for (penalties, biases, log-probabilities) is the host's sampler's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from zmqexec.config import GREEDY_BELOW
from zmqexec.protocol import Sampling
from zmqexec.worker.gpu.collectives import GpuCollectives
from zmqexec.worker.gpu.device import Device
from zmqexec.worker.gpu.ops import Ops
from zmqexec.worker.kernels.sample import allocate_params, params_of, sample
from zmqexec.worker.sampler import is_plain

IntArray = npt.NDArray[np.int64]


class DeviceSampler:
    """Chooses the tokens of a step; every rank arrives at the same ones."""

    def __init__(
        self,
        vocab_size: int,
        vocab_start: int,
        collectives: GpuCollectives,
        ops: Ops,
        num_slots: int,
        device: Device,
    ) -> None:
        self._vocab_size = vocab_size
        self._vocab_start = vocab_start
        self._collectives = collectives
        self._ops = ops
        self._device = device
        self._is_greedy = np.ones(num_slots, np.bool_)
        self._params = allocate_params(num_slots, device.torch_device)
        # A slot that has never sampled at random is greedy in a batch with ones that do.
        greedy = torch.from_numpy(params_of(None).view(np.uint8)).to(device.torch_device)
        self._params.copy_(greedy.expand(num_slots, -1))
        self._out = torch.zeros(num_slots, dtype=torch.int32, device=device.torch_device)

    def admit(self, slot: int, sampling: Sampling | None) -> bool:
        """Take in how `slot` samples from now on; True where only the host can do it."""
        self._is_greedy[slot] = sampling is None or sampling.temperature < GREEDY_BELOW
        if not is_plain(sampling) and (sampling is None or not is_device_samplable(sampling)):
            return True
        record = torch.from_numpy(params_of(sampling).view(np.uint8))
        if self._device.is_cuda:
            record = record.pin_memory()
        self._params[slot].copy_(record, non_blocking=True)
        return False

    def sample(
        self, logits: torch.Tensor, row_slots: torch.Tensor, known: torch.Tensor, slots: IntArray
    ) -> torch.Tensor:
        """The token of each row, int32 [num_rows].

        logits     [num_rows, vocab_rows]  float32, this rank's columns
        row_slots  [>= num_rows]           int32 on the device
        known      [>= num_rows]           int32 on the device, known tokens of each row's sequence
        slots      [num_rows]              the same slots, on the host
        """
        if self.is_greedy(slots):
            return self.greedy(logits)
        out = self._out[: len(slots)]
        logits = self.whole(logits)
        count = len(out)
        # No early start: a graph precedes it.
        sample(out, logits[:, : self._vocab_size], self._params, row_slots[:count], known[:count])
        return out

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """[num_rows, >= vocab_size] from every rank's columns."""
        if self._collectives.tp_size == 1:
            return logits
        return self._collectives.all_gather(logits.contiguous()).transpose(0, 1).flatten(1)

    def is_greedy(self, slots: IntArray) -> bool:
        """Whether `greedy` is all that these slots need."""
        return bool(self._is_greedy[slots].all())

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """The id of each row's largest logit over all ranks, int32; of equal ones the lowest. Can be captured."""
        out = self._out[: len(logits)]
        if self._collectives.tp_size == 1:
            self._ops.argmax(logits, out, None, 0)
            return out
        # float32 holds ids below 2**24 exactly. Ranks hold ascending ids and argmax takes the first of equal values.
        pairs = torch.empty((2, len(out)), dtype=torch.float32, device=logits.device)
        self._ops.argmax(logits, out, pairs[0], self._vocab_start)
        pairs[1] = out
        values, ids = self._collectives.all_gather(pairs).unbind(1)
        return out.copy_(ids.gather(0, values.argmax(dim=0, keepdim=True)).squeeze(0))


def is_device_samplable(sampling: Sampling) -> bool:
    """True where temperature and filters are all that is asked for."""
    return sampling.temperature >= GREEDY_BELOW and is_plain(
        Sampling(
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=sampling.logit_bias,
            min_tokens=sampling.min_tokens,
            logprobs=sampling.logprobs,
        )
    )
