"""Sampling: the distribution, every parameter, and independence of the batch and of the sharding."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.step_driver import ThreadCollectives
from zmqexec.protocol import Sampling, pack
from zmqexec.worker import choose as choose_module
from zmqexec.worker.batch import Batch
from zmqexec.worker.choose import choose
from zmqexec.worker.collectives import LocalCollectives
from zmqexec.worker.philox import philox4x32, uniforms
from zmqexec.worker.sampler import Sampler, is_plain, make_filters

VOCAB = 10
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.7, 0.4, 0.0, -0.3, -1.0, -2.0, -3.0])

# Critical values of the chi-square distribution at p = 1e-4, by degrees of freedom.
CHI_SQUARE_LIMIT = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 9: 33.72}


class Shard:
    """A model whose hidden states are its logits, of which it shows the columns of one rank."""

    def __init__(self, columns: slice = slice(None), width: int = VOCAB) -> None:
        self._columns = columns
        self._width = width

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        own = hidden[:, self._columns].clone()
        padding = torch.full((len(own), self._width - own.shape[1]), -torch.inf)
        return torch.cat([own, padding], dim=1)


def make_batch(rows, vocab=VOCAB):
    """A batch with one slot for each of `rows`: (sampling, prompt, output)."""
    batch = Batch(max_num_seqs=len(rows), max_model_len=64, block_size=64, num_cache_blocks=len(rows))
    for slot, (sampling, prompt, output) in enumerate(rows):
        batch.token_ids[slot, : len(prompt) + len(output)] = prompt + output
        batch.num_prompt[slot] = len(prompt)
        batch.num_known[slot] = len(prompt) + len(output)
        batch.sampling[slot] = sampling
    return batch


def sample(rows, logits, collectives=None, model=None, vocab_start=0, wants_logprobs=True):
    """Sample one token for each of `rows` from `logits` [num_rows, vocab]."""
    everything = np.arange(len(rows))
    step = SimpleNamespace(prefills=[], sample_rows=everything, sample_slots=everything)
    sampler = Sampler(logits.shape[1], vocab_start, collectives or LocalCollectives(), wants_logprobs=wants_logprobs)
    return sampler.sample(model or Shard(width=logits.shape[1]), logits, step, make_batch(rows))


def token(sampling, logits=LOGITS, prompt=(9,), output=()):
    """The token that `sampling` draws from `logits` after this prompt and output."""
    return int(sample([(sampling, list(prompt), list(output))], logits.unsqueeze(0)).token_ids[0])


def drawn(count=300, logits=LOGITS, **params):
    """The set of tokens drawn with `count` seeds."""
    rows = [(Sampling(seed=seed, **params), [9], []) for seed in range(count)]
    return set(sample(rows, logits.expand(count, -1)).token_ids.tolist())


# ── random numbers ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, expected):
    words = [np.array([[int(word, 16)] for word in text.split()], np.uint64) for text in (counter, key)]
    assert " ".join(f"{int(word):08x}" for word in philox4x32(*words)[:, 0]) == expected


def test_a_random_number_depends_on_seed_index_and_position_alone():
    seeds = np.array([1, 1, 1, 2, 2**63 + 1, 2**64 - 1], np.uint64)
    indices = np.array([0, 1, 0, 0, 0, 0])
    positions = np.array([5, 5, 6, 5, 5, 5])
    together = uniforms(seeds, indices, positions)
    alone = [uniforms(seeds[i : i + 1], indices[i : i + 1], positions[i : i + 1])[0] for i in range(6)]
    assert together.tolist() == alone
    assert len(set(alone)) == 6
    assert all(0 <= number < 1 for number in alone)


# ── the distribution ────────────────────────────────────────────────────────────────────────────────────────────────


def filtered_softmax(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution that the parameters define, written out token by token."""
    scaled = logits.double().numpy() / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    kept = [i for i in order if probs[i] >= min_p * probs.max()][: top_k if top_k > 0 else None]
    mass, result, heavier = sum(probs[i] for i in kept), np.zeros(len(probs)), 0.0
    for i in kept:
        if top_p < 1 and heavier >= top_p * mass:
            break
        result[i] = probs[i]
        heavier += probs[i]
    return result / result.sum()


@pytest.mark.parametrize("num_candidates", [512, 4])
@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.3}, {"top_k": 6, "top_p": 0.7, "min_p": 0.1}],
    ids=str,
)
def test_tokens_follow_the_filtered_softmax(params, num_candidates, monkeypatch):
    monkeypatch.setattr(choose_module, "NUM_CANDIDATES", num_candidates)
    monkeypatch.setattr(choose_module, "ROWS_AT_ONCE", 4096)
    params = {"temperature": 1.0, **params}
    count = 20_000
    filters = make_filters([Sampling(**params)] * count, VOCAB)
    numbers = uniforms(np.arange(count, dtype=np.uint64), np.zeros(count, np.int64), np.full(count, 3))
    tokens = choose(LOGITS.expand(count, -1), filters, torch.from_numpy(numbers)).numpy()
    expected = filtered_softmax(LOGITS, **params) * count
    observed = np.bincount(tokens, minlength=VOCAB)
    possible = expected > 0
    assert (observed[~possible] == 0).all()
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < CHI_SQUARE_LIMIT[int(possible.sum()) - 1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    temperature=st.sampled_from([0.01, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 8, 9, 20, 200]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    ties=st.booleans(),
)
def test_a_few_ranked_candidates_decide_as_the_whole_vocabulary_does(seed, temperature, top_k, top_p, min_p, ties):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((6, 60), generator=generator) * 2
    if ties:
        logits = logits.round()
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    filters = make_filters([Sampling(**params)] * 6, 60)
    numbers = torch.rand(6, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_module, "NUM_CANDIDATES", 9)
        few = choose(logits, filters, numbers)
    assert few.tolist() == choose(logits, filters, numbers).tolist()
    for row in range(6):
        probs = filtered_softmax(logits[row], **params)
        order = sorted(range(60), key=lambda i: (-probs[i], i))
        cumulative = np.cumsum(probs[order])
        margin = np.abs(cumulative - float(numbers[row])).min()
        if margin > 1e-9:
            assert int(few[row]) == order[int((cumulative > float(numbers[row])).argmax())]


def test_the_largest_uniform_number_picks_the_last_token_kept():
    filters = make_filters([Sampling(temperature=1.0, top_k=3)], VOCAB)
    assert choose(LOGITS.unsqueeze(0), filters, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 2


# ── parameters ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_zero_temperature_is_greedy_and_a_high_one_reaches_every_token():
    assert drawn(temperature=0.0) == {0}
    assert drawn(temperature=0.05) == {0}
    assert drawn(temperature=20.0) == set(range(VOCAB))


def test_top_k_keeps_the_k_likeliest():
    assert drawn(temperature=5.0, top_k=3) == {0, 1, 2}
    assert drawn(temperature=5.0, top_k=-1) == drawn(temperature=5.0, top_k=99) == set(range(VOCAB))


def test_top_k_keeps_the_lower_ids_of_equal_logits():
    assert drawn(temperature=1.0, top_k=3, logits=torch.zeros(VOCAB)) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probs = LOGITS.softmax(0)
    assert drawn(temperature=1.0, top_p=float(probs[:2].sum()) - 1e-3) == {0, 1}
    assert drawn(temperature=1.0, top_p=float(probs[:2].sum()) + 1e-3) == {0, 1, 2}
    assert drawn(temperature=1.0, top_p=1e-9) == {0}


def test_min_p_drops_tokens_far_below_the_likeliest():
    probs = LOGITS.softmax(0)
    assert drawn(temperature=1.0, min_p=float(probs[3] / probs[0]) - 1e-3) == {0, 1, 2, 3}


def test_seed_and_sample_index_change_the_draw():
    def sequence(**params):
        return [token(Sampling(temperature=1.0, **params), prompt=[9] * length) for length in range(1, 30)]

    assert sequence(seed=5) == sequence(seed=5)
    assert sequence(seed=5) != sequence(seed=6)
    assert sequence(seed=5, sample_index=0) != sequence(seed=5, sample_index=1)


def test_logit_bias_is_added():
    assert token(Sampling(logit_bias={8: 100.0})) == 8
    assert token(Sampling(logit_bias={0: -100.0})) == 1


def test_min_tokens_bans_the_end_tokens_until_enough_are_generated():
    params = Sampling(min_tokens=2, end_token_ids=pack([0, 1]))
    assert token(params) == 2
    assert token(params, output=[5]) == 2
    assert token(params, output=[5, 5]) == 0


def test_repetition_penalty_counts_prompt_and_output():
    params = Sampling(repetition_penalty=4.0)
    assert token(params, prompt=[9]) == 0
    assert token(params, prompt=[0]) == 1
    assert token(params, prompt=[0], output=[1]) == 2
    negative = torch.tensor([-1.0, -1.5, -9.0])
    assert token(params, negative, prompt=[0]) == 1


def test_presence_penalty_counts_a_token_of_the_output_once():
    params = Sampling(presence_penalty=0.6)
    assert token(params, prompt=[0, 0]) == 0
    assert token(params, output=[0, 0, 0]) == 1
    assert token(Sampling(presence_penalty=0.4), output=[0, 0, 0]) == 0


def test_frequency_penalty_counts_every_occurrence_in_the_output():
    params = Sampling(frequency_penalty=0.4)
    assert token(params, prompt=[0, 0]) == 0
    assert token(params, output=[0]) == 0
    assert token(params, output=[0, 0]) == 1


def test_penalties_come_before_sampling():
    params = Sampling(temperature=0.05, presence_penalty=2.0, seed=3)
    assert token(params, output=[0]) == 1


# ── log-probabilities ───────────────────────────────────────────────────────────────────────────────────────────────


def decoded(entry):
    return (
        np.frombuffer(entry.token_ids, "<i4").reshape(-1, entry.width),
        np.frombuffer(entry.values, "<f4").reshape(-1, entry.width),
        np.frombuffer(entry.ranks, "<i4"),
    )


def test_logprobs_are_of_the_raw_logits_with_the_chosen_token_first():
    params = Sampling(logprobs=3, logit_bias={8: 100.0}, temperature=0.5)
    sampled = sample([(None, [9], []), (params, [9], [])], LOGITS.expand(2, -1))
    (entry,) = sampled.logprobs
    ids, values, ranks = decoded(entry)
    assert entry.row == 1
    assert ids.tolist() == [[8, 0, 1, 2]]
    np.testing.assert_allclose(values[0], LOGITS.log_softmax(0)[[8, 0, 1, 2]], atol=1e-6)
    assert ranks.tolist() == [9]


@pytest.mark.parametrize(("count", "width"), [(0, 1), (2, 3), (99, VOCAB + 1), (-1, VOCAB + 1)])
def test_logprobs_count_sets_the_width(count, width):
    (entry,) = sample([(Sampling(logprobs=count), [9], [])], LOGITS.unsqueeze(0)).logprobs
    assert entry.width == width
    if count == -1:
        assert decoded(entry)[0][0].tolist() == [0, *range(VOCAB)]


# ── batches and shards ──────────────────────────────────────────────────────────────────────────────────────────────

MIXED = [
    (None, [1, 2], []),
    (Sampling(temperature=1.0, seed=11), [3], [4]),
    (Sampling(temperature=0.7, seed=12, top_p=0.9, top_k=5, frequency_penalty=0.5), [3, 3], [1, 1]),
    (Sampling(repetition_penalty=1.5, logprobs=4), [5], []),
    (None, [7], [8]),
    (Sampling(temperature=1.3, seed=2**64 - 1, min_p=0.1, logprobs=-1), [2], []),
]


def random_logits(rows, vocab=VOCAB):
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(4))


def test_a_row_gets_the_same_token_in_any_batch():
    logits = random_logits(len(MIXED))
    together = sample(MIXED, logits).token_ids.tolist()
    alone = [int(sample([row], logits[i : i + 1]).token_ids[0]) for i, row in enumerate(MIXED)]
    reverse = sample(MIXED[::-1], logits.flip(0)).token_ids.tolist()[::-1]
    assert together == alone == reverse


@pytest.mark.parametrize("tp_size", [2, 3, 4])
@pytest.mark.parametrize("rows", [MIXED, [(None, [1], [])] * 6], ids=["mixed", "plain greedy"])
def test_every_rank_of_a_shard_gets_the_tokens_of_the_whole(rows, tp_size):
    logits = random_logits(len(rows))
    logits[0, [2, 7]] = 9.0  # a tie across shards: the lower id wins
    expected = sample(rows, logits)
    width = -(-VOCAB // tp_size)
    results = [None] * tp_size

    def run(member):
        columns = slice(member.rank * width, min((member.rank + 1) * width, VOCAB))
        results[member.rank] = sample(
            rows, logits, member, Shard(columns, width), columns.start, wants_logprobs=member.rank == 0
        )

    threads = [threading.Thread(target=run, args=(member,)) for member in ThreadCollectives.group(tp_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in results:
        assert result.token_ids.tolist() == expected.token_ids.tolist()
    assert results[0].logprobs == expected.logprobs
    assert all(not result.logprobs for result in results[1:])
    if rows is not MIXED:
        assert results[0].token_ids[0] == 2


def test_only_rows_that_ask_for_nothing_are_plain():
    assert is_plain(None) and is_plain(Sampling()) and is_plain(Sampling(temperature=1e-6, top_p=0.5, seed=3))
    for params in (
        Sampling(temperature=0.5),
        Sampling(logprobs=0),
        Sampling(logit_bias={1: 1.0}),
        Sampling(min_tokens=1),
        Sampling(repetition_penalty=1.1),
        Sampling(presence_penalty=0.1),
        Sampling(frequency_penalty=0.1),
    ):
        assert not is_plain(params)
