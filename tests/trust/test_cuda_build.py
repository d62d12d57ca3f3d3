"""The CUDA kernels, compiled as an installation compiles them: here, because that takes more than a minute."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.test_packaging import ROOT, run


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_kernels_are_built_once_and_imported_without_a_gpu(tmp_path: Path) -> None:
    env = {"ZMQEXEC_REQUIRE_CUDA": "1", "ZMQEXEC_CUDA_ARCHS": "90", "ZMQEXEC_WERROR": "1"}
    build = ["setup.py", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "objects")]
    assert "rms_norm.cu" in run(*build, cwd=ROOT, env=env)
    assert " -c " not in run(*build, cwd=ROOT, env=env)
    (module,) = (tmp_path / "lib/zmqexec").glob("_cuda.*.so")
    program = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('zmqexec._cuda', {str(module)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.rms_norm.__doc__.splitlines()[0])\n"
    )
    assert run("-c", program, cwd=tmp_path).startswith("rms_norm(out, residual, ")
