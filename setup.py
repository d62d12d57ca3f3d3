"""Builds the C extension `zmqexec._bus`. Everything else about the package is in pyproject.toml."""

import hashlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PORTABLE = ("segment", "ring", "wait", "status", "checksum", "death_watch")
FOR_PYTHON = ("module", "segment_type", "segment_records", "segment_encode", "segment_status")
BUS_SOURCES = [f"csrc/bus/{name}.c" for name in (*PORTABLE, *FOR_PYTHON)]
BUS_HEADERS = [f"csrc/bus/{name}.h" for name in ("layout", "ring", "segment_type")]
INSTALL_HINT = "on Debian or Ubuntu: sudo apt-get install gcc python3-dev python3-venv"


def build_id(files: list[str]) -> str:
    """A digest of the sources, compiled in: two processes on one bus must have been built from the same files."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(Path(name).read_bytes())
    return digest.hexdigest()[:16]


class BuildExt(build_ext):
    """The normal build, preceded by one plain sentence when the machine cannot compile."""

    def run(self) -> None:
        compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
        if shutil.which(compiler) is None:
            sys.exit(f"zmqexec needs a C compiler and found no '{compiler}'; {INSTALL_HINT}")
        header_dirs = {sysconfig.get_path(name) for name in ("include", "platinclude")}
        if not any(Path(folder, "Python.h").is_file() for folder in header_dirs):
            sys.exit(f"zmqexec needs Python.h and found none in {', '.join(sorted(header_dirs))}; {INSTALL_HINT}")
        super().run()


bus_flags = ["-std=gnu11", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra"]
if os.environ.get("ZMQEXEC_WERROR") == "1":
    bus_flags.append("-Werror")

# Its memfd and futex are Linux's. Elsewhere the bus runs over ZeroMQ.
on_linux = sys.platform == "linux"

setup(
    ext_modules=[
        Extension(
            "zmqexec._bus",
            sources=BUS_SOURCES,
            depends=BUS_HEADERS,
            define_macros=[("ZMQEXEC_BUILD_ID", f'"{build_id(BUS_SOURCES + BUS_HEADERS)}"')],
            extra_compile_args=bus_flags,
        )
    ]
    if on_linux
    else [],
    cmdclass={"build_ext": BuildExt},
)
