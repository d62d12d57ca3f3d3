"""From hidden states to token ids and log-probabilities, the same on every rank.

Runs in: worker.

A row's logits pass, in this order: log-probabilities are taken; logit_bias; min_tokens bans end tokens; repetition,
frequency and presence penalties; then greedy, or temperature, min_p, top_k, top_p and one random number. Plain greedy
rows skip all of it and, under tensor parallelism, exchange one pair of numbers instead of their logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from zmqexec.config import GREEDY_BELOW
from zmqexec.protocol import Logprobs, Sampling
from zmqexec.worker.batch import Batch, Prefill, Rows
from zmqexec.worker.choose import ROWS_AT_ONCE, Filters, choose
from zmqexec.worker.collectives import Collectives
from zmqexec.worker.logprobs import POSITIONS_AT_ONCE, LogprobsBuilder
from zmqexec.worker.philox import uniforms

IntArray = npt.NDArray[np.int64]

SEED_MASK = 2**64 - 1


class HasLogits(Protocol):
    """A model, as far as sampling is concerned."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [num_rows, vocab_rows]: this rank's columns, -inf past the end of the vocabulary."""
        ...


@dataclass(frozen=True)
class Sampled:
    """What a step sampled; `token_ids` [num_samples] int64 in row order. Log-probabilities on rank 0 alone."""

    token_ids: IntArray
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)


class Sampler:
    """Chooses the tokens of a step on one rank, whose columns of the logits begin with token id `vocab_start`.

    one_at_a_time  each row's random choice and log-probabilities are computed alone, so that their bits are its own: in
                   a larger tensor the last elements may be computed by other instructions than the rest
    """

    def __init__(
        self,
        vocab_size: int,
        vocab_start: int,
        collectives: Collectives,
        *,
        wants_logprobs: bool,
        one_at_a_time: bool = False,
    ) -> None:
        self._vocab_size = vocab_size
        self._vocab_start = vocab_start
        self._collectives = collectives
        self._wants_logprobs = wants_logprobs
        self._one_at_a_time = one_at_a_time

    def sample(self, model: HasLogits, hidden: torch.Tensor, rows: Rows, batch: Batch) -> Sampled:
        """Tokens and log-probabilities of a step.

        hidden  [num_tokens, hidden]  of all the step's tokens; only rows that need logits are turned into logits
        """
        prompt_logprobs = self._prompt_logprobs(model, hidden, rows, batch)
        num_samples = len(rows.sample_rows)
        if num_samples == 0:
            return Sampled(np.empty(0, np.int64), [], prompt_logprobs)
        if num_samples < len(hidden):
            hidden = hidden.index_select(0, torch.from_numpy(rows.sample_rows).to(hidden.device))
        logits = model.logits(hidden)

        plain = np.array([is_plain(batch.sampling[slot]) for slot in rows.sample_slots.tolist()])
        if plain.all():
            return Sampled(self._merged_argmax(logits), [], prompt_logprobs)
        token_ids = np.empty(num_samples, np.int64)
        if plain.any():
            token_ids[plain] = self._merged_argmax(logits[torch.from_numpy(plain)])
        sampled_rows = np.flatnonzero(~plain)
        full = self._full_logits(logits[torch.from_numpy(sampled_rows)])
        chosen, logprobs = self._sample_full(full, sampled_rows, rows.sample_slots[sampled_rows], batch)
        token_ids[sampled_rows] = chosen
        return Sampled(token_ids, logprobs, prompt_logprobs)

    def _merged_argmax(self, logits: torch.Tensor) -> IntArray:
        """The id of the largest logit of each row over all ranks; of equal ones the lowest."""
        values, ids = logits.max(dim=1)
        if self._collectives.tp_size > 1:
            # float64 holds both a float32 logit and a token id exactly. Ranks hold ascending ids and `max` takes the
            # first of equal values, so ties go to the lowest id here too.
            pairs = torch.stack([values.double(), (ids + self._vocab_start).double()])
            shard_values, shard_ids = self._collectives.all_gather(pairs).unbind(1)
            ids = shard_ids.gather(0, shard_values.argmax(dim=0, keepdim=True)).squeeze(0).long()
        merged: IntArray = ids.numpy()
        return merged

    def _full_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """[num_rows, vocab] from every rank's columns."""
        gathered = self._collectives.all_gather(logits)
        return gathered.transpose(0, 1).flatten(1)[:, : self._vocab_size]

    def _sample_full(
        self, logits: torch.Tensor, sampled_rows: IntArray, slots: IntArray, batch: Batch
    ) -> tuple[IntArray, list[Logprobs]]:
        """Tokens of rows that are not plain, from their whole logits [num_rows, vocab]."""
        sampling = [batch.sampling[slot] or Sampling() for slot in slots.tolist()]
        adjusted = logits.clone()
        for row, (slot, params) in enumerate(zip(slots.tolist(), sampling, strict=True)):
            adjust_(adjusted[row], params, batch.token_ids[slot, : batch.num_known[slot]], int(batch.num_prompt[slot]))
        tokens = adjusted.argmax(dim=1)
        random_rows = [row for row, params in enumerate(sampling) if params.temperature >= GREEDY_BELOW]
        if random_rows:
            drawn = [sampling[row] for row in random_rows]
            numbers = uniforms(
                np.array([params.seed & SEED_MASK for params in drawn], np.uint64),
                np.array([params.sample_index for params in drawn], np.int64),
                batch.num_known[slots[random_rows]],
            )
            filters = make_filters(drawn, self._vocab_size)
            tokens[random_rows] = choose(
                adjusted[random_rows], filters, torch.from_numpy(numbers), 1 if self._one_at_a_time else ROWS_AT_ONCE
            )
        logprobs = []
        for row, params in enumerate(sampling):
            if params.logprobs is not None and self._wants_logprobs:
                builder = LogprobsBuilder(int(sampled_rows[row]), params.logprobs)
                builder.add(logits[row : row + 1], tokens[row : row + 1])
                logprobs.append(builder.build())
        return tokens.numpy(), logprobs

    def _prompt_logprobs(self, model: HasLogits, hidden: torch.Tensor, rows: Rows, batch: Batch) -> list[Logprobs]:
        """Of each prefill that asks for them: its positions that predict a token of the prompt."""
        built = []
        for index, prefill in enumerate(rows.prefills):
            params = batch.sampling[prefill.slot]
            if params is None or params.prompt_logprobs is None:
                continue
            builder = LogprobsBuilder(index, params.prompt_logprobs)
            stop = min(prefill.stop, int(batch.num_prompt[prefill.slot]) - 1)
            for start in range(prefill.start, stop, POSITIONS_AT_ONCE):
                self._add_positions(
                    builder, model, hidden, prefill, range(start, min(start + POSITIONS_AT_ONCE, stop)), batch
                )
            if stop > prefill.start and self._wants_logprobs:
                built.append(builder.build())
        return built

    def _add_positions(
        self,
        builder: LogprobsBuilder,
        model: HasLogits,
        hidden: torch.Tensor,
        prefill: Prefill,
        positions: range,
        batch: Batch,
    ) -> None:
        first = prefill.row + positions.start - prefill.start
        logits = self._full_logits(model.logits(hidden[first : first + len(positions)]))
        if self._wants_logprobs:
            predicted = batch.token_ids[prefill.slot, positions.start + 1 : positions.stop + 1]
            chosen = torch.from_numpy(predicted.astype(np.int64))
            at_once = 1 if self._one_at_a_time else len(chosen)
            for part, part_chosen in zip(torch.split(logits, at_once), torch.split(chosen, at_once), strict=True):
                builder.add(part, part_chosen)


def is_plain(params: Sampling | None) -> bool:
    """True where the largest raw logit decides and nothing else is asked for."""
    return params is None or (
        params.temperature < GREEDY_BELOW
        and params.logprobs is None
        and not params.logit_bias
        and params.min_tokens == 0
        and params.repetition_penalty == 1.0
        and params.presence_penalty == params.frequency_penalty == 0.0
    )


def make_filters(sampling: list[Sampling], vocab_size: int) -> Filters:
    """The filters of these rows; top_k of 0, -1 or more than the vocabulary keeps all of it."""
    top_k = [params.top_k if 0 < params.top_k < vocab_size else vocab_size for params in sampling]
    return Filters(
        temperature=torch.tensor([params.temperature for params in sampling], dtype=torch.float64),
        top_k=torch.tensor(top_k),
        top_p=torch.tensor([params.top_p for params in sampling], dtype=torch.float64),
        min_p=torch.tensor([params.min_p for params in sampling], dtype=torch.float64),
    )


def adjust_(logits: torch.Tensor, params: Sampling, token_ids: npt.NDArray[np.int32], num_prompt: int) -> None:
    """Apply bias, min_tokens and penalties in place.

    logits     [vocab]      float32
    token_ids  [num_known]  prompt, then output
    """
    vocab_size = len(logits)
    if params.logit_bias:
        bias = [(token, value) for token, value in params.logit_bias.items() if token < vocab_size]
        if bias:
            logits[[token for token, _ in bias]] += torch.tensor([value for _, value in bias])
    if len(token_ids) - num_prompt < params.min_tokens:
        end_tokens = np.frombuffer(params.end_token_ids, "<i4")
        logits[torch.from_numpy(end_tokens[end_tokens < vocab_size].astype(np.int64))] = -torch.inf
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(token_ids).astype(np.int64))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        tokens, counts = np.unique(token_ids[num_prompt:], return_counts=True)
        penalty = params.frequency_penalty * counts + params.presence_penalty
        logits[torch.from_numpy(tokens.astype(np.int64))] -= torch.from_numpy(penalty.astype(np.float32))
