"""The command line: every setting is a flag, and a mistake is one line."""

import subprocess
import sys

import pytest

from zmqexec.config import EngineConfig, ServerConfig, field_help
from zmqexec.server.flags import parse_flags

EXAMPLES = {
    "model": "path", "tokenizer": "path", "tensor_parallel_size": 4, "device": "cpu", "dtype": "bfloat16",
    "load_format": "dummy", "max_model_len": 99, "max_num_seqs": 3, "max_num_batched_tokens": 512, "block_size": 8,
    "kv_cache_memory_bytes": 1000, "gpu_memory_utilization": 0.5, "enable_prefix_caching": False,
    "enable_chunked_prefill": False, "cuda_graphs": False,
    "deterministic": True, "check_ranks": True, "executor": "multiproc", "run_ahead": 0,
    "seed": 5, "step_timeout_s": 1.5,
    "start_timeout_s": 2.0, "num_threads": 2, "ring_bytes": 1 << 20, "transport": "zmq",
    "wait_policy": "eco", "bus_checksums": True, "stall_warning_s": 2.5, "name": "ours", "host": "::1", "port": 1,
    "chat_template": "file", "served_model_name": "name",
    "shutdown_timeout_s": 0.5, "max_body_bytes": 5000, "max_logprobs": 5, "log_level": "error",
}  # fmt: skip


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        parse_flags(argv)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("field", [*EngineConfig.__struct_fields__, *ServerConfig.__struct_fields__])
def test_every_setting_is_a_flag(field):
    value = EXAMPLES.get(field)
    assert value is not None, f"give {field} an example here"
    flag = field.replace("_", "-")
    argv = (
        {True: [f"--{flag}"], False: [f"--no-{flag}"]}[value] if isinstance(value, bool) else [f"--{flag}", str(value)]
    )
    engine, server = parse_flags(argv)
    assert getattr(engine if field in EngineConfig.__struct_fields__ else server, field) == value


def test_no_flags_mean_the_demo_model_with_two_workers():
    engine, server = parse_flags([])
    assert engine.model is None and engine.tensor_parallel_size == 2
    assert (server.host, server.port) == ("127.0.0.1", 8000)
    assert parse_flags(["--tensor-parallel-size", "1"])[0].tensor_parallel_size == 1
    assert parse_flags(["--model", "x"])[0].tensor_parallel_size == 1
    assert parse_flags(["--executor", "inline"])[0].tensor_parallel_size == 1


def test_underscores_are_accepted_in_flags():
    assert parse_flags(["--max_model_len=7", "--enable_prefix_caching"])[0].max_model_len == 7


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--port", "x"], ["--port", "'x'", "integer"]),
        (["--port", "70000"], ["--port", "70000", "65535"]),
        (["--max-model-len", "1"], ["--max-model-len", ">= 2"]),
        (["--gpu-memory-utilization", "1.5"], ["gpu_memory_utilization=1.5", "<= 1"]),
        (["--step-timeout-s", "nan"], ["--step-timeout-s"]),
        (["--dtype", "float8"], ["--dtype", "bfloat16"]),
        (["--max-num-seqs", "9", "--max-num-batched-tokens", "8"], ["max_num_batched_tokens=8", "max_num_seqs=9"]),
        (["--executor", "inline", "--tensor-parallel-size", "2"], ["--executor", "multiproc"]),
        (["--modle", "x"], ["'--modle'", "did you mean '--model'"]),
        (["path/to/model"], ["--model path/to/model"]),
        (["--port"], ["--port"]),
    ],
)
def test_a_mistake_is_one_line_that_names_flag_and_remedy(capsys, argv, words):
    line = refusal(capsys, *argv)
    assert all(word in line for word in words), line


def test_help_has_every_flag_with_the_words_of_the_docstring(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        parse_flags(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for cls in (EngineConfig, ServerConfig):
        lines = field_help(cls)
        assert set(lines) == set(cls.__struct_fields__)
        for field, line in lines.items():
            assert "--" + field.replace("_", "-") in shown and " ".join(line.split()) in shown, field


def test_the_server_imports_neither_torch_nor_transformers():
    code = "import sys, zmqexec.server.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
