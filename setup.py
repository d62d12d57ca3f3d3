"""Builds the extensions: `zmqexec._bus` in C, and `zmqexec._cuda` where there is nvcc. The rest is in pyproject.toml.

ZMQEXEC_NO_CUDA=1        leaves `_cuda` out
ZMQEXEC_REQUIRE_CUDA=1   a machine without nvcc is an error
ZMQEXEC_CUDA_ARCHS="90"  compiles for these GPUs alone, which is quicker; default: sm_80, sm_90, and PTX for newer ones
ZMQEXEC_WERROR=1         warnings are errors
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PORTABLE = ("segment", "ring", "wait", "status", "checksum", "death_watch")
FOR_PYTHON = ("module", "segment_type", "segment_records", "segment_encode", "segment_status")
BUS_SOURCES = [f"csrc/bus/{name}.c" for name in (*PORTABLE, *FOR_PYTHON)]
BUS_HEADERS = [f"csrc/bus/{name}.h" for name in ("layout", "ring", "segment_type")]
CUDA = Path("csrc/cuda")
CUDA_SOURCES = [*sorted(map(str, CUDA.glob("*.cu"))), str(CUDA / "module.cpp")]
CUDA_HEADERS = sorted(str(path) for path in CUDA.iterdir() if path.suffix in (".h", ".cuh"))
CUDA_ARCHS = "80 90"
HOPPER_ONLY = "_sm90a.cu"
"""How the names of sources end that use instructions which compute capability 9.0 has and none after it."""
INSTALL_HINT = "on Debian or Ubuntu: sudo apt-get install gcc python3-dev python3-venv"


def build_id(files: list[str]) -> str:
    """A digest of the sources, compiled in: two processes on one bus must have been built from the same files."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(Path(name).read_bytes())
    return digest.hexdigest()[:16]


def find_nvcc() -> str | None:
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if folder and (found := shutil.which("nvcc", path=f"{folder}/bin")):
            return found
    return shutil.which("nvcc")


def cuda_wanted() -> bool:
    if os.environ.get("ZMQEXEC_NO_CUDA") == "1":
        return False
    if find_nvcc() is not None:
        return True
    if os.environ.get("ZMQEXEC_REQUIRE_CUDA") == "1":
        sys.exit("ZMQEXEC_REQUIRE_CUDA=1, but there is no nvcc in PATH or $CUDA_HOME/bin")
    return False


def targets(source: str) -> list[str]:
    """nvcc's flags that say for which GPUs."""
    if source.endswith(HOPPER_ONLY):
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    chosen = os.environ.get("ZMQEXEC_CUDA_ARCHS", CUDA_ARCHS).replace(",", " ").split()
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    if "ZMQEXEC_CUDA_ARCHS" not in os.environ:
        flags.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
    return flags


def cuda_flags() -> list[str]:
    flags = [
        "-std=c++17",
        "-O3",
        "-Xfatbin=-compress-all",
        "--threads=2",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    ]
    if os.environ.get("ZMQEXEC_WERROR") == "1":
        flags += ["--Werror=all-warnings", "-Xcompiler=-Werror"]
    return flags


class BuildExt(build_ext):
    """The normal build, preceded by one plain sentence when the machine cannot compile; `_cuda` is nvcc's."""

    def run(self) -> None:
        compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
        if shutil.which(compiler) is None:
            sys.exit(f"zmqexec needs a C compiler and found no '{compiler}'; {INSTALL_HINT}")
        header_dirs = {sysconfig.get_path(name) for name in ("include", "platinclude")}
        if not any(Path(folder, "Python.h").is_file() for folder in header_dirs):
            sys.exit(f"zmqexec needs Python.h and found none in {', '.join(sorted(header_dirs))}; {INSTALL_HINT}")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "zmqexec._cuda":
            self.build_cuda(ext)
        else:
            super().build_extension(ext)

    def build_cuda(self, ext: Extension) -> None:
        """One object per source, each compiled again when it or any header is newer; then one link."""
        nvcc = find_nvcc()
        assert nvcc is not None
        # A change of the compiler or its flags is another folder.
        command = [nvcc, *cuda_flags(), *(f"-I{folder}" for folder in ext.include_dirs)]
        key = hashlib.sha256(
            "\0".join([*command, *targets(""), *targets(HOPPER_ONLY), *self.include_dirs]).encode()
        ).hexdigest()[:12]
        objects = Path(self.build_temp) / f"cuda-{key}"
        objects.mkdir(parents=True, exist_ok=True)
        newest_header = max(Path(name).stat().st_mtime for name in CUDA_HEADERS)
        build_id_flag = f'-DZMQEXEC_BUILD_ID="{build_id(ext.sources + CUDA_HEADERS)}"'
        includes = [f"-I{folder}" for folder in self.include_dirs]

        def compiled(source: str) -> Path:
            target = objects / f"{Path(source).name}.o"
            # The module holds the digest of all sources.
            is_module = source.endswith(".cpp")
            newest = max(Path(name).stat().st_mtime for name in (ext.sources if is_module else [source]))
            if self.force or not target.is_file() or target.stat().st_mtime <= max(newest, newest_header):
                unfinished = target.with_suffix(".tmp")
                extra = [*includes, build_id_flag] if is_module else []
                self.run_compiler([*command, *targets(source), *extra, "-c", source, "-o", str(unfinished)])
                unfinished.replace(target)
            return target

        # nvcc itself runs two threads.
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
            built = list(pool.map(compiled, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [nvcc, "-shared", "--cudart=static", "-Xlinker=--exclude-libs=ALL,--strip-all", *map(str, built)]
        self.run_compiler([*link, "-o", str(target)])

    def run_compiler(self, command: list[str]) -> None:
        print(" ".join(command), flush=True)
        if subprocess.run(command).returncode != 0:
            sys.exit(f"nvcc failed (its messages are above); ZMQEXEC_NO_CUDA=1 builds zmqexec without it: {command}")


bus_flags = ["-std=gnu11", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra"]
if os.environ.get("ZMQEXEC_WERROR") == "1":
    bus_flags.append("-Werror")

# Its memfd and futex are Linux's. Elsewhere the bus runs over ZeroMQ.
on_linux = sys.platform == "linux"

extensions = []
if on_linux:
    extensions.append(
        Extension(
            "zmqexec._bus",
            sources=BUS_SOURCES,
            depends=BUS_HEADERS,
            define_macros=[("ZMQEXEC_BUILD_ID", f'"{build_id(BUS_SOURCES + BUS_HEADERS)}"')],
            extra_compile_args=bus_flags,
        )
    )
if on_linux and cuda_wanted():
    extensions.append(Extension("zmqexec._cuda", sources=CUDA_SOURCES, depends=CUDA_HEADERS))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt})
