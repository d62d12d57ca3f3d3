"""What the package promises by name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import zmqexec
from zmqexec import errors


def test_every_public_name_exists_and_is_documented() -> None:
    for name in zmqexec.__all__:
        value = getattr(zmqexec, name)
        if inspect.isclass(value):
            assert inspect.getdoc(value), name


def test_the_names_that_users_rely_on_are_public() -> None:
    promised = {"Engine", "AsyncEngine", "SamplingParams", "RequestOutput", "CompletionOutput", "EngineConfig"}
    assert promised <= set(zmqexec.__all__)


def test_every_error_is_public_and_drawn_in_the_tree() -> None:
    drawn = set(re.findall(r"^[\s│├└─]*(\w+)", errors.__doc__ or "", re.MULTILINE))
    assert set(errors.BY_NAME) <= drawn
    assert set(errors.BY_NAME) <= set(zmqexec.__all__)


def test_an_error_survives_the_way_to_another_process() -> None:
    for name, cls in errors.BY_NAME.items():
        arrived = errors.from_info(name, "what happened", "field" if issubclass(cls, errors.UserError) else None)
        assert type(arrived) is cls
        assert str(arrived) == "what happened"
    assert isinstance(errors.from_info("ZeroDivisionError", "x"), errors.InternalError)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(zmqexec, "Motor")


def test_every_module_says_what_it_is_and_where_it_runs() -> None:
    package = Path(zmqexec.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text()
        if text and path != package / "__init__.py":
            docstring = text.split('"""')[1]
            assert re.search(r"Runs in: (driver|worker|server|both|a child process|a process of its own)", docstring), (
                path
            )
