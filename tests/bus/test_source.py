"""The C sources keep their own rules, and a build knows which sources it is of."""

import re
from collections import Counter
from pathlib import Path

import pytest

from zmqexec import _bus
from zmqexec.bus import cores

SOURCES = Path(__file__).parents[2] / "csrc" / "bus"


def test_each_sync_label_stands_at_a_release_and_at_its_acquire():
    text = "\n".join(path.read_text() for path in sorted(SOURCES.glob("*.[ch]")))
    labels = Counter(re.findall(r"/\* SYNC: ([\w ]+) \*/", text))
    assert labels and set(labels.values()) == {2}, labels


def test_every_source_is_described_in_the_protocol():
    labels = set(re.findall(r"/\* SYNC: ([\w ]+) \*/", "\n".join(p.read_text() for p in SOURCES.glob("*.c"))))
    protocol = (SOURCES / "PROTOCOL.md").read_text()
    assert [label for label in labels if f"`{label}`" not in protocol] == []


def test_a_build_has_an_id():
    assert re.fullmatch(r"[0-9a-f]{16}", _bus.BUILD_ID)
    assert _bus.LAYOUT_VERSION == 2


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "100000000 100000"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_a_cpu_quota_limits_the_usable_cores(tmp_path, files, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    unlimited = cores.usable_cores(tmp_path / "no such folder")
    assert cores.usable_cores(tmp_path) == (unlimited if limit is None else limit)
