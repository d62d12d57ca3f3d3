"""The CUDA kernels compiled by g++ over the emulator of csrc/cuda/emulator: the module `_cuda_emulated`.

Objects and the module are kept in build/emulator, each named by a digest of what it was made from.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc/cuda"
CACHE = ROOT / "build/emulator"
FLAGS = [
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-pthread", "-fvisibility=hidden", "-DZMQEXEC_EMULATED"),
    # A GPU contracts where nvcc says so, not where this CPU could; #pragma unroll is nvcc's.
    *("-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


class NoCompiler(Exception):
    pass


def compiler() -> str:
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise NoCompiler(f"the emulator needs a C++ compiler and found no '{name}'")
    return name


def load() -> ModuleType:
    """Import the module, built if need be.

    With ZMQEXEC_EMULATOR_SANITIZE=1 (tests/trust) the sanitized one, which needs libasan preloaded.
    """
    path = build(sanitize=os.environ.get("ZMQEXEC_EMULATOR_SANITIZE") == "1")
    if "_cuda_emulated" not in sys.modules:
        loader = importlib.machinery.ExtensionFileLoader("_cuda_emulated", str(path))
        spec = importlib.util.spec_from_file_location("_cuda_emulated", path, loader=loader)
        assert spec is not None
        sys.modules["_cuda_emulated"] = importlib.util.module_from_spec(spec)
        loader.exec_module(sys.modules["_cuda_emulated"])
    return sys.modules["_cuda_emulated"]


def build(*, sanitize: bool = False) -> Path:
    """The path of the module."""
    flags = FLAGS + (SANITIZERS if sanitize else [])
    includes = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    sources = [*sorted(CUDA.glob("*.cu")), CUDA / "module.cpp", *sorted((CUDA / "emulator").glob("*.c[up]*"))]
    headers = sorted(path for path in CUDA.rglob("*") if path.suffix in (".h", ".cuh"))
    common = _digest([*flags, *includes, compiler()], headers)
    CACHE.mkdir(parents=True, exist_ok=True)
    # Test processes run side by side: the first builds, the others wait for it here.
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def compiled(source: Path) -> Path:
            target = CACHE / f"{source.stem}-{_digest([common], [source])}.o"
            return _made(target, [compiler(), *flags, *includes, "-x", "c++", "-c", str(source)])

        with ThreadPoolExecutor(2) as pool:
            objects = [str(path) for path in pool.map(compiled, sources)]
        target = CACHE / f"_cuda_emulated-{_digest([common, *objects], [])}.so"
        return _made(target, [compiler(), *flags, "-shared", *objects])


def _made(target: Path, command: list[str]) -> Path:
    if not target.is_file():
        for outdated in target.parent.glob(f"{target.name.partition('-')[0]}-*{target.suffix}"):
            # Sanitized and plain ones take turns; what has lain for a day is nobody's.
            if target.parent.stat().st_mtime - outdated.stat().st_mtime > 86_400:
                outdated.unlink()
        unfinished = target.with_suffix(".tmp")
        done = subprocess.run([*command, "-o", str(unfinished)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
        unfinished.replace(target)
    return target


def _digest(texts: list[str], files: list[Path]) -> str:
    digest = hashlib.sha256("\0".join(texts).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
