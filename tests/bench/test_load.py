"""The bench of loading: its checkpoint loads, it looks at the page cache, and its results have every promised field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from serving import page_cache
from serving.checkpoint_files import missing_space, write_checkpoint

from tests.bench.test_harness import run_script
from zmqexec.checkpoint import Checkpoint
from zmqexec.model_config import Sharding, load_model_config
from zmqexec.worker.models.weights import SafetensorsSource, load_weights

FIELDS = {
    "question",
    "date",
    "command",
    "machine",
    "versions",
    "geometry",
    "device",
    "dtype",
    "num_files",
    "file_bytes",
}
FIELDS |= {"write_s", "first_load_s", "target_ratio", "results", "not_measured"}


def test_a_written_checkpoint_is_one_that_loads(tmp_path: Path) -> None:
    write_checkpoint("tiny", tmp_path, most_file_bytes=1_000_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and all(file.stat().st_size < 1_000_000 + 10_000 for file in files)
    config = load_model_config(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check(config)
    assert {info.file for info in checkpoint.tensors.values()} == set(files)
    source = SafetensorsSource(tmp_path)
    weights = load_weights(config, Sharding(config, 0, 1), 0, 1, source, torch.bfloat16, lambda done, total: None)
    assert float(weights.lm_head.float().std()) == pytest.approx(0.02, rel=0.1)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_space("tiny", tmp_path) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4 * 10**9))
    said = missing_space("llama-2-7b", tmp_path)
    assert said is not None
    assert said.startswith("llama-2-7b needs 14.6 GB of disk and there are 4.0 GB free: free 10.6 GB, or choose")


def test_what_was_read_is_in_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    page_cache.drop([file])
    file.read_bytes()
    assert page_cache.held_share([file]) == 1.0


@pytest.mark.parametrize("is_given", [False, True])
def test_a_load_run_has_every_promised_field_and_no_place_of_this_machine(tmp_path: Path, is_given: bool) -> None:
    options = ["--geometry", "tiny", "--device", "cpu", "--repetitions", "2", "--label", "t", "--out", str(tmp_path)]
    if is_given:
        write_checkpoint("tiny", tmp_path / "given")
        options += ["--folder", str(tmp_path / "given")]
    printed = run_script("load.py", *options)
    text = (tmp_path / "load-t.json").read_text()
    result = json.loads(text)
    assert set(result) == FIELDS
    assert (result["geometry"], result["write_s"] is None) == ((None, True) if is_given else ("tiny", False))
    warm = result["results"][0]
    assert warm["page_cache"] == "warm" and len(warm["read_s"]["all"]) == len(warm["load_s"]["all"]) == 2
    assert warm["reaches_target"] == (warm["ratio"]["median"] >= 0.6)
    states = {row["page_cache"] for row in result["results"]} | {one["way"] for one in result["not_measured"]}
    assert states == {"warm", "cold"}
    assert "  warm: read" in printed
    assert str(tmp_path) not in text
