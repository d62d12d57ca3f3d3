"""Kernel modules in processes of their own: what they find before they fail is kept, and the script says so."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from serving import kernel_runs
from serving.children import run_child

BENCH = Path(__file__).parents[2] / "bench"


def test_what_a_module_finds_is_written_as_it_comes_and_a_failed_check_fails_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []

    def fake(arguments, timeout_s, on_result, **_):
        assert arguments == ["-m", "serving.kernel_module", "gemm"] and timeout_s == 7.0
        on_result({"kind": "check", "row": {"name": "small", "ok": True}})
        on_result({"kind": "check", "row": {"name": "wide", "ok": False}})
        on_result({"kind": "measure", "row": {"name": "small", "us": 1.5}})
        written.append(json.loads((tmp_path / "kernels-t.json").read_text())["kernels"][0])
        return "took longer than 7 s"

    monkeypatch.setattr(kernel_runs, "run_child", fake)
    monkeypatch.setattr(kernel_runs.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="1"):
        kernel_runs.run_script("kernels", "?", ["gemm"], argparse.Namespace(timeout_s=7.0, label="t", out=tmp_path))
    assert [row["name"] for row in written[0]["checks"]] == ["small", "wide"]
    result = json.loads((tmp_path / "kernels-t.json").read_text())
    assert {"question", "date", "command", "machine", "versions", "kernels"} == set(result)
    assert result["kernels"][0]["why"] == "took longer than 7 s"
    printed = capsys.readouterr().out
    for line in ("kernels gemm: 1 of 2 checks FAILED, 0 s", "  FAILED wide ok=False", "  small us=1.5"):
        assert line in printed


@pytest.mark.parametrize("script", ["kernels", "allreduce"])
def test_each_script_says_what_it_does(script: str) -> None:
    command = [sys.executable, str(BENCH / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"bench/results/{script}-LABEL.json" in done.stdout


def test_a_library_finds_its_own_package_before_a_script_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("owner = 'a library'")
    program = f"""if True:
        import sys
        from serving.children import emit, search_here_last
        sys.path.append({str(tmp_path)!r})
        search_here_last()
        import kernels
        emit({{"owner": kernels.owner}})
    """
    found: list[dict[str, str]] = []
    assert run_child(["-c", program], 60.0, found.append) is None
    assert found == [{"owner": "a library"}]
