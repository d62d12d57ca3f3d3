"""The GPU path computes what transformers computes. On the CPU by the emulator; on a GPU where there is one."""

from __future__ import annotations

import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.checkpoints import VARIANTS, greedy, make_checkpoint, random_prompts
from tests.worker.gpu.emulation import NUM_BLOCKS, EmulatedDevice, make_gpu_runner
from tests.worker.step_driver import StepDriver, ThreadCollectives
from zmqexec.config import EngineConfig
from zmqexec.executor.inline import InlineExecutor
from zmqexec.protocol import Admission, Sampling, StepInput, pack, unpack
from zmqexec.worker.gpu.ops import SKINNY_ROWS
from zmqexec.worker.kernels import native, tiled_gemm
from zmqexec.worker.outputs import PeerMissing

NUM_TOKENS = 8
BLOCK_SIZE = 16


class CapturingDevice(EmulatedDevice):
    """Notes what it is to capture, once `is_cuda` says that it can."""

    def __init__(self):
        super().__init__()
        self.num_captured = 0

    def capture(self, launch, pool):
        self.num_captured += 1
        return None, torch.empty(0)

    def time_ms(self, work):
        return 1.0


class Truth:
    """A checkpoint on disk and what transformers generates from it."""

    def __init__(self, path, name):
        self.path = path
        self.name = name
        self.model = make_checkpoint(path, **{**VARIANTS, **LARGER}[name])
        self.prompts = random_prompts(self.model.config.vocab_size, [1, 7, 16, 17, 40, 70])
        self.expected = greedy(self.model, self.prompts, NUM_TOKENS)


LARGER = {
    "heads-of-64": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "heads-of-128": {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128},
}
"""Heads of sizes that the attention kernels have, and products that `skinny_gemm` and `tiled_gemm` take."""


EMULATED = ["gqa-tied", "linear-biases", "dynamic-ntk", "heads-of-64"]
"""Padded heads, biases, angles of their own, and kernels for all: the emulator is too slow for every geometry."""

CASES = [
    *((name, "emulated") for name in EMULATED),
    *(pytest.param((name, "cuda"), marks=pytest.mark.gpu) for name in [*VARIANTS, *LARGER]),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request):
    if request.param[1] == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return request.param


@pytest.fixture(scope="module")
def truth(case, tmp_path_factory):
    return Truth(tmp_path_factory.mktemp(case[0]), case[0])


@pytest.fixture(scope="module")
def device(case):
    if case[1] == "emulated":
        return EmulatedDevice()
    from zmqexec.worker.gpu.device import CudaDevice

    return CudaDevice(0)


def driver_of(truth, device, tp_size=1, **config):
    if tp_size == 1:
        return StepDriver([make_gpu_runner(truth.path, device=device, **config)], BLOCK_SIZE, NUM_BLOCKS)
    with ThreadPoolExecutor(tp_size) as pool:  # ranks measure their memory together
        members = ThreadCollectives.group(tp_size)
        runners = pool.map(lambda member: make_gpu_runner(truth.path, member, device=device, **config), members)
        return StepDriver(list(runners), BLOCK_SIZE, NUM_BLOCKS)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_plain_greedy_tokens_are_those_of_transformers(truth, device, tp_size):
    driver = driver_of(truth, device, tp_size)
    for slot, prompt in enumerate(truth.prompts):
        driver.admit(slot, prompt)
    outputs = driver.generate(NUM_TOKENS)
    assert [outputs[slot] for slot in range(len(truth.prompts))] == [expected.tokens for expected in truth.expected]


def test_ranks_with_unequal_shards_take_the_same_kernels(tmp_path):
    make_checkpoint(
        tmp_path, **LARGER["heads-of-64"], intermediate_size=49
    )  # 25 and 24: `skinny_gemm` takes multiples of 8
    with ThreadPoolExecutor(2) as pool:
        members = ThreadCollectives.group(2)
        runners = list(pool.map(lambda member: make_gpu_runner(tmp_path, member, dtype="bfloat16"), members))
    for num_rows in (1, 32):
        rows = torch.zeros(num_rows, 128, dtype=torch.bfloat16)
        assert {runner._model._is_streamed(rows) for runner in runners} == {False}


def test_an_error_of_sampling_without_a_peer_is_the_peers(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, **LARGER["heads-of-64"])
    runner = make_gpu_runner(tmp_path)
    monkeypatch.setattr(runner._host_sampler, "sample", lambda *_: [][0])
    admission = Admission(0, pack([1, 2]), 2, 0, pack([0]), Sampling(logprobs=1))
    step = StepInput(1, 0, prefills=pack([0, 2]), admitted=[admission])
    with pytest.raises(IndexError):
        runner.submit(step)
    monkeypatch.setattr(runner._collectives, "health", lambda: "rank 1 did not join")
    with pytest.raises(PeerMissing, match="rank 1"):
        runner.submit(step)


def test_captured_graphs_are_counted_for_whoever_waits(tmp_path, monkeypatch, capsys):
    make_checkpoint(tmp_path, **LARGER["heads-of-64"])
    device = CapturingDevice()
    runner = make_gpu_runner(tmp_path, device=device, dtype="bfloat16", max_num_seqs=24)
    assert capsys.readouterr().err == "", "an emulation captures nothing"
    monkeypatch.setattr(device, "is_cuda", True)
    for unwanted in ("tune", "DecodeSteps"):
        monkeypatch.setattr(f"zmqexec.worker.gpu.runner.{unwanted}", lambda *_: None)
    heard = []
    runner.init_cache(NUM_BLOCKS, lambda done, total: heard.append((done, total, device.num_captured)))
    num_graphs = 2 * len([1, 2, 4, 8, 16, 24])
    assert heard == [(done, num_graphs, done) for done in range(num_graphs + 1)]
    assert f"captured {num_graphs} CUDA graphs in " in capsys.readouterr().err


def test_chunks_beside_running_decodes_give_the_same_tokens(truth, device):
    driver = driver_of(truth, device)
    for slot, prompt in enumerate(truth.prompts):
        driver.admit(slot, prompt)
    outputs = driver.generate(NUM_TOKENS, chunk=7, budget=16)
    assert [outputs[slot] for slot in range(len(truth.prompts))] == [expected.tokens for expected in truth.expected]


def test_a_sequence_rebuilt_after_a_preemption_goes_on_with_the_same_tokens(truth, device):
    driver = driver_of(truth, device)
    for slot, prompt in enumerate(truth.prompts):
        driver.admit(slot, prompt)
    first = driver.generate(NUM_TOKENS // 2)
    for slot, prompt in enumerate(truth.prompts):
        driver.release(slot)
        driver.admit(slot, prompt + first[slot], num_prompt=len(prompt))
    second = driver.generate(NUM_TOKENS - NUM_TOKENS // 2, chunk=11)
    for slot, expected in enumerate(truth.expected):
        assert first[slot] + second[slot] == expected.tokens


def test_logprobs_are_those_of_transformers(truth, device):
    driver = driver_of(truth, device)
    prompt, expected = truth.prompts[4], truth.expected[4]
    driver.admit(0, prompt, Sampling(logprobs=-1, prompt_logprobs=-1))
    driver.admit(1, truth.prompts[1])
    outputs = driver.generate(NUM_TOKENS)
    assert outputs[0] == expected.tokens and outputs[1] == truth.expected[1].tokens
    entries = driver.prompt_logprobs[0] + driver.logprobs[0]
    values = np.concatenate([np.frombuffer(entry.values, "<f4").reshape(-1, entry.width) for entry in entries])
    np.testing.assert_allclose(values[:, 1:], expected.logprobs, atol=1e-4)


def test_sampled_tokens_are_those_of_the_cpu_whoever_else_is_in_the_batch(truth, device):
    from tests.worker.test_runner import runners_of

    params = [
        Sampling(temperature=0.9, top_p=0.95, seed=1),
        Sampling(temperature=1.3, top_k=20, seed=2, sample_index=3),
        Sampling(temperature=0.7, min_p=0.05, seed=3),
        None,
        Sampling(temperature=0.9, seed=5, frequency_penalty=0.3),
    ]
    prompts = truth.prompts[1:]

    def generate(driver, slots):
        for slot in slots:
            driver.admit(slot, prompts[slot], params[slot])
        return driver.generate(NUM_TOKENS)

    on_cpu = generate(StepDriver(runners_of(truth, 1)), range(5))
    assert generate(driver_of(truth, device), range(5)) == on_cpu
    assert generate(driver_of(truth, device), range(4)) == {slot: on_cpu[slot] for slot in range(4)}


HALF_TOLERANCE = {"bfloat16": 1.0, "float16": 0.15}
"""Of log-probabilities: what these precisions may be off by. Two candidates nearer than that are a near-tie."""


def assert_equal_until_a_near_tie(truth, slot, tokens, dtype="bfloat16"):
    """`tokens`, from the first output token on, are those of float32, up to where float32 itself nearly chose them."""
    expected = truth.expected[slot]
    logprobs = expected.logprobs[len(truth.prompts[slot]) - 1 :]
    assert len(tokens) == NUM_TOKENS
    for ours, theirs, row in zip(tokens, expected.tokens, logprobs, strict=True):
        if ours != theirs:
            assert row[theirs] - row[ours] < HALF_TOLERANCE[dtype]
            break


@pytest.mark.parametrize("dtype, tp_size", [("bfloat16", 1), ("bfloat16", 2), ("float16", 1)])
def test_half_precision_stays_close_to_float32(truth, device, dtype, tp_size):
    driver = driver_of(truth, device, tp_size, dtype=dtype)
    for slot, prompt in enumerate(truth.prompts):
        driver.admit(slot, prompt)
    outputs = driver.generate(NUM_TOKENS)
    for slot in outputs:
        assert_equal_until_a_near_tie(truth, slot, outputs[slot], dtype)


@pytest.mark.parametrize("dtype, tp_size", [("bfloat16", 1), ("bfloat16", 2), ("float16", 1)])
def test_steps_of_more_rows_than_skinny_gemm_takes_stay_close_too(truth, device, dtype, tp_size, monkeypatch):
    if not device.is_cuda and (truth.name, tp_size) not in [("heads-of-64", 2), ("linear-biases", 1)]:
        pytest.skip("one geometry and one with biases are enough for the emulator, which is slow")
    launched = []
    launch = tiled_gemm._launch
    monkeypatch.setattr(tiled_gemm, "_launch", lambda name, *rest: launched.append(name) or launch(name, *rest))
    driver = driver_of(truth, device, tp_size, dtype=dtype, max_num_seqs=24)
    for slot in range(SKINNY_ROWS + 2):
        driver.admit(slot, truth.prompts[slot % len(truth.prompts)])
    outputs = driver.generate(NUM_TOKENS)
    for slot in outputs:
        assert_equal_until_a_near_tie(truth, slot % len(truth.prompts), outputs[slot], dtype)
    if native.capability(device.torch_device) == 90 and truth.name in LARGER:
        assert {"linear", "linear_silu_mul"} <= set(launched)


@pytest.mark.parametrize("way", ["chunks", "rebuilt", "cached prefix", "no graphs"])
def test_half_precision_stays_close_whatever_way_a_token_is_computed(truth, device, way):
    if not device.is_cuda and way == "no graphs":
        pytest.skip("an emulation has no graphs to turn off")
    if not device.is_cuda and truth.name != "heads-of-64":
        pytest.skip("one geometry is enough for the emulator, which is slow")
    if way == "cached prefix" and truth.model.config.rope_parameters["rope_type"] == "dynamic":
        pytest.skip("prompts beyond the model's own length share no cache")
    driver = driver_of(truth, device, dtype="bfloat16", cuda_graphs=way != "no graphs")
    prompts = truth.prompts[3:]
    for slot, prompt in enumerate(prompts):
        driver.admit(slot, prompt)
    if way == "rebuilt":
        first = driver.generate(NUM_TOKENS // 2)
        for slot, prompt in enumerate(prompts):
            driver.release(slot)
            driver.admit(slot, prompt + first[slot], num_prompt=len(prompt))
        rest = driver.generate(NUM_TOKENS - NUM_TOKENS // 2)
        outputs = {slot: first[slot] + rest[slot] for slot in first}
    elif way == "cached prefix":
        driver.step({slot: len(prompt) for slot, prompt in enumerate(prompts)}, [])
        for slot, prompt in enumerate(prompts):
            driver.admit_with_prefix(slot + 3, prompt, slot, (len(prompt) - 1) // BLOCK_SIZE)
        outputs = {slot: tokens for slot, tokens in driver.generate(NUM_TOKENS).items() if slot >= 3}
    else:
        outputs = driver.generate(NUM_TOKENS, chunk=7 if way == "chunks" else 1 << 20)
    for slot, tokens in outputs.items():
        assert_equal_until_a_near_tie(truth, 3 + slot % 3, tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_ahead_changes_no_token(truth, device, dtype):
    """Of a batch that stays as it is: each step alone, and each launched before the result of the last is there."""
    if not device.is_cuda and truth.name != "heads-of-64":
        pytest.skip("one geometry is enough for the emulator, which is slow")
    prompts = truth.prompts[1:4]

    def generate(depth):
        runner = driver_of(truth, device, dtype=dtype).runners[0]
        blocks = iter(range(NUM_BLOCKS))
        admissions = [
            Admission(slot, pack(prompt), len(prompt), 0, pack([next(blocks) for _ in range(3)]))
            for slot, prompt in enumerate(prompts)
        ]
        prefills = pack(number for slot, prompt in enumerate(prompts) for number in (slot, len(prompt)))
        steps = [StepInput(1, 0, prefills=prefills, admitted=admissions)]
        steps += [StepInput(1, number, decodes=b"\7") for number in range(1, NUM_TOKENS)]
        tokens, pending = [], deque()
        for step in steps:
            pending.append(runner.submit(step))
            while len(pending) > depth:
                tokens.append(unpack(pending.popleft().result().token_ids))
        return tokens + [unpack(one.result().token_ids) for one in pending]

    assert generate(1) == generate(0)


def test_steps_launched_ahead_of_their_results_give_the_same_tokens(truth, device):
    runner = driver_of(truth, device).runners[0]
    prompt, expected = truth.prompts[3], truth.expected[3]
    blocks = list(range(5, 5 + -(-(len(prompt) + NUM_TOKENS) // BLOCK_SIZE)))
    admission = Admission(2, pack(prompt), len(prompt), 0, pack(blocks))
    steps = [StepInput(1, 0, prefills=pack([2, len(prompt)]), admitted=[admission])]
    steps += [StepInput(1, number, decodes=b"\4") for number in range(1, NUM_TOKENS)]
    tokens, pending = [], deque()
    for step in steps:
        pending.append(runner.submit(step))
        if len(pending) > 1:
            tokens += unpack(pending.popleft().result().token_ids)
    tokens += unpack(pending.popleft().result().token_ids)
    assert tokens == expected.tokens


def test_new_blocks_may_come_beside_the_admission_and_several_at_a_time(truth, device):
    runner = driver_of(truth, device).runners[0]
    prompt, expected = truth.prompts[4], truth.expected[4]
    admission = Admission(3, pack(prompt), len(prompt), 0, pack([9]))
    first = StepInput(1, 0, prefills=pack([3, len(prompt)]), admitted=[admission], new_blocks=pack([3, 7, 3, 2, 3, 11]))
    later = [StepInput(1, number, decodes=b"\10") for number in range(1, NUM_TOKENS)]
    tokens = [token for step in [first, *later] for token in unpack(runner.run(step).token_ids)]
    assert tokens == expected.tokens


def test_a_step_of_the_same_sequences_and_blocks_sends_the_device_nothing(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, **LARGER["heads-of-64"])
    driver = StepDriver([make_gpu_runner(tmp_path)], BLOCK_SIZE, NUM_BLOCKS)
    steps, copies = driver.runners[0]._decode_steps, []
    native = steps._native

    def watched(*arguments):
        num_copied = native(*arguments)
        if num_copied > 0:
            copies.append(driver.computed[0])
        return num_copied

    monkeypatch.setattr(steps, "_native", watched)
    for slot in (0, 1):
        driver.admit(slot, [1 + slot] * 12)
    driver.step({0: 12, 1: 12}, [])
    for _ in range(8):
        driver.step({}, [0, 1])
    # At first; at 16 the new blocks, and then that there are none.
    assert copies == [12, 16, 17]
    driver.step({}, [1])
    driver.step({}, [0, 1])
    assert copies == [12, 16, 17, 20, 20]


def test_a_sequence_in_the_slot_of_another_is_sampled_in_its_own_way(tmp_path):
    make_checkpoint(tmp_path, **LARGER["heads-of-64"])
    prompt = [4, 5]
    ways = [None, Sampling(temperature=50.0, seed=1), Sampling(logit_bias={7: 1000.0})]

    def generate(way):
        alone = StepDriver([make_gpu_runner(tmp_path)], BLOCK_SIZE, NUM_BLOCKS)
        alone.admit(0, prompt, way)
        return alone.generate(NUM_TOKENS)[0]

    expected = [generate(way) for way in ways]
    assert all(expected[one] != expected[other] for one, other in [(0, 1), (1, 2), (2, 0)])
    driver = StepDriver([make_gpu_runner(tmp_path)], BLOCK_SIZE, NUM_BLOCKS)
    driver.admit(0, [1])
    driver.step({0: 1}, [])
    for which in (0, 1, 2, 0):  # the same slots decode all along
        driver.admit(1, prompt, ways[which])
        driver.step({1: len(prompt)}, [])
        for _ in range(NUM_TOKENS - 1):
            driver.step({}, [0, 1])
        assert driver.tokens[1][len(prompt) :] == expected[which]


def test_many_prompts_behind_one_cached_prefix_give_the_same_tokens_in_bounded_memory(truth, device):
    if truth.model.config.rope_parameters["rope_type"] == "dynamic":
        pytest.skip("prompts beyond the model's own length share no cache")
    driver = driver_of(truth, device, max_model_len=80, max_num_batched_tokens=16)
    prompt, expected = truth.prompts[5], truth.expected[5]
    driver.admit(0, prompt)
    driver.step({0: len(prompt)}, [])
    for slot, num_shared in enumerate([4, 2, 4], start=1):  # 70 tokens each: two do not fit 80 together
        driver.admit_with_prefix(slot, prompt, 0, num_shared)
    driver.step({slot: len(prompt) - driver.computed[slot] for slot in (1, 2, 3)}, [0])
    assert [driver.tokens[slot][len(prompt) :] for slot in range(4)] == [
        expected.tokens[:2],
        *[expected.tokens[:1]] * 3,
    ]


def test_a_closed_inline_engine_holds_no_memory_of_its_gpu(tmp_path):
    make_checkpoint(tmp_path, **LARGER["heads-of-64"])
    executor = InlineExecutor(EngineConfig())
    executor._runner = make_gpu_runner(tmp_path)
    cache = weakref.ref(executor._runner._cache[0])
    executor.close()
    assert cache() is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_without_tokens_samples_nothing(tmp_path, dtype):
    make_checkpoint(tmp_path, **LARGER["heads-of-64"])
    runner = make_gpu_runner(tmp_path, dtype=dtype)
    admission = Admission(0, pack([1, 2]), 2, 0, pack([0]))
    assert runner.run(StepInput(1, 0, admitted=[admission])).token_ids == b""
    assert runner.run(StepInput(1, 1)).token_ids == b""
    assert len(unpack(runner.run(StepInput(1, 2, prefills=pack([0, 2]))).token_ids)) == 1


def test_whole_prompts_beside_the_rest_of_another_are_attended_apart(truth, device, monkeypatch):
    monkeypatch.setattr("zmqexec.worker.gpu.attention.WORTH_A_GROUP", 8)
    driver = driver_of(truth, device)
    groups = []
    prefills = driver.runners[0]._prefills
    group = prefills._group
    monkeypatch.setattr(prefills, "_group", lambda *asked: groups.append(group(*asked)) or groups[-1])
    prompts = {slot: truth.prompts[slot] for slot in (3, 4, 5)}
    driver.admit(5, prompts[5])
    driver.step({5: 32}, [])
    for slot in (3, 4):
        driver.admit(slot, prompts[slot])
    driver.step({3: len(prompts[3]), 5: len(prompts[5]) - 32, 4: len(prompts[4])}, [])
    assert [each.blocks is None for each in groups] == [True, True, False, True]
    driver.generate(NUM_TOKENS)
    for slot, prompt in prompts.items():
        assert driver.tokens[slot][len(prompt) :][:NUM_TOKENS] == truth.expected[slot].tokens


@pytest.fixture
def driver_and_rows(truth, device, monkeypatch):
    """A driver, and how many rows the layers of its steps have activated, call by call."""
    driver = driver_of(truth, device)
    ops = driver.runners[0]._model._ops
    rows, silu_mul = [], ops.silu_mul
    monkeypatch.setattr(ops, "silu_mul", lambda gate_up: rows.append(len(gate_up)) or silu_mul(gate_up))
    return driver, rows


def test_the_last_layer_goes_on_with_those_tokens_alone_that_are_sampled(truth, driver_and_rows):
    driver, rows = driver_and_rows
    others = len(driver.runners[0]._model._weights.layers) - 1
    driver.admit(5, truth.prompts[5])
    driver.step({5: 32}, [])
    assert rows == [32] * others
    rows.clear()
    for slot in (3, 4):
        driver.admit(slot, truth.prompts[slot])
    first, second = len(truth.prompts[3]), len(truth.prompts[4])
    driver.step({3: first, 5: 8, 4: second}, [])
    assert rows == [first + 8 + second] * others + [2]
    driver.generate(NUM_TOKENS)
    for slot in (3, 4, 5):
        begin = len(truth.prompts[slot])
        assert driver.tokens[slot][begin:][:NUM_TOKENS] == truth.expected[slot].tokens


def test_prompts_whose_log_probabilities_are_asked_for_are_computed_whole(truth, driver_and_rows):
    driver, rows = driver_and_rows
    prompt = truth.prompts[3]
    driver.admit(3, prompt, Sampling(prompt_logprobs=1))
    driver.step({3: len(prompt)}, [])
    assert rows == [len(prompt)] * len(driver.runners[0]._model._weights.layers)
    assert len(driver.prompt_logprobs[3]) > 0
