"""Every message survives its journey, and nothing else is taken for one."""

from __future__ import annotations

import tracemalloc
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzzing import decode_message
from zmqexec import protocol
from zmqexec.config import EngineConfig, SamplingParams
from zmqexec.protocol import FromEngine, Message, ToDriver, ToEngine, ToWorker, pack, unpack

UNIONS: dict[str, Any] = {"ToWorker": ToWorker, "ToDriver": ToDriver, "ToEngine": ToEngine, "FromEngine": FromEngine}

CONFIGS = [EngineConfig(), EngineConfig(model="m", run_ahead=0, kv_cache_memory_bytes=1 << 40, step_timeout_s=0.5)]
PARAMS = [
    SamplingParams(),
    SamplingParams(n=2, stop=["a", "é"], stop_token_ids=[1], logit_bias={5: -1.5}, seed=2**64 - 1, logprobs=-1),
    SamplingParams(max_tokens=None, stop="x", seed=-(2**63), prompt_logprobs=0, temperature=0.0),
]


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of an annotation as messages use them."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(values_of, arguments))
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    if origin is Literal:
        return st.sampled_from(arguments)
    if kind is EngineConfig:
        return st.sampled_from(CONFIGS)
    if kind is SamplingParams:
        return st.sampled_from(PARAMS)
    if isinstance(kind, type) and issubclass(kind, Message):
        return st.builds(kind, **{name: values_of(hint) for name, hint in get_type_hints(kind).items()
                                  if name in kind.__struct_fields__})  # fmt: skip
    simple = {
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(),
        bytes: st.binary(max_size=40),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return simple[kind]


@pytest.mark.parametrize("name", UNIONS)
@given(data=st.data())
def test_every_message_arrives_as_it_was_sent(name: str, data: st.DataObject) -> None:
    union = UNIONS[name]
    for kind in get_args(union):
        message = data.draw(values_of(kind))
        encoded = msgspec.msgpack.encode(message)
        received = msgspec.msgpack.decode(encoded, type=union)
        assert type(received) is kind and received == message
        for damaged in (encoded + b"\x00", encoded[:-1]):
            with pytest.raises(msgspec.MsgspecError):
                msgspec.msgpack.decode(damaged, type=union)


@pytest.mark.parametrize("name", UNIONS)
@given(garbage=st.binary(max_size=60))
def test_garbage_is_an_error_or_a_message_of_the_union(name: str, garbage: bytes) -> None:
    try:
        message = msgspec.msgpack.decode(garbage, type=UNIONS[name])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    assert isinstance(message, get_args(UNIONS[name]))


@pytest.mark.parametrize("name", UNIONS)
@given(data=st.data())
def test_a_damaged_message_is_an_error_or_another_message_and_takes_little_memory(
    name: str, data: st.DataObject
) -> None:
    """What a decoder allocates is bounded by the bytes there are, not by the lengths that they claim."""
    message = data.draw(values_of(data.draw(st.sampled_from(get_args(UNIONS[name])))))
    damaged = bytearray(msgspec.msgpack.encode(message))
    claims_much = st.sampled_from(
        [b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff"]
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(claims_much | st.binary(max_size=3))
    decode_message(name, bytes(damaged))
    tracemalloc.start()
    try:
        decode_message(name, bytes(damaged))
        assert tracemalloc.get_traced_memory()[1] < 100_000 + 200 * len(damaged)
    finally:
        tracemalloc.stop()


def test_every_message_belongs_to_a_union_or_to_another_message_and_is_closed() -> None:
    kinds = [kind for kind in vars(protocol).values() if isinstance(kind, type) and issubclass(kind, Message)]
    kinds.remove(Message)
    travelling = {kind for union in UNIONS.values() for kind in get_args(union)}
    nested = {str(hint) + repr(hint) for kind in kinds for hint in get_type_hints(kind).values()}
    for kind in kinds:
        assert kind in travelling or any(kind.__name__ in hint for hint in nested), f"{kind.__name__} is never sent"
        config = kind.__struct_config__
        assert config.frozen and config.array_like and config.forbid_unknown_fields
        assert Any not in get_type_hints(kind).values()
    for union in UNIONS.values():
        tags = [kind.__struct_config__.tag for kind in get_args(union)]
        assert len(set(tags)) == len(tags)


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_packed_integers_are_little_endian_int32(values: list[int]) -> None:
    assert unpack(pack(values)) == values
    assert pack(values) == b"".join(value.to_bytes(4, "little", signed=True) for value in values)


def test_what_does_not_fit_is_not_packed() -> None:
    for value in (2**31, -(2**31) - 1):
        with pytest.raises(OverflowError):
            pack([value])
    with pytest.raises(ValueError, match="not a multiple of item size"):
        unpack(b"123")
