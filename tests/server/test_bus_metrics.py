"""The bus on /metrics: valid in Prometheus' format, exact where counted, and free for the driver."""

import re
import time

import pytest

from tests.procs import roles
from tests.server.real_server import RealServer
from zmqexec import _bus
from zmqexec.bus.channel import DriverChannel, WorkerChannel
from zmqexec.bus.statistics import Snapshot
from zmqexec.bus.status import Phase
from zmqexec.protocol import CacheReady, InitCache

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABELS = rf'\{{({NAME}="[^"\\]*"(?:,{NAME}="[^"\\]*")*)\}}'


def parse(page):
    """{(sample name, labels): value}, having checked what a scraper may rely on."""
    values, declared, family = {}, {}, ""
    assert page.endswith("\n")
    for line in page.splitlines():
        if line.startswith("# HELP "):
            family = line.split(" ")[2]
            assert family not in declared, f"{family} comes twice"
            assert len(line.split(" ", 3)[3]) > 5
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == family and kind in ("counter", "gauge", "histogram")
            declared[family] = kind
        else:
            name, labels, value = re.fullmatch(rf"({NAME})(?:{LABELS})? (\S+)", line).groups()
            own = (
                {family} if declared[family] != "histogram" else {f"{family}{s}" for s in ("_bucket", "_sum", "_count")}
            )
            assert name in own, f"{name} stands under {family}"
            assert (name, labels) not in values, f"{line} comes twice"
            assert declared[family] != "counter" or name.endswith("_total")
            values[name, labels] = float(value)
    check_histograms(values, [name for name, kind in declared.items() if kind == "histogram"])
    return values


def check_histograms(values, names):
    for name in names:
        series = {}
        for (sample, labels), value in values.items():
            if sample == f"{name}_bucket":
                rest, bound = re.fullmatch(r'(.*?),?le="([^"]+)"', labels).groups()
                series.setdefault(rest or None, []).append((float(bound), value))
        assert series
        for labels, buckets in series.items():
            assert buckets == sorted(buckets) and len({bound for bound, _ in buckets}) == len(buckets)
            assert [count for _, count in buckets] == sorted(count for _, count in buckets)
            assert buckets[-1] == (float("inf"), values[f"{name}_count", labels])
            assert values[f"{name}_sum", labels] >= 0


@pytest.fixture
def bus():
    """A driver, two workers and an observer in this process."""
    with DriverChannel.create(2, epoch=7, ring_bytes=1 << 16) as driver:
        workers = [WorkerChannel.attach(driver.fd, rank) for rank in range(2)]
        segment = _bus.Segment.observe(driver.fd)
        yield driver, workers, segment
        for end in (segment, *workers):
            end.close()


def test_every_count_of_every_rank_is_on_the_page(own_server, bus):
    driver, workers, segment = bus
    for _ in range(3):
        driver.publish(InitCache(7, 1), 5.0)
        for worker in workers:
            worker.receive(5.0)
    workers[0].reply(CacheReady(7), 5.0)
    time.sleep(0.002)  # so that the reply is slower than the pick-ups
    driver.receive(5.0)
    driver.publish(InitCache(7, 1), 5.0)
    workers[1].set_status(Phase.DECODE, 4)
    snapshot = own_server.engine.bus = Snapshot.of(segment)
    values = parse(own_server.http.get("/metrics").text)

    def value(name, labels=None):
        return values[f"zmqexec_{name}", labels]

    assert value("bus_published_records_total") == 4
    assert value("bus_published_bytes_total") == snapshot.driver.published_bytes
    for rank, replied in ((0, 1), (1, 0)):
        assert value("bus_received_records_total", f'rank="{rank}"') == 3
        assert value("bus_reply_records_total", f'rank="{rank}"') == replied
        assert value("bus_ring_unread_slots", f'ring="broadcast",rank="{rank}"') == 1
        assert value("bus_pickup_seconds_count", f'rank="{rank}"') == 3
        assert value("bus_reply_seconds_count", f'rank="{rank}"') == replied
    assert value("bus_ring_slots", 'ring="broadcast"') == snapshot.num_slots == 256
    assert value("bus_reply_seconds_sum", 'rank="0"') >= 0.002
    phases = {labels: on for (name, labels), on in values.items() if name == "zmqexec_worker_phase"}
    assert [labels for labels, on in phases.items() if on] == ['rank="0",phase="STARTING"', 'rank="1",phase="DECODE"']
    assert len(phases) == 2 * len(Phase)
    for name in ("bus_blocked_seconds_total", "bus_checksum_failures_total"):
        assert [value(name, f'process="{who}"') for who in ("driver", "worker 0", "worker 1")] == [0, 0, 0]
    waits = sum(count for (name, _), count in values.items() if name == "zmqexec_bus_waits_total")
    everyone = [snapshot.driver.waits, *(rank.counts.waits for rank in snapshot.ranks)]
    assert waits == sum(one.spun + one.parked for one in everyone)


def test_the_bounds_of_the_histograms_are_ends_of_the_buses_own_buckets(own_server, bus):
    driver, workers, segment = bus
    for wait_s in (0.0, 0.001, 0.02):
        driver.publish(InitCache(7, 1), 5.0)
        time.sleep(wait_s)
        for worker in workers:
            worker.receive(5.0)
    snapshot = own_server.engine.bus = Snapshot.of(segment)
    values = parse(own_server.http.get("/metrics").text)
    for rank, own in enumerate(snapshot.ranks):
        below = {bound: count for bound, count in own.counts.pickup.by_octave() if bound >= 1024}
        assert len(below) == 24
        for bound, count in below.items():
            assert values["zmqexec_bus_pickup_seconds_bucket", f'rank="{rank}",le="{bound / 1e9}"'] == count
        assert set(below.values()) >= {2, 3}


def test_without_a_bus_to_be_seen_the_rest_is_there(server):
    values = parse(server.http.get("/metrics").text)
    assert ("zmqexec_stale_replies_total", None) in values and ("zmqexec_wrong_epoch_replies_total", None) in values
    assert not [name for name, _ in values if "_bus_" in name]


def test_a_real_server_shows_its_bus_and_a_scrape_costs_the_driver_nothing():
    server = RealServer("--name", "scraped")
    try:
        server.wait_ready()
        first = parse(server.http.get("/metrics").text)
        body = {"prompt": "12+30=", "max_tokens": 20, "ignore_eos": True}
        assert server.http.post("/v1/completions", json=body).status_code == 200
        second = parse(server.http.get("/metrics").text)
        assert set(first) == set(second)
        for key, value in first.items():
            if key[0].endswith(("_total", "_bucket", "_count", "_sum")):
                assert second[key] >= value, f"{key} went back"

        def grown(name, labels=None):
            return second[f"zmqexec_{name}", labels] - first[f"zmqexec_{name}", labels]

        steps = grown("steps_total")
        assert steps >= 20 and grown("bus_published_records_total") == steps
        for rank in (0, 1):
            assert grown("bus_received_records_total", f'rank="{rank}"') == steps
            assert grown("bus_pickup_seconds_count", f'rank="{rank}"') == steps
        assert grown("bus_reply_seconds_count", 'rank="0"') == steps
        assert second["zmqexec_worker_phase", 'rank="0",phase="IDLE"'] == 1

        driver = roles(server.process)["driver"]
        mapped = sum("zmqexec-bus" in one.path for one in server.process.memory_maps(grouped=False))
        before = driver.num_ctx_switches()
        for _ in range(10):
            parse(server.http.get("/metrics").text)
        assert driver.num_ctx_switches() == before
        assert mapped == sum("zmqexec-bus" in one.path for one in server.process.memory_maps(grouped=False)) > 0
    finally:
        server.close()
