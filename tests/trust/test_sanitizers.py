"""The bus under the sanitizers and on another architecture; and each of these checks, finding a defect made for it.

Debian: gcc libc6-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static. None of it is optional.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.trust.builds import BUS, PORTABLE, ROOT, STRESS, change, compile_c, orders_of, relax

# gcc warns that its thread sanitizer does not model fences. Ours order nothing but atomics: csrc/bus/fuzz/README.md.
THREAD = ("-O1", "-fsanitize=thread", "-Wno-tsan")
ADDRESS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
MESSAGES = 30_000
SEED = 1
AARCH64 = "aarch64-linux-gnu-gcc"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sanitizers")


@pytest.fixture(scope="module")
def tsan(folder: Path) -> Path:
    return compile_c(folder / "tsan", STRESS + PORTABLE, *THREAD)


@pytest.fixture(scope="module")
def asan(folder: Path) -> Path:
    return compile_c(folder / "asan", STRESS + PORTABLE, *ADDRESS)


@pytest.fixture(scope="module")
def aarch64(folder: Path) -> Path:
    return compile_c(folder / "aarch64", STRESS + PORTABLE, "-O2", "-static", compiler=AARCH64)


def stress(program: Path, *arguments: object, runner: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    command = [*runner, str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=290, env=env)


def assert_went_through_everything(done: subprocess.CompletedProcess[str]) -> None:
    """It ended well, and not because nothing happened."""
    assert done.returncode == 0 and not done.stderr, done.stderr
    counts = {name: int(count) for name, count in re.findall(r"(\w+) (\d+)", done.stdout)}
    assert all(counts[name] > 0 for name in ("messages", "replies", "wrapped", "pads", "blocked", "parked", "spun"))


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_threads_have_no_data_race(tsan: Path, readers: int) -> None:
    assert_went_through_everything(stress(tsan, "threads", readers, MESSAGES, SEED))


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_processes_touch_nothing_that_is_not_theirs(asan: Path, readers: int) -> None:
    assert_went_through_everything(stress(asan, "processes", readers, MESSAGES, SEED))


@pytest.mark.parametrize(("label", "line"), orders_of("ring.c"))
def test_each_order_of_the_ring_is_missed_when_it_is_relaxed(tmp_path: Path, label: str, line: int) -> None:
    program = compile_c(tmp_path / "tsan", STRESS + PORTABLE, *THREAD, changed=relax(tmp_path, "ring.c", line))
    done = stress(program, "threads", 2, MESSAGES, SEED)
    assert done.returncode == 66 and "ThreadSanitizer: data race" in done.stderr


def test_a_record_published_before_it_is_written_is_found(tmp_path: Path) -> None:
    publish = "    atomic_store_explicit(&ring->tail->slots, writer->position, memory_order_release);\n"
    early = publish.replace("writer->position", "draft->position + slots_of(ring, length)")
    copy = "    memcpy(at(ring, draft->position), &record, sizeof record);\n"
    changed = change(tmp_path, "ring.c", publish, "")
    changed.write_text(changed.read_text().replace(copy, early + copy))
    program = compile_c(tmp_path / "tsan", STRESS + PORTABLE, *THREAD, changed=changed)
    done = stress(program, "threads", 2, MESSAGES, SEED)
    # Whoever reads the header before it is there finds that out by itself; a moment later it is a race.
    found = {66: "ThreadSanitizer: data race", 1: "is numbered"}
    assert done.returncode in found and found[done.returncode] in done.stderr


@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_a_payload_read_beyond_its_end_is_found(asan: Path, mode: str) -> None:
    done = stress(asan, mode, 2, MESSAGES, SEED, "overrun")
    assert done.returncode == 1 and "AddressSanitizer: heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("mode", ["threads", "forks", "processes"])
def test_a_byte_that_changes_after_it_was_published_is_found(asan: Path, mode: str) -> None:
    done = stress(asan, mode, 2, MESSAGES, SEED, "torn")
    assert done.returncode == 1 and "does not have the checksum it was written with" in done.stderr


# ── the Python extension ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tree(folder: Path) -> Path:
    """A copy of the package and of its tests, without the extension."""
    for name in ("zmqexec", "tests", "csrc"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder / "tree")
    return folder / "tree"


def build_extension(tree: Path, changed: Path | None = None) -> None:
    """Under the address sanitizer, with the compiler that the tests above use."""
    names = ("death_watch", "module", "segment_type", "segment_records", "segment_encode", "segment_status")
    sources = PORTABLE + tuple(BUS / f"{name}.c" for name in names)
    folders = {sysconfig.get_path(name) for name in ("include", "platinclude")}
    include = [flag for folder in folders for flag in ("-isystem", folder)]
    output = tree / "zmqexec" / f"_bus{sysconfig.get_config_var('EXT_SUFFIX')}"
    compile_c(output, sources, *ADDRESS, "-shared", "-fPIC", "-fvisibility=hidden", *include, changed=changed)


def run_python(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the sanitizers in it, and the package of `tree`. The interpreter itself is not checked for leaks."""
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    env = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(tree),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=280)


def test_the_extension_passes_its_tests_under_the_address_sanitizer(tree: Path) -> None:
    build_extension(tree)
    where = run_python(tree, "-c", "from zmqexec import _bus; print(_bus.__file__)")
    assert where.stdout.startswith(str(tree)), where.stderr
    files = [f"tests/bus/test_{name}.py" for name in ("ring", "segment", "bells", "status", "fuzz")]
    done = run_python(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_the_address_sanitizer_sees_into_the_extension(tree: Path) -> None:
    build_extension(tree, change(tree, "status.c", "length < sizeof words ? length : sizeof words", "length"))
    done = run_python(
        tree,
        "-c",
        "from zmqexec.bus.channel import DriverChannel, WorkerChannel\n"
        "driver = DriverChannel.create(1, epoch=0)\n"
        "WorkerChannel.attach(driver.fd, 0).set_error('x' * 300)\n",
    )
    assert done.returncode != 0 and "AddressSanitizer: stack-buffer-overflow" in done.stderr


# ── another architecture ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["threads", "forks"])
def test_the_bus_works_on_aarch64(aarch64: Path, mode: str) -> None:
    """Emulated on x86, which does not reorder: what is tested is everything but the orders."""
    assert_went_through_everything(stress(aarch64, mode, 2, MESSAGES // 3, SEED, runner=("qemu-aarch64-static",)))


def instructions_of(source: Path, object_file: Path) -> dict[str, list[str]]:
    """Function → its instructions on aarch64, in order."""
    compile_c(object_file, [source], "-c", "-O2", "-fno-inline", compiler=AARCH64)
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(object_file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    functions = re.split(r"^[0-9a-f]+ <(\w+)[.\w]*>:$", text, flags=re.MULTILINE)[1:]
    return {
        name: [" ".join(line.split("\t")[1:]) for line in body.splitlines() if "\t" in line]
        for name, body in zip(functions[::2], functions[1::2], strict=True)
    }


ORDERS = [
    ("ring.c", "bus_publish", "stlr "),
    ("ring.c", "peek_header", "ldar "),
    ("ring.c", "bus_release", "stlr "),
    ("ring.c", "see_heads", "ldar "),
    ("wait.c", "bus_ring_bell", "dmb ish"),
    ("wait.c", "park", "dmb ish"),
    ("wait.c", "park", "ldar "),
    ("status.c", "bus_set_error", "stlr "),
    ("status.c", "bus_get_error", "ldar "),
    ("checksum.c", "by_table", "ldarb "),
    ("checksum.c", "by_table", "stlrb "),
]


@pytest.mark.parametrize(("source", "function", "instruction"), ORDERS)
def test_each_order_is_an_instruction_of_its_own_on_aarch64(
    tmp_path: Path, source: str, function: str, instruction: str
) -> None:
    """There, unlike on x86, a relaxed access is another instruction; so what the source says is what is executed."""

    def count(path: Path) -> int:
        code = instructions_of(path, tmp_path / "object.o")[function]
        return sum(one.startswith(instruction) for one in code)

    assert count(BUS / source) == 1
    relaxed = [count(relax(tmp_path, source, line)) for _, line in orders_of(source)]
    assert sorted(set(relaxed)) == [0, 1]  # it is there because of one of the labelled lines


def test_a_ringer_looks_for_waiters_after_its_fence(tmp_path: Path) -> None:
    code = instructions_of(BUS / "wait.c", tmp_path / "object.o")["bus_ring_bell"]
    fence = code.index("dmb ish")
    assert not [one for one in code[:fence] if one.startswith("ldr")]
    assert [one for one in code[fence:] if one.startswith("ldr")]
