"""The one-shot all-reduce: ranks as streams of one emulator in any interleaving, and as processes of their own."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from zmqexec.worker.kernels import reference

# On a GPU the ranks of these tests are streams of one device: none may queue behind another.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WORDS, FLAGS = 0, 1
EPS = 1e-5
ABORT, ERROR, PEER, CALL, WAITED = 0, 16, 17, 18, 20


class Rank:
    """One rank's memory and handle."""

    def __init__(self, impl, rank, ranks, capacity, timeout_ns):
        self.impl, self.rank, self.ranks, self.capacity = impl, rank, ranks, capacity
        self.inbox = impl.module.ipc_alloc(impl.module.all_reduce_inbox_bytes(ranks, capacity))
        impl.module.all_reduce_inbox_init(self.inbox, ranks, capacity, timeout_ns)
        self.control_host, self.control_device = impl.module.host_mapped_alloc(128)
        self.control = (ctypes.c_uint32 * 32).from_address(self.control_host)

    def open(self, inboxes):
        addresses = np.array(inboxes, np.uint64).tobytes()
        self.group = self.impl.module.all_reduce_group(
            self.rank, self.ranks, self.capacity, self.control_device, addresses
        )

    def close(self):
        self.impl.module.all_reduce_group_free(self.group)
        self.impl.module.device_free(self.inbox)
        self.impl.module.host_mapped_free(self.control_host)


@pytest.fixture
def make_group(kernels_impl):
    """All ranks in this process, on one device; each launches on a stream of its own."""
    made = []

    def make(ranks, capacity=1 << 16, timeout_ns=10**9):
        group = [Rank(kernels_impl, rank, ranks, capacity, timeout_ns) for rank in range(ranks)]
        made.extend(group)
        for rank in group:
            rank.open([other.inbox for other in group])
        return group

    yield make
    for rank in made:
        rank.close()


def parts_of(ranks, shape, dtype, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for _ in range(ranks)]


def exact_sum(parts):
    """In rank order, in float32."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


class Call:
    """The same call on every rank, over random data, and what it must leave behind."""

    def __init__(self, impl, ranks, rows, cols, dtype, kind, seed, *, protocol, threads=0, in_place=False, offset=0):
        self.rows, self.cols, self.dtype, self.kind = rows, cols, dtype, kind
        self.protocol, self.threads = protocol, threads
        parts = parts_of(ranks, (rows, cols), dtype, seed)
        hidden, weight = parts_of(1, (rows, cols), dtype, seed + 1)[0], parts_of(1, (cols,), dtype, seed + 2)[0]
        total = exact_sum(parts)
        self.expected_sum = total.to(dtype)
        self.expected_hidden = (total + hidden.float()).to(dtype)
        self.expected_norm = reference.rms_norm(self.expected_hidden, weight, EPS)

        def placed(tensor):
            """`offset` elements from an aligned address, between NaNs."""
            memory = torch.full((tensor.numel() + offset + 8,), torch.nan, dtype=dtype, device=impl.device)
            view = memory[offset : offset + tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            self.memories.append((memory, offset, tensor.numel()))
            return view

        self.memories = []
        nans = torch.full((rows, cols), torch.nan, dtype=dtype)
        self.inputs = [placed(part) for part in parts]
        self.hiddens = [placed(hidden) for _ in range(ranks)]
        self.outs = self.inputs if in_place and kind == "sum" else [placed(nans) for _ in range(ranks)]
        self.weight = placed(weight)

    def launch(self, rank: Rank, stream):
        i = rank.rank
        hidden = None if self.kind == "sum" else self.hiddens[i]
        out = None if self.kind == "residual" else self.outs[i]
        weight = self.weight if self.kind == "norm" else None
        rank.impl.call(
            "all_reduce",
            *(rank.group, self.inputs[i], hidden, out, weight, self.rows, self.cols, EPS, self.dtype),
            *(self.protocol, self.threads, stream, rank.impl.pdl),
        )

    def check(self):
        for hidden, out in zip(self.hiddens, self.outs, strict=True):
            if self.kind == "sum":
                assert torch.equal(out.cpu(), self.expected_sum)
            else:
                assert torch.equal(hidden.cpu(), self.expected_hidden)
            if self.kind == "norm":
                # The square root's last bit may round the other way, and with it two products.
                ulp = torch.finfo(self.dtype).eps
                torch.testing.assert_close(out.cpu(), self.expected_norm, rtol=4 * ulp, atol=1e-6)
                assert torch.equal(out, self.outs[0])
        for memory, offset, count in self.memories:
            assert memory[:offset].isnan().all() and memory[offset + count :].isnan().all()


def run_side_by_side(impl, group, calls):
    """Every rank makes all calls in order; the ranks drift apart as the protocol lets them."""
    if impl.name == "emulated":
        impl.module.emulator_begin_group()
        for call in calls:
            for rank in group:
                call.launch(rank, 1 + rank.rank)
        impl.module.emulator_run_group()
        return
    streams = [torch.cuda.Stream() for _ in group]
    torch.cuda.synchronize()
    for call in calls:
        for rank, stream in zip(group, streams, strict=True):
            call.launch(rank, stream.cuda_stream)
    torch.cuda.synchronize()


def test_any_shape_dtype_kind_and_order_of_calls(kernels_impl, make_group):
    chosen = random.Random(1)
    for ranks in (2, 3, 4, 8):
        group = make_group(ranks)
        for round_ in range(6):
            calls = []
            for number in range(chosen.choice([3, 5, 7])):
                kind = chosen.choice(["sum", "residual", "norm"])
                cols = chosen.choice([1, 5, 8, 24, 100, 128, 264])
                calls.append(
                    Call(
                        kernels_impl,
                        ranks,
                        chosen.choice([1, 1, 2, 3, 7]),
                        cols,
                        chosen.choice(DTYPES),
                        kind,
                        100 * round_ + number,
                        protocol=chosen.choice([WORDS, FLAGS]),
                        threads=chosen.choice([0, 32, 64]),
                        in_place=chosen.random() < 0.5,
                        offset=chosen.choice([0, 0, 0, 1]),
                    )
                )
            with kernels_impl.emulated(seed=round_, resident_blocks=300):
                run_side_by_side(kernels_impl, group, calls)
            for call in calls:
                call.check()
        assert not any(rank.control[ERROR] for rank in group)


def test_one_message_goes_back_and_forth_between_graphs_of_different_grids(kernels_impl, make_group):
    """Three 'graphs' with 1, 3 and 5 calls of different sizes, in a random order: halves change hands at every call."""
    chosen = random.Random(2)
    group = make_group(2)
    for protocol in (WORDS, FLAGS):
        graphs = [
            [Call(kernels_impl, 2, rows, 64, torch.bfloat16, "residual", 7 * rows, protocol=protocol, threads=32)]
            * count
            for rows, count in ((1, 1), (5, 3), (17, 5))
        ]
        for turn in range(20):
            chosen_graphs = chosen.choices(graphs, k=9)
            calls = [call for graph in chosen_graphs for call in graph]
            for graph in graphs:
                for hidden in graph[0].hiddens:
                    hidden.zero_()
            with kernels_impl.emulated(seed=turn, resident_blocks=300):
                run_side_by_side(kernels_impl, group, calls)
            for graph in graphs:
                expected = torch.zeros_like(graph[0].hiddens[0], device="cpu")
                for _ in range(calls.count(graph[0])):
                    expected = (exact_sum([part.cpu() for part in graph[0].inputs]) + expected.float()).bfloat16()
                assert all(torch.equal(hidden.cpu(), expected) for hidden in graph[0].hiddens)
    assert not any(rank.control[ERROR] for rank in group)


def test_more_rows_than_blocks_are_normed_one_after_the_other(kernels_impl, make_group):
    group = make_group(2)
    for seed in range(1, 5):
        call = Call(kernels_impl, 2, 120, 260, torch.bfloat16, "norm", seed, protocol=seed % 2)
        with kernels_impl.emulated(seed=seed, resident_blocks=300):
            run_side_by_side(kernels_impl, group, [call])
        call.check()


@pytest.mark.parametrize("protocol", [WORDS, FLAGS])
def test_every_word_can_be_sent_also_the_one_that_means_absent(kernels_impl, make_group, protocol):
    group = make_group(2)
    words = torch.tensor([-1, 0, -(2**31), 2**31 - 1, 0x7F800000, -0x800000, 1, -1], dtype=torch.int32)
    for dtype in DTYPES:
        own = words.view(dtype).reshape(1, -1)
        call = Call(kernels_impl, 2, *own.shape, dtype, "sum", 0, protocol=protocol)
        call.inputs[0].copy_(own)
        call.inputs[1].zero_()
        run_side_by_side(kernels_impl, group, [call])
        for out in call.outs:
            torch.testing.assert_close(out.cpu(), own, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("protocol", [WORDS, FLAGS])
@pytest.mark.parametrize("kind", ["sum", "norm"])
def test_a_rank_that_does_not_come_is_named(kernels_impl, make_group, protocol, kind):
    group = make_group(3, timeout_ns=2_000_000)
    first = Call(kernels_impl, 3, 2, 40, torch.bfloat16, kind, 1, protocol=protocol)
    with kernels_impl.emulated(seed=1, resident_blocks=300, clock_step_ns=1000):
        run_side_by_side(kernels_impl, group, [first])
        first.check()
        assert not any(rank.control[ERROR] for rank in group)
        second = Call(kernels_impl, 3, 2, 40, torch.bfloat16, kind, 2, protocol=protocol)
        run_side_by_side(kernels_impl, [group[0], group[2]], [second, second, second])
    for rank in (group[0], group[2]):
        assert rank.control[ERROR] == 1
        assert rank.control[PEER] == 1
        assert rank.control[CALL] == 1
        assert 2_000_000 <= 1024 * (rank.control[WAITED] + 1) < 50_000_000
    assert group[1].control[ERROR] == 0


@pytest.mark.parametrize("protocol", [WORDS, FLAGS])
def test_the_abort_word_ends_a_wait(kernels_impl, make_group, protocol):
    group = make_group(2, timeout_ns=10**15)
    group[1].control[ABORT] = 1
    call = Call(kernels_impl, 2, 1, 40, torch.bfloat16, "sum", 1, protocol=protocol)
    run_side_by_side(kernels_impl, [group[1]], [call, call])
    assert [group[1].control[i] for i in (ERROR, PEER, CALL)] == [2, 0, 0]


def test_after_giving_up_a_rank_sends_nothing_and_returns_at_once(kernels_impl, make_group):
    group = make_group(2, timeout_ns=2_000_000)
    call = Call(kernels_impl, 2, 1, 64, torch.bfloat16, "sum", 1, protocol=WORDS)
    with kernels_impl.emulated(clock_step_ns=1000):
        run_side_by_side(kernels_impl, [group[0]], [call])
        assert group[0].control[ERROR] == 1
        error = list(group[0].control)
        run_side_by_side(kernels_impl, [group[0]], [call] * 1000)
        assert list(group[0].control) == error
        # Rank 1 got the message of call 0 alone.
        run_side_by_side(kernels_impl, [group[1]], [call, call])
    assert [group[1].control[i] for i in (ERROR, PEER, CALL)] == [1, 0, 1]


def test_a_longer_bound_can_be_set_afterwards(kernels_impl, make_group):
    group = make_group(2, timeout_ns=1000)
    kernels_impl.module.all_reduce_set_timeout(group[0].group, 5_000_000)
    call = Call(kernels_impl, 2, 1, 64, torch.bfloat16, "sum", 1, protocol=WORDS)
    with kernels_impl.emulated(clock_step_ns=1000):
        run_side_by_side(kernels_impl, [group[0]], [call])
    assert 1024 * (group[0].control[WAITED] + 1) >= 5_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "at least 1"),
        ({"cols": 1 << 20}, "larger than the capacity"),
        ({"rows": 1 << 12, "cols": 1 << 12}, "larger than the capacity"),
        ({"protocol": 2}, "protocol"),
        ({"threads": 33}, "multiple of 32"),
        ({"hidden": None, "out": None}, "hidden or out"),
        ({"weight": 64}, "a norm needs"),
        ({"input": None}, "input"),
    ],
)
def test_a_wrong_argument_is_refused(kernels_impl, make_group, arguments, message):
    group = make_group(2)
    right = {
        "group": group[0].group,
        "input": 16,
        "hidden": None,
        "out": 16,
        "weight": None,
        "rows": 1,
        "cols": 8,
        "eps": EPS,
        "dtype": torch.float32,
        "protocol": WORDS,
        "threads": 0,
        "stream": 0,
        "pdl": False,
    }
    with pytest.raises(ValueError, match=message):
        kernels_impl.call("all_reduce", *(right | arguments).values())


def test_a_group_is_checked(kernels_impl):
    module = kernels_impl.module
    for ranks in (1, 9):
        with pytest.raises(ValueError, match="2 to 8 ranks"):
            module.all_reduce_inbox_bytes(ranks, 1024)
    with pytest.raises(ValueError, match="multiple of 256"):
        module.all_reduce_inbox_bytes(2, 1000)
    with pytest.raises(ValueError, match="rank"):
        module.all_reduce_group(2, 2, 1024, 1, bytes(16))
    with pytest.raises(ValueError, match="8 bytes per rank"):
        module.all_reduce_group(0, 2, 1024, 1, bytes(8))
    with pytest.raises(ValueError, match="no such address"):
        module.all_reduce_group(0, 2, 1024, 1, bytes(16))


PROCESS = """
import ctypes, random, sys, time
import numpy as np
from tests import cuda_emulator
module = cuda_emulator.load()
rank, ranks, num_calls, protocols, timeout_ns = map(int, sys.argv[1:])
capacity = 1 << 15
inbox = module.ipc_alloc(module.all_reduce_inbox_bytes(ranks, capacity))
module.all_reduce_inbox_init(inbox, ranks, capacity, timeout_ns)
host, device = module.host_mapped_alloc(128)
control = (ctypes.c_uint32 * 32).from_address(host)
print(module.ipc_handle(inbox).hex(), flush=True)
handles = [bytes.fromhex(handle) for handle in sys.stdin.readline().split()]
inboxes = [inbox if peer == rank else module.ipc_open(handle) for peer, handle in enumerate(handles)]
group = module.all_reduce_group(rank, ranks, capacity, device, np.array(inboxes, np.uint64).tobytes())

# The same on every rank; numbers that float32 adds exactly.
shared, own = random.Random(0), random.Random(rank + 1)
largest = capacity // 4
base = np.arange(largest, dtype=np.float32) % 1024
total = ranks * base
scale = np.float32(sum(range(1, ranks + 1)))
given, out = np.empty_like(base), np.empty_like(base)
def call(number):
    size = shared.choice([1, 3, 4, 64, 65, 200, 512, 1000, largest if number % 100 == 0 else 7])
    protocol = shared.randrange(2) if protocols == 2 else protocols
    step = np.float32(number % 4096)
    np.add(base[:size], step * (rank + 1), out=given[:size])
    if own.random() < 0.002:
        time.sleep(0.001)
    arguments = (given.ctypes.data, 0, out.ctypes.data, 0, 1, size, 0.0, module.FLOAT32, protocol, 64, 0, True)
    module.all_reduce(group, *arguments)
    return np.array_equal(out[:size], total[:size] + step * scale)
module.emulator_options(0, 300, 100)
"""


class Processes:
    """Ranks with memory of their own, which the others map."""

    def __init__(self, ranks, script, *, num_calls=0, protocol=2, timeout_ns=10**15):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
        arguments = [str(number) for number in (ranks, num_calls, protocol, timeout_ns)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS + textwrap.dedent(script), str(rank), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(ranks)
        ]

    def results(self):
        handles = [process.stdout.readline().strip() for process in self.processes]
        for process in self.processes:
            process.stdin.write(" ".join(handles) + "\n")
            process.stdin.flush()
        return [process.communicate(timeout=60)[0].split() for process in self.processes]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


@pytest.fixture
def emulated(kernels_impl):
    if kernels_impl.name != "emulated":
        pytest.skip("these processes emulate")


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_of_their_own_agree_over_thousands_of_calls(emulated, ranks):
    script = """
    wrong = [number for number in range(num_calls) if not call(number)]
    print(len(wrong), *wrong[:3], control[16], flush=True)
    sys.stdin.readline()  # the peers still read this rank's memory
    """
    num_calls = int(os.environ.get("ZMQEXEC_ALL_REDUCE_CALLS", "6001")) // ranks
    with Processes(ranks, script, num_calls=num_calls) as processes:
        assert processes.results() == [["0", "0"]] * ranks


def test_a_process_that_dies_is_named_by_the_others(emulated):
    script = """
    import os
    module.emulator_options(0, 300, 10_000)
    for number in range(20):
        if rank == 1 and number == 9:
            os._exit(0)
        call(number)
    print(control[16], control[17], control[18], flush=True)
    """
    with Processes(3, script, timeout_ns=20_000_000) as processes:
        zero, _, two = processes.results()
    assert zero == two == ["1", "1", "9"]
