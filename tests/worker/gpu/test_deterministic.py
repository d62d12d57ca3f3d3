"""A deterministic engine gives a request the same bits in any company. On the emulator; on a GPU where there is one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import linear

from tests.checkpoints import VARIANTS, make_checkpoint, random_prompts
from tests.worker.gpu.emulation import NUM_BLOCKS, EmulatedDevice, TorchCollectives, make_gpu_runner
from tests.worker.step_driver import StepDriver, ThreadCollectives
from zmqexec.errors import ConfigError
from zmqexec.protocol import Sampling
from zmqexec.worker.gpu import deterministic
from zmqexec.worker.gpu.graphs import DecodeGraphs, ladder
from zmqexec.worker.gpu.ops import DecodeAttention
from zmqexec.worker.kernels.decode_state import SlotState
from zmqexec.worker.kernels.paged_attention import MANY_ITEMS, choose_launch

BLOCK_SIZE = 16
NUM_TOKENS = 8
VOCAB = 128

MODELS = {
    "heads-of-64": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "heads-of-128": {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128},
    "padded-heads": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24, "attention_bias": True},
    "dynamic-ntk": VARIANTS["dynamic-ntk"],
}

CASES = [
    ("heads-of-64", "bfloat16", "emulated"),
    ("dynamic-ntk", "float16", "emulated"),
    ("heads-of-64", "float32", "emulated"),
    *(
        pytest.param((name, dtype, "cuda"), marks=pytest.mark.gpu)
        for name in MODELS
        for dtype in ("bfloat16", "float16", "float32")
    ),
]

SUBJECTS = {
    "greedy": None,
    "random": Sampling(temperature=0.9, top_p=0.95, seed=11),
    "on-the-host": Sampling(temperature=0.8, min_p=0.02, seed=12, logprobs=-1, prompt_logprobs=-1),
}
COMPANIONS = [
    None,
    Sampling(temperature=1.1, top_k=30, seed=3),
    Sampling(temperature=0.7, seed=4, frequency_penalty=0.4, logprobs=2),
    Sampling(prompt_logprobs=1),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    if request.param[2] == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return request.param


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    path = tmp_path_factory.mktemp(case[0])
    make_checkpoint(path, **MODELS[case[0]])
    return path


@pytest.fixture(scope="module")
def device(case):
    if case[2] == "emulated":
        return EmulatedDevice()
    from zmqexec.worker.gpu.device import CudaDevice

    return CudaDevice(0)


@pytest.fixture(autouse=True)
def short_splits(monkeypatch):
    """Prompts of the tests' size have several parts, and a prefill several launches."""
    monkeypatch.setattr(deterministic, "LEAST_SPLIT_TOKENS", 64)
    monkeypatch.setattr(deterministic, "PARTIAL_BYTES", 100_000)


@dataclass
class Outcome:
    """Of one request: its tokens, its keys and values, and the log-probabilities it asked for."""

    tokens: list[int]
    cache: list[torch.Tensor]
    prompt_logprobs: bytes
    logprobs: bytes

    def assert_same(self, other, *, computed_prompt=True):
        assert self.tokens == other.tokens
        assert all(torch.equal(_bits(one), _bits(two)) for one, two in zip(self.cache, other.cache, strict=True))
        assert self.logprobs == other.logprobs
        if computed_prompt:
            assert self.prompt_logprobs == other.prompt_logprobs
        else:
            assert self.prompt_logprobs.endswith(other.prompt_logprobs)


def _bits(tensor):
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32)


class Engine:
    """Drives the steps of one engine; the request that counts is in `slot`."""

    def __init__(self, folder, case, device, tp_size=1, *, on=True, num_prompt=130, **config):
        options = {"dtype": case[1], "device": device, "deterministic": on, "max_num_batched_tokens": 64, **config}
        if tp_size == 1:
            runners = [make_gpu_runner(folder, **options)]
        else:
            with ThreadPoolExecutor(tp_size) as pool:
                group = ThreadCollectives.group(tp_size)
                runners = list(pool.map(lambda member: make_gpu_runner(folder, member, **options), group))
        self.driver = StepDriver(runners, BLOCK_SIZE, NUM_BLOCKS)
        self.prompt, *self.others = random_prompts(VOCAB, [num_prompt, 9, 33, 70, 21], seed=5)

    def companions(self, first_slot):
        for slot, (prompt, sampling) in enumerate(zip(self.others, COMPANIONS, strict=True), start=first_slot):
            self.driver.admit(slot, prompt, sampling)

    def outcome(self, slot, logprobs=()):
        driver = self.driver
        blocks, offsets = driver.cache_rows(slot)
        return Outcome(
            driver.tokens[slot][len(self.prompt) :],
            [layer.cpu()[blocks, :, :, offsets] for runner in driver.runners for layer in runner._cache],
            b"".join(entry.values for entry in driver.prompt_logprobs[slot]),
            b"".join(entry.values for entry in [*logprobs, *driver.logprobs[slot]]),
        )

    def alone(self, sampling):
        self.driver.admit(0, self.prompt, sampling)
        self.driver.generate(NUM_TOKENS)
        return self.outcome(0)

    def preempted(self, sampling):
        driver, prompt = self.driver, self.prompt
        driver.admit(0, prompt, sampling)
        first = driver.generate(NUM_TOKENS // 2)[0]
        logprobs = driver.logprobs[0]
        driver.release(0)
        self.companions(2)
        driver.admit(1, prompt + first, sampling, num_prompt=len(prompt))
        driver.generate(NUM_TOKENS - NUM_TOKENS // 2, chunk=29)
        return self.outcome(1, logprobs)


@pytest.mark.parametrize(("subject", "tp_size"), [*((subject, 1) for subject in SUBJECTS), ("on-the-host", 2)])
def test_a_request_has_the_same_bits_in_any_company(folder, case, device, subject, tp_size):
    sampling = SUBJECTS[subject]
    if not device.is_cuda and case != CASES[0] and (subject, tp_size) != ("on-the-host", 1):
        pytest.skip("one geometry in all ways is enough for the emulator, which is slow")

    def engine(**config):
        return Engine(folder, case, device, tp_size, **config)

    expected = engine().alone(sampling)
    assert len(expected.tokens) == NUM_TOKENS

    together = engine()
    together.companions(0)
    together.driver.admit(9, together.prompt, sampling)
    together.driver.generate(NUM_TOKENS)
    expected.assert_same(together.outcome(9))

    chunked = engine(max_num_seqs=7, max_num_batched_tokens=32)
    chunked.companions(3)
    chunked.driver.admit(1, chunked.prompt, sampling)
    chunked.driver.generate(NUM_TOKENS, chunk=13, budget=30)
    expected.assert_same(chunked.outcome(1))

    expected.assert_same(engine().preempted(sampling))


@pytest.mark.parametrize("subject", ["random", "on-the-host"])
def test_a_prefix_from_the_cache_has_the_bits_of_one_computed_anew(folder, case, device, subject):
    if case[0] == "dynamic-ntk":
        pytest.skip("prompts beyond the model's own length share no cache")
    sampling = SUBJECTS[subject]
    expected = Engine(folder, case, device).alone(sampling)
    engine = Engine(folder, case, device)
    engine.driver.admit(0, engine.prompt[:81])
    engine.driver.generate(3, chunk=41)
    engine.companions(1)
    engine.driver.admit_with_prefix(7, engine.prompt, 0, 5, sampling)
    engine.driver.generate(NUM_TOKENS, chunk=20)
    expected.assert_same(engine.outcome(7), computed_prompt=False)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_padding_and_graphs_change_no_bit(folder, case, device, subject):
    """On the emulator, where there are no graphs, the same work is launched for as many rows as a graph would have."""
    if not device.is_cuda and case[1] == "float32":
        pytest.skip("float32 has no graphs")
    sampling = SUBJECTS[subject]
    expected = Engine(folder, case, device, cuda_graphs=False).alone(sampling)
    engine = Engine(folder, case, device)
    if not device.is_cuda:
        (runner,) = engine.driver.runners
        sizes = ladder(16)[2:]
        with torch.inference_mode():
            runner._logits_graphs = DecodeGraphs(Eager(), runner._decode_forward, sizes)
            runner._greedy_graphs = DecodeGraphs(Eager(), runner._decode_greedily, sizes)
    engine.driver.admit(3, engine.others[0])
    engine.driver.admit(5, engine.prompt, sampling)
    engine.driver.generate(NUM_TOKENS)
    expected.assert_same(engine.outcome(5))


def test_a_request_keeps_to_one_sampler_whatever_its_companions_want(folder, case, device):
    """The host's random choices are the device's but for rounding."""
    sampling = SUBJECTS["random"]
    expected = Engine(folder, case, device).alone(sampling)
    engine = Engine(folder, case, device)
    (runner,) = engine.driver.runners
    sample = runner._host_sampler.sample

    def otherwise(model, hidden, rows, batch):
        sampled = sample(model, hidden, rows, batch)
        sampled.token_ids[rows.sample_slots == 6] += 1
        return sampled

    runner._host_sampler.sample = otherwise
    engine.companions(0)
    engine.driver.admit(6, engine.prompt, sampling)
    engine.driver.generate(NUM_TOKENS)
    expected.assert_same(engine.outcome(6))


class Eager:
    """A device whose graphs launch their work anew."""

    def capture(self, launch, pool):
        class Graph:
            handle = 0
            replay = staticmethod(torch.inference_mode()(launch))  # a replay on the device asks no mode

        return Graph, launch()


def test_without_the_setting_a_preemption_changes_bits(folder, case, device):
    """What the tests above would find, in this very model."""
    if device.is_cuda:
        pytest.skip("how a library rounds on this GPU is its own affair")
    alone = Engine(folder, case, device, on=False).alone(None)
    preempted = Engine(folder, case, device, on=False).preempted(None)
    assert not all(torch.equal(_bits(one), _bits(two)) for one, two in zip(alone.cache, preempted.cache, strict=True))


# ── its parts ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_rows", [0, 1, 63, 64, 65, 200])
def test_products_of_fixed_rows_see_one_shape_and_zeros_for_what_is_missing(num_rows):
    seen = []

    def product(x):
        seen.append(x)
        return x * 2

    x = torch.randn(num_rows, 5)
    result = deterministic.by_fixed_rows(product, x)
    assert torch.equal(result, 2 * x) and result.is_contiguous()
    assert {part.shape for part in seen} == {(64, 5)} and len(seen) == max(1, -(-num_rows // 64))
    assert torch.cat(seen)[num_rows:].eq(0).all()


def test_a_row_of_fixed_rows_has_the_same_bits_beside_any_number_of_others():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator) for rows in (100, 240))

    def product(part):
        return linear(part, weight)

    for count in (1, 2, 3, 17, 64):
        fixed = deterministic.by_fixed_rows(product, x[:count])
        assert torch.equal(fixed, deterministic.by_fixed_rows(product, x)[:count])


def test_a_library_whose_rows_depend_on_their_place_is_refused():
    weight = torch.randn(6, 8)
    deterministic.check_product(lambda x: linear(x, weight), weight, "o")

    def uneven(x):
        result = linear(x, weight)
        result[40] += 1e-6
        return result

    with pytest.raises(
        ConfigError, match=r"product with o gives equal rows different bits .* torch\.float32"
    ) as caught:
        deterministic.check_product(uneven, weight, "o")
    assert caught.value.param == "deterministic"


@pytest.mark.parametrize("num_rows", [MANY_ITEMS // 8 - 1, MANY_ITEMS // 8])
def test_steps_of_few_and_of_many_rows_are_launched_alike(monkeypatch, num_rows):
    """Heads of 128 have a launch for few rows and one for many, and each sums in an order of its own."""
    asked = []

    def choose(*arguments):
        asked.append(choose_launch(*arguments))
        return asked[-1]

    monkeypatch.setattr("zmqexec.worker.gpu.ops.choose_launch", choose)
    device, cpu = EmulatedDevice(), torch.device("cpu")
    state = SlotState.allocate(MANY_ITEMS // 8, 64, BLOCK_SIZE, cpu)
    rows = torch.zeros((2, num_rows), dtype=torch.int32)
    for fixed_split_tokens in (64, 0):
        attention = DecodeAttention(device, torch.bfloat16, state, 8, 8, 128, fixed_split_tokens)
        attention.plan(*rows)
        is_many = num_rows >= MANY_ITEMS // 8 and not fixed_split_tokens
        assert asked[-1] == choose_launch(128, MANY_ITEMS if is_many else 1, 8, device.native)


def test_a_norm_does_not_depend_on_how_large_the_sum_before_it_is(tmp_path, monkeypatch):
    """The all-reduce with a norm in it takes small sums alone."""
    make_checkpoint(tmp_path, **MODELS["heads-of-64"])

    def fused(*_):
        raise AssertionError("it computes the norm in another way than the kernel that large sums need")

    monkeypatch.setattr(TorchCollectives, "all_reduce_residual_norm", fused)
    engine = Engine(tmp_path, ("heads-of-64", "bfloat16", "emulated"), EmulatedDevice(), 2, num_prompt=20)
    assert len(engine.alone(None).tokens) == NUM_TOKENS


@pytest.mark.parametrize("max_context_len", [1, 255, 4097, 131_073])
def test_splits_are_what_the_kernel_takes_and_bounded_in_number(monkeypatch, max_context_len):
    monkeypatch.setattr(deterministic, "LEAST_SPLIT_TOKENS", 256)
    tokens = deterministic.split_tokens(max_context_len)
    assert tokens % 64 == 0 and tokens >= 256 and -(-max_context_len // tokens) <= 64
