"""What cannot work is refused in words, before a process is started; a bad request harms no other."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zmqexec import CheckpointError, ConfigError, Engine, RequestError, SamplingParams
from zmqexec.demo import CHECKPOINT

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
HELLO = [{"role": "user", "content": "Who are you?"}]


# ── settings and checkpoints ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"a process is started: {arguments}")

    monkeypatch.setattr("zmqexec.child.subprocess.Popen", refuse)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo model, to be spoiled."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


def refusal(error: type[ValueError], *words: str, **settings: Any) -> None:
    """Engine(**settings) raises `error`, with every one of `words` in its text."""
    with pytest.raises(error) as caught:
        Engine(**settings)
    text = str(caught.value)
    assert all(word in text for word in words), text


def spoil_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def rewrite_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the safetensors header in place, its length included."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


@pytest.mark.usefixtures("no_processes")
class TestCheckpoint:
    def test_missing_folder(self, tmp_path: Path) -> None:
        refusal(CheckpointError, str(tmp_path / "nowhere"), "does not exist", model=tmp_path / "nowhere")

    def test_a_file_instead_of_a_folder(self) -> None:
        refusal(CheckpointError, "config.json", "not a folder", model=CHECKPOINT / "config.json")

    def test_missing_config(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").unlink()
        refusal(CheckpointError, "config.json does not exist", "Hugging Face", model=checkpoint)

    @pytest.mark.parametrize("content", [b"", b'{"architectures": [', b"[1, 2]", b"\xff\xfe", b"[" * 100_000])
    def test_broken_config(self, checkpoint: Path, content: bytes) -> None:
        (checkpoint / "config.json").write_bytes(content)
        refusal(CheckpointError, "config.json", "not valid JSON", model=checkpoint)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "supported: LlamaForCausalLM"]),
            ({"architectures": ...}, ["unsupported architecture: none", "LlamaForCausalLM"]),
            ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "supported: silu"]),
            ({"num_hidden_layers": ...}, ["num_hidden_layers=None", "positive integer"]),
            ({"num_hidden_layers": 0}, ["num_hidden_layers=0"]),
            ({"hidden_size": "128"}, ["hidden_size='128'"]),
            ({"num_key_value_heads": 3}, ["num_attention_heads=8", "num_key_value_heads=3"]),
            ({"head_dim": 15}, ["head_dim=15", "even"]),
            ({"rms_norm_eps": -1.0}, ["rms_norm_eps=-1.0"]),
            ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_type='yarn'", "supported: default, linear"]),
            ({"rope_scaling": {"rope_type": ["linear"]}}, ["rope_type=['linear']"]),
            ({"rope_scaling": "linear"}, ["rope_scaling='linear'"]),
            ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, ["factor=0", "positive"]),
            ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "1.0"]),
            ({"torch_dtype": "float8"}, ["dtype='float8'", "float32, bfloat16, float16"]),
            ({"architectures": "LlamaForCausalLM"}, ["architectures='LlamaForCausalLM'", "list"]),
        ],
    )
    def test_config_that_cannot_be_served(self, checkpoint: Path, changes: dict[str, Any], words: list[str]) -> None:
        spoil_config(checkpoint, **changes)
        refusal(CheckpointError, *words, model=checkpoint)

    def test_missing_weights(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").unlink()
        refusal(CheckpointError, str(checkpoint), "no *.safetensors file", model=checkpoint)

    def test_a_shard_that_the_index_names_is_missing(self, checkpoint: Path) -> None:
        index = {"weight_map": {"lm_head.weight": "model.safetensors", "model.norm.weight": "model-2.safetensors"}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        refusal(CheckpointError, "model-2.safetensors", model=checkpoint)

    @pytest.mark.parametrize("size", [0, 4, 100, 2_000_000])
    def test_truncated_weights(self, checkpoint: Path, size: int) -> None:
        path = checkpoint / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        refusal(CheckpointError, "model.safetensors", "truncated", str(size), model=checkpoint)

    def test_a_git_lfs_pointer_instead_of_weights(self, checkpoint: Path) -> None:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
        (checkpoint / "model.safetensors").write_bytes(pointer)
        refusal(CheckpointError, "model.safetensors", "not a safetensors file", model=checkpoint)

    def test_a_damaged_header(self, checkpoint: Path) -> None:
        path = checkpoint / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[20:24] = b"\x00\x00\x00\x00"
        path.write_bytes(data)
        refusal(CheckpointError, "damaged safetensors header", model=checkpoint)

    def test_shapes_that_do_not_match_the_config(self, checkpoint: Path) -> None:
        spoil_config(checkpoint, intermediate_size=321)
        refusal(CheckpointError, "mlp.gate_proj.weight", "[320, 128]", "[321, 128]", model=checkpoint)

    def test_a_missing_tensor(self, checkpoint: Path) -> None:
        rewrite_header(checkpoint, lambda header: header.pop("model.layers.2.self_attn.v_proj.weight"))
        refusal(CheckpointError, "no tensor 'model.layers.2.self_attn.v_proj.weight'", model=checkpoint)

    def test_a_tensor_of_a_type_that_cannot_be_loaded(self, checkpoint: Path) -> None:
        rewrite_header(checkpoint, lambda header: header["model.norm.weight"].update(dtype="F8_E4M3"))
        refusal(CheckpointError, "model.norm.weight", "F8_E4M3", "F32, BF16, F16", model=checkpoint)

    def test_a_tokenizer_that_cannot_be_read(self, checkpoint: Path, tmp_path: Path) -> None:
        refusal(CheckpointError, "tokenizer folder", str(tmp_path / "none"), tokenizer=str(tmp_path / "none"))
        (checkpoint / "tokenizer.json").write_text("{")
        refusal(CheckpointError, "tokenizer.json", model=checkpoint)


@pytest.mark.usefixtures("no_processes")
class TestSettings:
    def test_query_heads_that_do_not_divide(self) -> None:
        refusal(ConfigError, "tensor_parallel_size=3", "8 query heads", "1, 2, 4, 8", tensor_parallel_size=3)

    @pytest.mark.parametrize(
        ("name", "remedy"),
        [
            ("tensor_paralel_size", "did you mean 'tensor_parallel_size'?"),
            ("max_num_seq", "did you mean 'max_num_seqs'?"),
            ("zzz", "known fields: model, tokenizer, tensor_parallel_size"),
        ],
    )
    def test_unknown_field(self, name: str, remedy: str) -> None:
        refusal(ConfigError, repr(name), remedy, **{name: 1})

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("tensor_parallel_size", 0, ">= 1"),
            ("tensor_parallel_size", 65, "<= 64"),
            ("tensor_parallel_size", 2.0, "`int`"),
            ("tensor_parallel_size", True, "`int`"),
            ("device", "tpu", "auto, cpu, cuda"),
            ("device", "cuda", "no NVIDIA GPU is visible"),
            ("dtype", "float64", "auto, float32, bfloat16, float16"),
            ("load_format", "pickle", "auto, dummy"),
            ("max_model_len", 1, ">= 2"),
            ("max_num_seqs", 0, ">= 1"),
            ("max_num_seqs", 4097, "<= 4096"),
            ("max_num_batched_tokens", 0, ">= 1"),
            ("max_num_batched_tokens", (1 << 20) + 1, "<= 1048576"),
            ("max_num_batched_tokens", 255, "max_num_seqs=256"),
            ("block_size", 0, ">= 1"),
            ("block_size", 1025, "<= 1024"),
            ("kv_cache_memory_bytes", 0, ">= 1"),
            ("kv_cache_memory_bytes", -5, ">= 1"),
            ("gpu_memory_utilization", 0.0, "> 0.0"),
            ("gpu_memory_utilization", 1.1, "<= 1.0"),
            ("gpu_memory_utilization", math.nan, "> 0.0"),
            ("enable_prefix_caching", "yes", "`bool`"),
            ("enable_chunked_prefill", 1, "`bool`"),
            ("executor", "ray", "auto, inline, multiproc"),
            ("run_ahead", -1, ">= 0"),
            ("run_ahead", 5, "<= 4"),
            ("seed", -1, ">= 0"),
            ("seed", 1 << 63, "<= 9223372036854775807"),
            ("step_timeout_s", 0.0, "> 0.0"),
            ("step_timeout_s", math.nan, "> 0.0"),
            ("step_timeout_s", math.inf, "<= 86400.0"),
            ("start_timeout_s", -1.0, "> 0.0"),
            ("start_timeout_s", 1e6, "<= 86400.0"),
            ("num_threads", 0, ">= 1"),
            ("num_threads", 1025, "<= 1024"),
            ("ring_bytes", 1000, ">= 65536"),
            ("stall_warning_s", -1.0, ">= 0.0"),
            ("stall_warning_s", math.nan, ">= 0.0"),
            ("name", "", ">= 1"),
            ("name", "x" * 64, "<= 63"),
            ("name", "a\x1b[2J", "printable"),
            ("ring_bytes", 1 << 33, "<= 2147483648"),
            ("model", 5, "`str"),
            ("tokenizer", 5, "`str"),
        ],
    )
    def test_bound(self, field: str, value: Any, words: str) -> None:
        refusal(ConfigError, f"{field}={value!r}", words, **{field: value})

    def test_inline_with_two_ranks(self) -> None:
        refusal(ConfigError, "executor='inline'", "multiproc", executor="inline", tensor_parallel_size=2)

    def test_too_little_memory_for_one_sequence(self) -> None:
        # 512 tokens of 3 layers with 4 KV heads of 16 float32 are 786,432 bytes.
        words = ["kv_cache_memory_bytes=786431", "max_model_len=512", "needs 786432 bytes", "at most 496"]
        refusal(ConfigError, *words, kv_cache_memory_bytes=786_431)

    def test_longer_than_the_model(self) -> None:
        refusal(ConfigError, "max_model_len=513", "max_position_embeddings=512", "lower", max_model_len=513)

    def test_a_budget_that_no_whole_prompt_fits_in(self) -> None:
        words = ["max_num_batched_tokens=300", "max_model_len=512", "enable_chunked_prefill", "raise it"]
        refusal(ConfigError, *words, max_num_batched_tokens=300, enable_chunked_prefill=False)


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(kv_cache_memory_bytes=16 << 20, max_model_len=64, num_threads=1) as engine:
        yield engine


@pytest.fixture
def still_serving(engine: Engine) -> Iterator[None]:
    """Whatever a test did, it started no step, no request is open, and the engine answers the next one."""
    steps = engine.stats.steps
    yield
    assert engine.stats.steps == steps and not engine.has_unfinished_requests()
    assert engine.generate("12+30=", GREEDY, use_tqdm=False)[0].outputs[0].text == "42"
    while engine.has_unfinished_requests():  # the step that was ahead
        engine.step()


BAD_PROMPTS: list[tuple[Any, list[str]]] = [
    ([], ["empty"]),
    ({"prompt_token_ids": []}, ["empty"]),
    ([512], ["token id 512", "[0, 512)"]),
    ([5, -1], ["token id -1", "[0, 512)"]),
    ([2**40], [str(2**40), "[0, 512)"]),
    ([5] * 64, ["64 tokens", "max_model_len=64", "63"]),
    ("5" * 200, ["201 tokens", "max_model_len=64"]),
    (None, ["None", "text or a list of token ids"]),
    (5, ["5", "text or a list of token ids"]),
    (b"12+30=", ["b'12+30='", "text or a list of token ids"]),
    ([1.5], ["[1.5]", "text or a list of token ids"]),
    ([True, False], ["[True, False]", "text or a list of token ids"]),
    ([1, "a"], ["[1, 'a']", "text or a list of token ids"]),
    ({"text": "a"}, ["'text'", "'prompt' and 'prompt_token_ids'"]),
    ({"prompt": "a", "prompt_token_ids": [1]}, ["'prompt', 'prompt_token_ids'"]),
    ({"prompt": 5}, ["5", "text or a list of token ids"]),
    ({"prompt": "a", "cache_salt": 5}, ["cache_salt=5", "text"]),
    ({"prompt": "a", "cache_salt": "\ud800"}, ["cache_salt", "surrogate"]),
    ("half \ud800", ["surrogate"]),
]


@pytest.mark.usefixtures("still_serving")
@pytest.mark.parametrize(("prompt", "words"), BAD_PROMPTS, ids=lambda value: repr(value)[:30])
def test_a_bad_prompt_is_refused_and_none_of_its_batch_is_started(
    engine: Engine, prompt: Any, words: list[str]
) -> None:
    for batch in ([[5], prompt], ["12+30=", prompt, "1+1="]):
        with pytest.raises(RequestError) as caught:
            engine.generate(batch, GREEDY, use_tqdm=False)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert not engine.has_unfinished_requests()
    with pytest.raises(RequestError):
        engine.add_request("bad", prompt, GREEDY)
    assert not engine.has_unfinished_requests()


@pytest.mark.usefixtures("still_serving")
@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([[]], "messages"),
        ([{"role": "tool", "content": "x"}], "roles system, user and assistant, not tool"),
        ([{"role": "user"}], "chat template refuses"),
        ([{"content": "x"}], "chat template refuses"),
        ([[HELLO[0], 5]], "messages"),
        ("Who are you?", "messages"),
        ([HELLO, "Who are you?"], "messages"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "user", "content": "1+" * 100}], "max_model_len=64"),
    ],
    ids=repr,
)
def test_a_bad_chat_is_refused(engine: Engine, messages: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine.chat(messages, GREEDY, use_tqdm=False)


@pytest.mark.usefixtures("still_serving")
@pytest.mark.parametrize("field", ["stop_token_ids", "logit_bias"])
def test_token_ids_in_params_must_be_in_the_vocabulary(engine: Engine, field: str) -> None:
    value: Any = [512] if field == "stop_token_ids" else {512: 1.0}
    with pytest.raises(RequestError, match=rf"{field}: token id 512 is outside the vocabulary \[0, 512\)"):
        engine.generate("1+1=", SamplingParams(**{field: value}), use_tqdm=False)


@pytest.mark.usefixtures("still_serving")
@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
def test_no_more_logprobs_than_the_vocabulary_has(engine: Engine, field: str) -> None:
    with pytest.raises(RequestError, match=f"{field}=513: the vocabulary has 512 tokens"):
        engine.generate("1+1=", SamplingParams(**{field: 513}), use_tqdm=False)  # type: ignore[arg-type]


@pytest.mark.usefixtures("still_serving")
@pytest.mark.parametrize("params", [{"temperature": 0}, 5, "greedy", [{"n": 2}], [None]], ids=repr)
def test_sampling_params_of_another_type_are_refused(engine: Engine, params: Any) -> None:
    with pytest.raises(RequestError, match="sampling_params"):
        engine.generate(["1+1="], params, use_tqdm=False)
    with pytest.raises(RequestError, match="sampling_params"):
        engine.add_request("a", "1+1=", params)


@pytest.mark.usefixtures("still_serving")
def test_a_request_id_of_another_type_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="request_id=5"):
        engine.add_request(5, "1+1=", GREEDY)  # type: ignore[arg-type]


NOT_NUMBERS: list[Any] = [math.nan, math.inf, -math.inf, "1", None, True, [1]]
NOT_INTEGERS: list[Any] = [1.0, math.nan, "1", True, [1]]

BAD_VALUES: dict[str, tuple[list[Any], str]] = {
    "n": ([0, -1, 1025, None, *NOT_INTEGERS], "integer in [1, 1024]"),
    "temperature": ([-0.1, *NOT_NUMBERS], "number in [0.0, inf)"),
    "top_p": ([0, -0.1, 1.1, *NOT_NUMBERS], "number in (0.0, 1.0]"),
    "top_k": ([-2, 2**31, None, *NOT_INTEGERS], "integer in [-1, 2147483647]"),
    "min_p": ([-0.1, 1.1, *NOT_NUMBERS], "number in [0.0, 1.0]"),
    "seed": ([2**64, -(2**63) - 1, *NOT_INTEGERS], "integer in [-9223372036854775808, 18446744073709551615] or None"),
    "max_tokens": ([0, -1, *NOT_INTEGERS], "integer in [1, 2147483647] or None"),
    "min_tokens": ([-1, None, *NOT_INTEGERS], "integer in [0, 2147483647]"),
    "stop": (["", [""], ["a", 5], 5, {"a": 1}], "non-empty string or a list of them"),
    "stop_token_ids": ([[-1], [1.5], ["a"], 5, "12"], "token ids >= 0"),
    "include_stop_str_in_output": ([None, 1, "yes"], "True or False"),
    "ignore_eos": ([None, 1, "yes"], "True or False"),
    "presence_penalty": ([-2.1, 2.1, *NOT_NUMBERS], "number in [-2.0, 2.0]"),
    "frequency_penalty": ([-2.1, 2.1, *NOT_NUMBERS], "number in [-2.0, 2.0]"),
    "repetition_penalty": ([0, -1.0, *NOT_NUMBERS], "number in (0.0, inf)"),
    "logit_bias": (
        [{5: 101}, {5: math.nan}, {5: "a"}, {"a": 1.0}, {-1: 1.0}, [1], 5],
        "token ids to values in [-100, 100]",
    ),
    "logprobs": ([-2, 2**31, *NOT_INTEGERS], "integer in [-1, 2147483647] or None"),
    "prompt_logprobs": ([-2, *NOT_INTEGERS], "integer in [-1, 2147483647] or None"),
    "skip_special_tokens": ([None, 1, "yes"], "True or False"),
}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [(field, value, allowed) for field, (values, allowed) in BAD_VALUES.items() for value in values],
    ids=repr,
)
def test_a_sampling_value_out_of_range_is_named_with_its_range(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert str(caught.value).startswith(f"{field}=") and allowed in str(caught.value)


def test_bad_values_of_every_sampling_field_are_tried() -> None:
    assert set(BAD_VALUES) == set(SamplingParams.__struct_fields__)


def test_more_min_tokens_than_max_tokens_are_refused() -> None:
    with pytest.raises(RequestError, match="min_tokens=9: must be at most max_tokens=8"):
        SamplingParams(min_tokens=9, max_tokens=8)
