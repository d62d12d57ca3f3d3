"""The command line, generated from the settings Structs: a flag per field, help from the field's line.

Runs in: server. A mistake ends with one line and exit code 2 before anything is started.
"""

from __future__ import annotations

import argparse
import difflib
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from msgspec import Struct

from zmqexec.config import EngineConfig, ServerConfig, field_help, parse_config
from zmqexec.errors import ConfigError
from zmqexec.version import __version__

DEMO_WORKERS = 2


class Parser(argparse.ArgumentParser):
    """argparse that ends with one line, not with the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parse_flags(argv: Sequence[str]) -> tuple[EngineConfig, ServerConfig]:
    """Settings of a command line. Exits with code 2 and one line for a flag that cannot work."""
    parser = _parser()
    values, unknown = parser.parse_known_args([_with_dashes(argument) for argument in argv])
    if unknown:
        parser.error(_about_unknown(parser, unknown[0]))
    given = vars(values)
    if "model" not in given and given.get("executor") != "inline":
        given.setdefault("tensor_parallel_size", DEMO_WORKERS)
    try:
        engine = parse_config(EngineConfig, _typed(EngineConfig, given))
        return engine, parse_config(ServerConfig, _typed(ServerConfig, given))
    except ConfigError as error:
        parser.error(f"{_flag(error.param)}: {error}" if error.param else str(error))


def _parser() -> Parser:
    parser = Parser(
        prog="zmqexec-serve",
        description="Serve a model over an OpenAI-compatible API. Without --model: the built-in demo model, "
        f"on the CPU with {DEMO_WORKERS} workers.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"zmqexec {__version__}")
    for title, cls in (("engine", EngineConfig), ("server", ServerConfig)):
        group = parser.add_argument_group(title)
        help_lines = field_help(cls)
        hints = get_type_hints(cls)
        for field in cls.__struct_fields__:
            default = _default(cls, field)
            text = help_lines.get(field, "") + ("" if default is None else f" (default: {default})")
            options: dict[str, Any] = {"dest": field, "help": text.replace("%", "%%")}
            if hints[field] is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                choices = _choices(hints[field])
                options["metavar"] = "{" + ",".join(choices) + "}" if choices else _base(hints[field]).__name__.upper()
            group.add_argument(_flag(field), **options)
    return parser


def _typed(cls: type[Struct], given: dict[str, Any]) -> dict[str, Any]:
    """The fields of `cls` that were given, numbers read from their text."""
    hints = get_type_hints(cls)
    typed: dict[str, Any] = {}
    for field in cls.__struct_fields__:
        if field not in given:
            continue
        value, base = given[field], _base(hints[field])
        if isinstance(value, str) and base in (int, float):
            try:
                value = base(value)
            except ValueError:
                kind = "an integer" if base is int else "a number"
                raise ConfigError(f"{field}={value!r}: must be {kind}", field) from None
        typed[field] = value
    return typed


def _base(hint: Any) -> type:
    """`int` of `Annotated[int, ...] | None`."""
    if get_origin(hint) is Annotated:
        return _base(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return _base(next(part for part in get_args(hint) if part is not types.NoneType))
    if get_origin(hint) is Literal:
        return str
    return hint if isinstance(hint, type) else str


def _choices(hint: Any) -> list[str]:
    return [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []


def _default(cls: type[Struct], field: str) -> Any:
    fields = cls.__struct_fields__
    defaults = cls.__struct_defaults__
    return defaults[fields.index(field) - (len(fields) - len(defaults))]


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _with_dashes(argument: str) -> str:
    """`--max_model_len=8` as `--max-model-len=8`: both spellings are in use."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _about_unknown(parser: Parser, argument: str) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}; a model is given as --model {argument}"
    name = argument.partition("=")[0]
    close = difflib.get_close_matches(name, parser._option_string_actions, n=1)
    return f"unknown flag {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
