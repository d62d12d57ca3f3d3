"""NcclCollectives without GPUs: the emulator's device memory, and an NCCL that shares memory in its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from tests import cuda_emulator
from zmqexec.errors import ConfigError
from zmqexec.worker.gpu import nccl as gpu_nccl

DEADLINE_S = 60

PROLOGUE = """
import ctypes, os, sys, time, types
import torch
from tests import cuda_emulator
from zmqexec.worker.gpu import nccl as gpu_nccl, one_shot
from zmqexec.worker.kernels import reference
from zmqexec.worker.shared_memory import SharedMemoryCollectives

rank, tp_size, store_fd, nccl_fd = map(int, sys.argv[1:])
torch.set_num_threads(1)
module = cuda_emulator.load()
module.emulator_options(0, 300, 100)
sys.modules["zmqexec._cuda"] = module
import zmqexec
zmqexec._cuda = module

class Communicator:
    def __init__(self, size, unique_id, rank):
        assert unique_id == tuple(range(-64, 64)) and rank == globals()["rank"]
        self.group = SharedMemoryCollectives(rank, size, nccl_fd, 30.0, join_timeout_s=30.0)
    def tensor(self, address, count, dtype):
        memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype)
    def allReduce(self, given, out, count, dtype, operation, stream):
        assert (operation, stream) == (0, 7)
        dtype = {number: dtype for dtype, number in gpu_nccl.NCCL_DTYPES.items()}[dtype]
        self.tensor(out, count, dtype).copy_(self.group.all_reduce(self.tensor(given, count, dtype).clone()))
    def allGather(self, given, out, count, dtype, stream):
        gathered = self.group.all_gather(self.tensor(given, count, torch.uint8))
        self.tensor(out, count * tp_size, torch.uint8).copy_(gathered.view(-1))
    def check_async_error(self):
        pass
    def abort(self):
        self.group.close()

nccl = types.SimpleNamespace(available=True, get_unique_id=lambda: tuple(range(-64, 64)), NcclCommunicator=Communicator)
sys.modules["cupy"] = types.ModuleType("cupy")
sys.modules["cupy.cuda"] = types.SimpleNamespace(nccl=nccl)
torch.cuda.device_count = lambda: tp_size
torch.cuda.set_device = lambda device: None
torch.cuda.synchronize = lambda: None
torch.cuda.current_stream = lambda: types.SimpleNamespace(cuda_stream=7)
gpu_nccl.NcclCollectives.device_type = "cpu"
gpu_nccl.CHECK_SIZES = (1, 1000, 5000)

def join(timeout_s=30.0, **options):
    return gpu_nccl.NcclCollectives(rank, tp_size, store_fd, timeout_s, join_timeout_s=30.0, **options)
"""


class Ranks:
    """Processes that run `script`."""

    def __init__(self, tp_size, script):
        cuda_emulator.build()
        self.fds = [os.memfd_create("store"), os.memfd_create("nccl")]
        arguments = [str(number) for number in (tp_size, *self.fds)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROLOGUE + textwrap.dedent(script), str(rank), *arguments],
                pass_fds=self.fds,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
            )
            for rank in range(tp_size)
        ]

    def results(self):
        """(exit code, stdout, stderr) of every rank."""
        outputs = [process.communicate(timeout=DEADLINE_S) for process in self.processes]
        return [(process.returncode, *output) for process, output in zip(self.processes, outputs, strict=True)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture(autouse=True)
def compiler():
    try:
        cuda_emulator.compiler()
    except cuda_emulator.NoCompiler as missing:
        pytest.skip(str(missing))


CALLS = """
    gpu_nccl.ONE_SHOT_BYTES = {tp_size: 1 << 14}
    group = join()
    assert (group.rank, group.tp_size, group.one_shot is None) == (rank, tp_size, not expects_one_shot), group.one_shot
    generator = torch.Generator()
    def parts(shape, dtype, seed):
        return [torch.randn(shape, generator=generator.manual_seed(10 * seed + r)).to(dtype) for r in range(tp_size)]
    for number, size in enumerate([0, 1, 1000, 20_000]):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            given = parts((size,), dtype, number)
            total = sum((part.float() for part in given[1:]), given[0].float()).to(dtype)
            assert torch.equal(group.all_reduce(given[rank].clone()), total)
            assert torch.equal(group.all_gather(given[rank]), torch.stack(given))
            hidden = torch.ones(size, dtype=dtype)
            group.all_reduce_residual_(hidden, given[rank].clone())
            torch.testing.assert_close(hidden, total + 1, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)
    for rows, cols in ((1, 64), (3, 100), (3, 5000)):
        given = parts((rows, cols), torch.bfloat16, rows)
        hidden, weight = torch.ones(rows, cols).bfloat16(), parts((cols,), torch.bfloat16, 77)[0]
        normed = group.all_reduce_residual_norm(hidden, given[rank].clone(), weight, 1e-5)
        torch.testing.assert_close(normed, reference.rms_norm(hidden, weight, 1e-5), rtol=0.02, atol=0.02)
    ids = torch.tensor([rank, 5 - rank])
    assert group.all_gather(ids).tolist() == [[r, 5 - r] for r in range(tp_size)]
    assert group.all_reduce(ids).tolist() == [sum(range(tp_size)), sum(5 - r for r in range(tp_size))]
    assert group.health() is None
    print("done", flush=True)
    group._gather("end", "")  # the memory of a rank goes with it
    group.close()
    group.close()
"""


@pytest.mark.parametrize("tp_size", [2, 3])
def test_small_messages_go_one_shot_and_large_ones_through_nccl(tp_size):
    with Ranks(tp_size, "expects_one_shot = True" + textwrap.dedent(CALLS)) as ranks:
        for code, stdout, stderr in ranks.results():
            assert (code, stdout, stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (
            "Fake = type('Fake', (), {'__getattr__': lambda self, name: getattr(module, name)})\n"
            "zmqexec._cuda = sys.modules['zmqexec._cuda'] = fake = Fake()\n"
            "fake.can_access_peer = lambda device, peer: 0 if device == 1 else 1",
            "rank 1: GPU 1 has no access to the memory of GPU 0",
        ),
        (
            "del zmqexec._cuda\nsys.modules['zmqexec._cuda'] = None",
            "zmqexec was built without CUDA",
        ),
        (
            "Fake = type('Fake', (), {'__getattr__': lambda self, name: getattr(module, name)})\n"
            "zmqexec._cuda = sys.modules['zmqexec._cuda'] = fake = Fake()\n"
            "fake.ipc_handle = lambda pointer: b'1 2 3'",
            "rank 0: ipc_open: /proc/1/fd/2: ",
        ),
        (
            "if rank == 0:\n    one_shot.OneShot.all_reduce = lambda self, tensor, out: out.copy_(tensor)\n"
            "module.emulator_options(0, 300, 100_000_000)",
            "rank 1: rank 0 did not join all-reduce 0 within 10",
        ),
        (
            "real = one_shot.OneShot.all_reduce\n"
            "one_shot.OneShot.all_reduce = lambda self, tensor, out: real(self, tensor if rank else 2 * tensor, out)",
            "sums of 1 × torch.bfloat16 differ from NCCL's",
        ),
    ],
    ids=["no peer access", "not built", "no IPC", "a rank sends nothing", "wrong sums"],
)
def test_where_one_shot_does_not_work_nccl_does_everything_and_the_reason_is_said(broken, reason):
    script = "expects_one_shot = False\n" + broken + "\n" + textwrap.dedent(CALLS)
    with Ranks(2, script) as ranks:
        results = ranks.results()
    for code, stdout, stderr in results:
        assert (code, stdout) == (0, "done\n"), stderr
    assert "all-reduces go through NCCL alone: " in results[0][2]
    assert reason in results[0][2]
    assert results[1][2] == ""


IN_RANK_ORDER = """
    gpu_nccl.ONE_SHOT_BYTES = {tp_size: 1 << 12}
    group = join(in_rank_order=True)
    if not has_one_shot:
        group.one_shot.abort()
        group.one_shot = None
    def nccl_sums(tensor):
        raise AssertionError("NCCL adds as it likes")
    group.nccl_all_reduce_ = nccl_sums
    generator = torch.Generator()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (1, 3, 40):
            given = [torch.randn((rows, 100), generator=generator.manual_seed(r)).to(dtype) for r in range(tp_size)]
            hidden = torch.randn((rows, 100), generator=generator).to(dtype)
            total = given[0].float()
            for part in given[1:]:
                total = total + part.float()
            assert torch.equal(group.all_reduce(given[rank].clone()), total.to(dtype))
            added = hidden.clone()
            group.all_reduce_residual_(added, given[rank].clone())
            assert torch.equal(added, (total + hidden.float()).to(dtype))
    print("done", flush=True)
    group._gather("end", "")
    group.close()
"""


@pytest.mark.parametrize("has_one_shot", [True, False])
@pytest.mark.parametrize("tp_size", [2, 3])
def test_sums_in_rank_order_are_rounded_once_whatever_their_size(tp_size, has_one_shot):
    with Ranks(tp_size, f"has_one_shot = {has_one_shot}" + textwrap.dedent(IN_RANK_ORDER)) as ranks:
        for code, stdout, stderr in ranks.results():
            assert (code, stdout) == (0, "done\n"), stderr


def test_a_rank_that_stops_is_named_by_health_and_close_returns():
    script = """
    group = join(timeout_s=0.5)
    module.emulator_options(0, 300, 1_000_000)
    for _ in range(3):
        group.all_reduce(torch.ones(8))
    calls = 3 * len(gpu_nccl.CHECK_SIZES) + 3
    if rank == 1:
        sys.stdin.readline()
        os._exit(0)
    group.all_reduce(torch.ones(8))
    assert group.health().startswith(f"rank 1 did not join all-reduce {calls} within 0.5"), group.health()
    group.all_reduce(torch.ones(8))
    group.close()
    print("closed", flush=True)
    """
    with Ranks(2, script) as ranks:
        assert ranks.processes[0].communicate(timeout=DEADLINE_S) == ("closed\n", "")


@pytest.mark.gpu
def test_all_of_it_on_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    program = Path(__file__).parents[3] / "bench/gpu_kernels/all_reduce.py"
    command = [sys.executable, str(program), "--check", "--ranks", "2", "--seconds", "15"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE_S, check=True)
    rows = json.loads(done.stdout)
    assert [row["case"] for row in rows if row.get("ok")] == ["random calls", "replays", "a rank that does not come"]
    assert all(row.get("ok", True) for row in rows), rows


def test_close_does_not_wait_for_an_abort_that_hangs(monkeypatch):
    monkeypatch.setattr(gpu_nccl, "CLOSE_TIMEOUT_S", 0.1)

    class Stuck:
        def abort(self):
            time.sleep(DEADLINE_S)

    group = gpu_nccl.NcclCollectives.__new__(gpu_nccl.NcclCollectives)
    group.one_shot, group._comm = None, Stuck()
    started = time.monotonic()
    group.close()
    assert time.monotonic() - started < 10
    with pytest.raises(RuntimeError, match="closed"):
        group._open_comm()


def test_joining_that_hangs_ends_at_the_deadline_and_its_errors_come_through():
    with pytest.raises(RuntimeError, match=r"did not meet within 0\.1 s"):
        gpu_nccl._bounded(lambda: time.sleep(DEADLINE_S), 0.1, "the ranks did not meet")
    with pytest.raises(ZeroDivisionError):
        gpu_nccl._bounded(lambda: 1 / 0, 10.0, "")
    assert gpu_nccl._bounded(lambda: 5, 10.0, "") == 5


def test_a_missing_cupy_is_a_setting_to_mend(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'zmqexec\[cuda12\]'"):
        gpu_nccl._import_nccl()
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"


def test_more_ranks_than_gpus_is_a_setting_to_mend(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="tensor_parallel_size=2, but 1 GPUs are visible"):
        gpu_nccl.NcclCollectives(0, 2, -1, 1.0, join_timeout_s=1.0)
