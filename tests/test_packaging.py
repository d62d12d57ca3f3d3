"""The source distribution and the wheel: whole, buildable from each other, and plain about what a machine lacks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import zmqexec

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run("-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), cwd=ROOT)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(sdist)]
    run(*command, cwd=folder, env={"ZMQEXEC_NO_CUDA": "1"})
    return next(folder.glob("*.whl"))


def run(*arguments: str, cwd: Path, env: dict[str, str] | None = None, ok: bool = True) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ | (env or {})
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_source_distribution_holds_c_headers_demo_model_tests_and_ci(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    headers = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h")}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").rglob("*.c[up]*")}
    checkpoint = {str(path.relative_to(ROOT)) for path in (ROOT / "zmqexec/demo/checkpoint").iterdir()}
    assert headers and headers <= names
    assert kernels and kernels <= names
    assert checkpoint and checkpoint <= names
    assert {"LICENSE", "README.md", "tox.ini", ".ci/run", "tests/test_packaging.py", "csrc/bus/PROTOCOL.md"} <= names


def test_the_wheel_holds_the_extension_and_the_demo_model_and_runs(wheel: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.fullmatch(r"zmqexec/_bus\..*\.so", name) for name in names)
    assert "zmqexec/demo/checkpoint/model.safetensors" in names
    assert "zmqexec/py.typed" in names and "zmqexec/_bus.pyi" in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "bench/"))]
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import zmqexec; from zmqexec import Engine, SamplingParams\n"
        "with Engine() as engine:\n"
        "    out = engine.generate('12+30=', SamplingParams(temperature=0))[0]\n"
        "    print(zmqexec.__file__, out.outputs[0].text)\n"
    )
    assert run("-P", "-c", program, cwd=tmp_path).strip() == f"{tmp_path}/zmqexec/__init__.py 42"


def test_the_version_is_the_same_everywhere(wheel: Path) -> None:
    assert wheel.name.startswith(f"zmqexec-{zmqexec.__version__}-")


def test_a_missing_compiler_is_one_sentence_with_the_line_to_type(tmp_path: Path) -> None:
    said = run("setup.py", "build_ext", "-b", str(tmp_path), cwd=ROOT, env={"CC": "no-such-cc"}, ok=False)
    assert said.strip().splitlines()[-1] == (
        "zmqexec needs a C compiler and found no 'no-such-cc'; "
        "on Debian or Ubuntu: sudo apt-get install gcc python3-dev python3-venv"
    )


def test_a_missing_nvcc_is_one_sentence_only_where_cuda_is_required(tmp_path: Path) -> None:
    without = {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(tmp_path), "ZMQEXEC_REQUIRE_CUDA": "1"}
    program = (
        "import runpy, shutil, sys\n"
        "which = shutil.which\n"
        "shutil.which = lambda name, path=None: None if name == 'nvcc' else which(name, path=path)\n"
        f"sys.argv = ['setup.py', 'build_ext', '-b', {str(tmp_path)!r}]\n"
        "runpy.run_path('setup.py')\n"
    )
    said = run("-c", program, cwd=ROOT, env=without, ok=False)
    assert said.strip().splitlines()[-1] == "ZMQEXEC_REQUIRE_CUDA=1, but there is no nvcc in PATH or $CUDA_HOME/bin"
    run("-c", program, cwd=ROOT, env=without | {"ZMQEXEC_REQUIRE_CUDA": ""})
    assert not list(tmp_path.rglob("_cuda*"))


def test_missing_python_headers_are_one_sentence_with_the_line_to_type(tmp_path: Path) -> None:
    program = (
        "import runpy, sys, sysconfig\n"
        "sysconfig.get_path = lambda name: '/nowhere'\n"
        f"sys.argv = ['setup.py', 'build_ext', '-b', {str(tmp_path)!r}]\n"
        "runpy.run_path('setup.py')\n"
    )
    said = run("-c", program, cwd=ROOT, ok=False)
    assert said.strip().splitlines()[-1] == (
        "zmqexec needs Python.h and found none in /nowhere; "
        "on Debian or Ubuntu: sudo apt-get install gcc python3-dev python3-venv"
    )
