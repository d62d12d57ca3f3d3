"""Settings: parsed once, frozen, and each with a line of help. (Bad values: tests/test_bad_input.py.)"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from zmqexec.config import EngineConfig, SamplingParams, ServerConfig, field_help, parse_config
from zmqexec.errors import ConfigError


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_every_field_has_a_line_of_help_and_a_default(cls: Any) -> None:
    lines = field_help(cls)
    assert list(lines) == list(cls.__struct_fields__)
    assert all(10 < len(line) < 120 for line in lines.values())
    assert parse_config(cls, {}) == cls()


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_what_is_parsed_is_what_was_given_and_stays_so(cls: Any) -> None:
    examples: dict[str, Any] = {
        "model": "path",
        "tensor_parallel_size": 2,
        "kv_cache_memory_bytes": 1 << 40,
        "gpu_memory_utilization": 1,  # an integer where a float is meant
        "enable_prefix_caching": False,
        "run_ahead": 0,
        "step_timeout_s": 0.25,
        "host": "::1",
        "port": 65535,
        "log_level": "debug",
    }
    given = {name: value for name, value in examples.items() if name in cls.__struct_fields__}
    config = parse_config(cls, given)
    assert {name: getattr(config, name) for name in given} == given
    assert msgspec.convert(msgspec.to_builtins(config), cls) == config
    with pytest.raises(AttributeError):
        setattr(config, next(iter(given)), None)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"port": -1}, "port=-1"),
        ({"port": 65536}, "<= 65535"),
        ({"host": ""}, "host=''"),
        ({"shutdown_timeout_s": -0.5}, ">= 0.0"),
        ({"max_body_bytes": 1023}, ">= 1024"),
        ({"log_level": "loud"}, "debug, info, warning, error"),
        ({"prot": 1}, "did you mean 'port'?"),
        ({"served_model_name": 5}, "served_model_name=5"),
    ],
)
def test_a_bad_server_setting_is_named_with_its_bound(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(ServerConfig, values)
    assert words in str(caught.value) and caught.value.param == next(iter(values))


def test_params_know_whether_they_are_greedy_and_which_strings_stop_them() -> None:
    assert SamplingParams(temperature=0).greedy and SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams(temperature=0.01).greedy
    assert SamplingParams().stop_strings == () == SamplingParams(stop=[]).stop_strings
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["a", "bc"]).stop_strings == ("a", "bc")


def test_every_sampling_field_is_explained() -> None:
    assert set(field_help(SamplingParams)) == set(SamplingParams.__struct_fields__)


def test_sampling_values_may_be_numbers_of_numpy_and_become_plain_ones() -> None:
    plain: dict[str, Any] = {
        **dict.fromkeys(("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"), 2),
        **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"), 0.5),
        "repetition_penalty": 1.5,
        "stop_token_ids": [3, 4],
        "logit_bias": {5: 0.25},
    }

    def as_numpy(value: Any) -> Any:
        match value:
            case dict():
                return {np.int64(token): np.float32(bias) for token, bias in value.items()}
            case list():
                return [np.int32(token) for token in value]
            case int():
                return np.int64(value)
        return np.float32(value)

    params = SamplingParams(**{name: as_numpy(value) for name, value in plain.items()})
    assert params == SamplingParams(**plain)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
