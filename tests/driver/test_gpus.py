"""Where the workers will compute is decided without touching a GPU."""

from __future__ import annotations

import pytest

from zmqexec.config import EngineConfig
from zmqexec.driver import gpus
from zmqexec.driver.plan import make_plan
from zmqexec.errors import ConfigError


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(num_gpus, cuda)`: a machine with so many GPUs, and a torch for that CUDA."""

    def make(num_gpus, cuda="13.0"):
        for index in range(num_gpus):
            (tmp_path / f"nvidia{index}").touch()
        for name in ("nvidiactl", "nvidia-uvm", "null"):
            (tmp_path / name).touch()
        count = gpus.num_visible_gpus
        monkeypatch.setattr(gpus, "num_visible_gpus", lambda: count(tmp_path))
        monkeypatch.setattr(gpus, "torch_cuda_version", lambda: cuda)
        monkeypatch.setattr(gpus, "find_spec", lambda name: None)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


def test_auto_takes_the_gpus_where_there_are_any(machine):
    machine(1)
    assert gpus.choose_device(EngineConfig()) == "cuda"


@pytest.mark.parametrize(("num_gpus", "cuda"), [(0, "13.0"), (2, None)])
def test_auto_takes_the_cpu_without_a_gpu_or_a_torch_for_it(machine, num_gpus, cuda):
    machine(num_gpus, cuda)
    assert gpus.choose_device(EngineConfig()) == "cpu"


def test_the_demo_model_runs_on_the_cpu_where_there_are_too_few_gpus_for_its_workers(machine):
    machine(1)
    assert gpus.choose_device(EngineConfig(tensor_parallel_size=2)) == "cpu"


def test_the_cpu_can_be_asked_for(machine):
    machine(2)
    assert gpus.choose_device(EngineConfig(device="cpu", tensor_parallel_size=4)) == "cpu"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("0,1", 2), ("1", 1), ("", 0), ("-1", 0), ("0,-1,1", 1), ("0,1,2,3,4", 3), ("GPU-abc,GPU-def", 2)],
)
def test_only_visible_gpus_count(machine, monkeypatch, visible, expected):
    machine(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.num_visible_gpus() == expected


@pytest.mark.parametrize(
    ("num_gpus", "cuda", "config", "words"),
    [
        (0, "13.0", {"device": "cuda"}, "no NVIDIA GPU is visible"),
        (1, None, {"device": "cuda"}, "the installed torch has no CUDA"),
        (1, "13.0", {"tensor_parallel_size": 2, "model": "m"}, "1 are visible"),
        (1, "13.0", {"tensor_parallel_size": 2, "device": "cuda"}, "1 are visible"),
        (2, "13.0", {"tensor_parallel_size": 2, "model": "m"}, r"zmqexec\[cuda13\]"),
        (2, "12.8", {"tensor_parallel_size": 2, "device": "cuda"}, r"zmqexec\[cuda12\]"),
    ],
)
def test_what_cannot_run_is_refused_with_the_remedy(machine, num_gpus, cuda, config, words):
    machine(num_gpus, cuda)
    with pytest.raises(ConfigError, match=words):
        gpus.choose_device(EngineConfig(**config))


@pytest.mark.parametrize(
    ("config", "param"), [({"max_num_seqs": 1025}, "max_num_seqs"), ({"block_size": 8}, "block_size")]
)
def test_what_the_kernels_cannot_do_is_refused_before_a_process_starts(machine, config, param):
    machine(1)
    with pytest.raises(ConfigError, match=f"{param}=.* on a GPU") as refusal:
        make_plan(EngineConfig(device="cuda", **config))
    assert refusal.value.param == param


def test_blocks_are_counted_with_their_heads_as_the_device_pads_them(machine):
    machine(1)
    on_gpu, on_cpu = (make_plan(EngineConfig(device=device, dtype="bfloat16")) for device in ("cuda", "cpu"))
    assert on_gpu.model.head_dim < 64
    assert on_gpu.block_bytes * on_gpu.model.head_dim == on_cpu.block_bytes * 64
    assert make_plan(EngineConfig(device="cuda", dtype="float32")).block_bytes == 2 * on_cpu.block_bytes


@pytest.mark.parametrize(
    ("device", "settings", "tokens"),
    [("cpu", {}, 2048), ("cpu", {"max_num_seqs": 3000}, 3000), ("cuda", {"max_num_seqs": 300}, 8492),
     ("cuda", {"max_num_batched_tokens": 512}, 512)],
)  # fmt: skip
def test_a_step_takes_more_tokens_on_a_gpu_unless_told_otherwise(machine, device, settings, tokens):
    machine(1)
    assert make_plan(EngineConfig(device=device, **settings)).config.step_tokens == tokens


def test_a_cache_too_small_for_one_sequence_is_refused_with_what_helps_on_a_gpu(machine):
    machine(1)
    plan = make_plan(EngineConfig(device="cuda"))
    with pytest.raises(ConfigError, match="raise gpu_memory_utilization, use more GPUs, or lower max_model_len"):
        plan.num_blocks(plan.block_bytes)
    with pytest.raises(ConfigError, match="raise kv_cache_memory_bytes to that") as refusal:
        make_plan(EngineConfig(device="cuda", kv_cache_memory_bytes=plan.block_bytes))
    needed = int(str(refusal.value).split("needs ")[1].split()[0])
    assert make_plan(EngineConfig(device="cuda", kv_cache_memory_bytes=needed)).num_blocks(needed) > 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [("cuda: Optional[str] = '13.0'", "13.0"), ("cuda = '12.8'", "12.8"), ("cuda: Optional[str] = None", None)],
)
def test_torchs_cuda_version_is_read_from_its_files(tmp_path, monkeypatch, line, expected):
    (tmp_path / "version.py").write_text(f"__version__ = '2.11.0'\ndebug = False\n{line}\nhip = '6.0'\n")

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(gpus, "find_spec", lambda name: Spec)
    assert gpus.torch_cuda_version() == expected
