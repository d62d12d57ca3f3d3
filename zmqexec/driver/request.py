"""One sequence from arrival to its last token, as the driver sees it.

Runs in: driver.
"""

from __future__ import annotations

import array
import time

from zmqexec.config import SamplingParams
from zmqexec.driver.block_pool import chain_hash, root_hash
from zmqexec.protocol import Admission, NewRequest, Sampling, pack, unpack


class Request:
    """The state of one sequence. Positions are half-open ranges:

    [0, num_computed)                  their KV is in the cache, or will be once the outstanding steps have run
    [0, len(token_ids))                token values known to the driver
    [len(token_ids), num_computed + 1) sampled by outstanding steps, once the prefill is scheduled; the values are
                                       still on the workers
    [0, prefill_end)                   known at admission, computed by prefill rows; later ones by decode rows
    [0, num_hashed_blocks) blocks      offered to the prefix cache
    """

    def __init__(
        self,
        new: NewRequest,
        arrival: int,
        seed: int,
        eos_token_ids: list[int],
        max_model_len: int,
        longest_shared_prompt: int | None = None,
    ) -> None:
        params = new.params
        self.request_id = new.request_id
        self.arrival = arrival
        self.params = params
        self.token_ids = array.array("i", unpack(new.prompt_token_ids))
        self.num_prompt = len(self.token_ids)
        self.max_len = max_model_len
        if params.max_tokens is not None:
            self.max_len = min(max_model_len, self.num_prompt + params.max_tokens)
        self.eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self.stop_token_ids = frozenset(params.stop_token_ids or ())
        self.end_token_ids = self.eos_token_ids | self.stop_token_ids
        self.sampling = worker_sampling(params, seed, new.sample_index, self.end_token_ids)

        self.num_computed = 0
        self.last_step_id = -1
        """The last step that names this sequence; its slot and blocks stay its own until that one is collected."""
        self.prefill_end = 0
        self.slot = -1
        self.block_table: list[int] = []
        self.finish_reason: str | None = None

        shared = longest_shared_prompt is None or self.num_prompt <= longest_shared_prompt
        self._last_hash = root_hash(new.cache_salt, None if shared else self.num_prompt)
        self._block_hashes: list[bytes] = []
        self.num_hashed_blocks = 0

        self.num_cached_tokens = 0
        self.num_prompt_logprobs = 0
        self.arrived_at = time.monotonic()
        self.queue_s: float | None = None

    @property
    def num_output(self) -> int:
        """Output tokens known to the driver."""
        return len(self.token_ids) - self.num_prompt

    @property
    def is_prefilling(self) -> bool:
        """True until a prefill row has been scheduled for every token known at admission."""
        return self.num_computed < self.prefill_end

    def block_hashes(self, block_size: int) -> list[bytes]:
        """The chained hashes of all full blocks of known tokens."""
        for index in range(len(self._block_hashes), len(self.token_ids) // block_size):
            tokens = self.token_ids[index * block_size : (index + 1) * block_size]
            self._last_hash = chain_hash(self._last_hash, tokens.tobytes())
            self._block_hashes.append(self._last_hash)
        return self._block_hashes

    def admit(self, slot: int, block_table: list[int], num_cached: int) -> Admission:
        """Enter the batch; the first `num_cached` tokens are in the first blocks already."""
        self.slot = slot
        self.block_table = block_table
        self.num_computed = num_cached
        self.prefill_end = len(self.token_ids)
        if self.queue_s is None:
            self.queue_s = time.monotonic() - self.arrived_at
            self.num_cached_tokens = num_cached
        return Admission(
            slot=slot,
            token_ids=pack(self.token_ids),
            num_prompt=self.num_prompt,
            num_computed=num_cached,
            block_table=pack(block_table),
            sampling=self.sampling,
        )

    def evict(self) -> None:
        """Leave the batch without being finished: all tokens will be computed again."""
        self.slot = -1
        self.block_table = []
        self.num_computed = 0
        self.prefill_end = 0
        self.num_hashed_blocks = 0

    def stop_check(self, token: int) -> tuple[str | None, int | None]:
        """(finish_reason, stop_reason) after `token` was appended; (None, None) to go on."""
        if self.num_output > self.params.min_tokens:
            if token in self.eos_token_ids:
                return "stop", None
            if token in self.stop_token_ids:
                return "stop", token
        if len(self.token_ids) >= self.max_len:
            return "length", None
        return None, None


def worker_sampling(
    params: SamplingParams, seed: int, sample_index: int, end_token_ids: frozenset[int]
) -> Sampling | None:
    """What workers need of `params`; None where they only take the likeliest token."""
    sampling = Sampling(
        temperature=0.0 if params.greedy else float(params.temperature),
        top_p=1.0 if params.greedy else float(params.top_p),
        top_k=0 if params.greedy else max(params.top_k, 0),
        min_p=0.0 if params.greedy else float(params.min_p),
        seed=0 if params.greedy else seed,
        sample_index=0 if params.greedy else sample_index,
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        repetition_penalty=float(params.repetition_penalty),
        logit_bias={int(token): float(bias) for token, bias in params.logit_bias.items()}
        if params.logit_bias
        else None,
        min_tokens=params.min_tokens,
        end_token_ids=pack(sorted(end_token_ids)) if params.min_tokens else b"",
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )
    return None if sampling == Sampling() else sampling
