"""Who may import whom. Function-level imports count."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zmqexec

PACKAGE = Path(zmqexec.__file__).parent

BASE = {"errors", "version", "config", "protocol"}
MODEL_FILES = {"model_config", "checkpoint", "cache_size"}
TEXT = {"chat_template", "convert_tokenizer", "decoding", "text"}

LAYERS: dict[str, set[str]] = {
    # layer: the layers of zmqexec that it may import, besides itself
    "errors": set(),
    "version": set(),
    "config": {"errors"},
    "protocol": {"config"},
    "model_config": {"errors"},
    "checkpoint": {"errors", "model_config"},
    "cache_size": {"config", "model_config"},
    "child": {"errors"},
    "_entry": set(),
    "demo": set(),
    "bus": BASE | {"_bus"},
    "executor": BASE | {"bus", "child"},
    "driver": BASE | MODEL_FILES | {"executor", "demo"},
    "worker": BASE | MODEL_FILES | {"bus", "child", "_cuda"},
    "text": BASE | {"model_config"},
    "frontend": BASE | {"text", "outputs"},
    "outputs": set(),
    "engine": BASE | {"driver", "frontend", "outputs"},
    "async_engine": BASE | {"bus", "child", "demo", "frontend", "outputs", "text"},
    "server": BASE | {"async_engine", "bus", "outputs", "text", "demo"},
    "top": BASE | {"bus"},
    "__init__": BASE | {"engine", "async_engine", "outputs"},
}
EXCEPTIONS = {
    ("executor/inline.py", "worker"),  # runs the model in the driver's own process, for debugging
    ("driver/process.py", "bus"),  # the driver as a process of its own arms the same death watch as a worker
}
THIRD_PARTY: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "config": {"msgspec"},
    "protocol": {"msgspec"},
    "model_config": {"msgspec"},
    "checkpoint": {"msgspec"},
    "cache_size": set(),
    "child": set(),
    "_entry": set(),
    "demo": {"torch", "tokenizers", "safetensors", "numpy"},
    "bus": {"msgspec", "zmq", "numpy"},
    "executor": set(),
    "driver": {"msgspec", "zmq"},
    "worker": {"msgspec", "numpy", "torch", "safetensors"},
    "text": {"msgspec", "tokenizers", "jinja2", "transformers"},  # transformers: in a child process of its own
    "frontend": {"msgspec", "numpy"},
    "outputs": set(),
    "engine": {"tqdm"},
    "async_engine": {"msgspec", "zmq"},
    "server": {"msgspec", "starlette", "uvicorn", "h11", "tqdm"},
    "top": {"msgspec"},
    "__init__": set(),
}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing", "joblib"}
FORBIDDEN_CALLS = {("torch", "load"), ("numpy", "load"), ("np", "load"), ("torch", "save")}


def modules() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def layer_of(name: str) -> str:
    """`driver/step.py` and `zmqexec.driver.step` are both of layer driver."""
    first = name.removeprefix("zmqexec").lstrip(".").split("/")[0].split(".")[0] or "__init__"
    return "text" if first in TEXT else first


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "zmqexec":
                yield from (f"zmqexec.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


@pytest.mark.parametrize("path", modules(), ids=str)
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    layer = layer_of(str(path).removesuffix(".py"))
    for name in imports(path):
        if name.split(".")[0] == "zmqexec":
            other = layer_of(name)
            if other != layer and (str(path), other) not in EXCEPTIONS:
                assert other in LAYERS[layer], f"{path} ({layer}) imports {name}"
        elif name.split(".")[0] not in sys.stdlib_module_names | {"_typeshed"}:
            assert name.split(".")[0] in THIRD_PARTY[layer], f"{path} ({layer}) imports {name}"


def test_every_rule_is_about_something_that_exists() -> None:
    present = {layer_of(str(path).removesuffix(".py")) for path in modules()}
    assert present == set(LAYERS) == set(THIRD_PARTY)
    for path, other in EXCEPTIONS:
        assert any(layer_of(name) == other for name in imports(Path(path)) if name.startswith("zmqexec"))


@pytest.mark.parametrize("path", modules(), ids=str)
def test_nothing_that_can_execute_data_is_used(path: Path) -> None:
    tree = ast.parse((PACKAGE / path).read_text())
    assert not {name.split(".")[0] for name in imports(path)} & FORBIDDEN
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert not node.attr.endswith("_object_list"), f"{path}:{node.lineno}"
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            assert (owner, node.attr) not in FORBIDDEN_CALLS, f"{path}:{node.lineno}"
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("__import__", "import_module") and str(path) not in ("__init__.py", "_entry.py"):
                raise AssertionError(f"{path}:{node.lineno}: imports by name hide what is imported")
            assert name not in ("eval", "exec"), f"{path}:{node.lineno}"
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code":
                    assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False


def test_the_driver_serves_a_request_without_torch_or_transformers() -> None:
    program = (
        "import sys\n"
        "from zmqexec import Engine, SamplingParams\n"
        "with Engine() as engine:\n"
        "    print(engine.generate('12+30=', SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0].text)\n"
        "print(sorted(name for name in ('torch', 'transformers') if name in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    answer, loaded = done.stdout.splitlines()
    assert answer == "42"
    assert loaded == "[]"
