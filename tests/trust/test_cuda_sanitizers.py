"""The kernel tests again over an emulator built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import cuda_emulator

ROOT = Path(__file__).parents[2]
KERNELS = [
    "skinny_gemm",
    "paged_attention",
    "attention_plan",
    "decode_state",
    "rope_write_kv",
    "rms_norm",
    "gather_embedding",
    "argmax",
    "silu_mul",
    "tiled_gemm",
    "paged_prefill",
]


def test_kernels_touch_no_memory_but_their_own():
    cuda_emulator.build(sanitize=True)
    libraries = [
        subprocess.run(
            [cuda_emulator.compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # The interpreter never frees all it has.
    env = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ZMQEXEC_EMULATOR_SANITIZE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-k", "not cuda", "-p", "no:cacheprovider"]
    # Two processes and not all files: the sampler and the all-reduce take longer than all others together.
    command += ["--numprocesses=2", "--dist=loadfile", *(f"tests/worker/kernels/test_{name}.py" for name in KERNELS)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
