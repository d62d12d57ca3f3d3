"""Figures decoded from the status pages: exact where counted, within a bucket's width where bucketed."""

import math
import os
import random
import time

import pytest

from zmqexec import _bus
from zmqexec.bus.channel import DriverChannel, WorkerChannel
from zmqexec.bus.statistics import BUCKET_FIRST_OCTAVE, Histogram, Snapshot, bucket_begin_ns
from zmqexec.bus.status import Phase
from zmqexec.protocol import CacheReady, EngineStats, InitCache


def test_the_buckets_begin_where_those_of_the_extension_do():
    assert BUCKET_FIRST_OCTAVE == _bus.BUCKET_FIRST_OCTAVE


def observe(stack, driver):
    segment = _bus.Segment.observe(driver.fd)
    stack.callback(segment.close)
    return segment


def bucket_of(duration_ns):
    """What csrc/bus/status.c says, by search."""
    later = [bucket for bucket in range(_bus.NUM_BUCKETS) if bucket_begin_ns(bucket) > duration_ns]
    return max(0, later[0] - 1) if later else _bus.NUM_BUCKETS - 1


def histogram(durations_ns):
    counts = [0] * _bus.NUM_BUCKETS
    for duration_ns in durations_ns:
        counts[bucket_of(duration_ns)] += 1
    return Histogram(sum(durations_ns), tuple(counts))


def round_trip(driver, workers):
    driver.publish(InitCache(7, 1), 5.0)
    for worker in workers:
        assert worker.receive(5.0) == InitCache(7, 1)
        worker.reply(CacheReady(7), 5.0)
        assert driver.receive(5.0) == (worker.rank, CacheReady(7))


def test_buckets_are_four_to_an_octave_and_powers_of_two_begin_one():
    begins = [bucket_begin_ns(bucket) for bucket in range(_bus.NUM_BUCKETS)]
    assert begins[:9] == [256, 320, 384, 448, 512, 640, 768, 896, 1024]
    assert begins == sorted(set(begins)) and begins[-1] == 7 << 31


@pytest.mark.parametrize("q", [0.0, 0.01, 0.5, 0.9, 0.99, 1.0])
def test_a_quantile_is_within_a_buckets_width_of_the_true_one(q):
    chance = random.Random(q)
    durations = sorted(int(10 ** chance.uniform(2.5, 9.5)) for _ in range(999))
    true_ns = durations[max(0, math.ceil(q * len(durations)) - 1)]
    begin = bucket_begin_ns(bucket_of(true_ns)) if bucket_of(true_ns) else 0
    end = bucket_begin_ns(bucket_of(true_ns) + 1)
    assert begin <= histogram(durations).quantile(q) * 1e9 <= end


def test_quantiles_of_nothing_and_of_what_is_longer_than_the_last_bucket():
    assert histogram([]).quantile(0.5) is None and histogram([]).count == 0
    assert histogram([10**12]).quantile(0.5) == pytest.approx((7 << 31) / 1e9)
    assert 0 <= histogram([5]).quantile(0.5) <= 320e-9
    with pytest.raises(ValueError, match=r"q=1\.5"):
        histogram([1]).quantile(1.5)


def test_counts_below_powers_of_two_are_exact():
    durations = [0, 255, 256, 511, 512, 1023, 1024, 1025, 10**6, 2**33 - 1, 2**33, 10**11]
    by_octave = histogram(durations).by_octave()
    assert [bound for bound, _ in by_octave] == [1 << n for n in range(9, 34)]
    for bound, count in by_octave:
        assert count == sum(duration < bound for duration in durations)


def test_the_c_code_counts_into_the_bucket_that_the_bounds_say(stack, make_bus):
    driver, (worker,) = make_bus()
    segment = observe(stack, driver)
    for wait_s in (0.0, 0.0003, 0.005):
        before = Snapshot.of(segment).ranks[0].counts.pickup
        begin = time.monotonic_ns()
        driver.publish(InitCache(7, 1), 5.0)
        published = time.monotonic_ns()
        while time.monotonic_ns() < published + wait_s * 1e9:
            pass
        looked = time.monotonic_ns()
        worker.receive(0.0)
        end = time.monotonic_ns()
        one = Snapshot.of(segment).ranks[0].counts.pickup - before
        assert one.count == 1 and looked - published <= one.sum_ns <= end - begin
        assert one.counts[bucket_of(one.sum_ns)] == 1


def test_a_snapshot_says_what_was_sent_received_and_replied(stack, make_bus):
    driver, workers = make_bus(2, name="ours", wait_policy="eco")
    segment = observe(stack, driver)
    first = Snapshot.of(segment)
    for _ in range(3):
        round_trip(driver, workers)
    workers[1].set_status(Phase.DECODE, 5)
    workers[1].set_error("oops")
    driver.publish(InitCache(7, 1), 5.0)
    last = Snapshot.of(segment)
    assert (last.name, last.driver_pid, last.wait_policy) == ("ours", os.getpid(), "eco")
    assert last.created_ns <= last.ranks[0].attached_ns <= first.time_ns < last.time_ns
    driver_counts = last.driver - first.driver
    assert driver_counts.published == 4 and driver_counts.published_bytes > 4
    for rank in last.ranks:
        assert (rank.counts.received, rank.counts.replied) == (3, 3)
        assert rank.counts.pickup.count == rank.counts.reply.count == 3
        assert 0 < rank.counts.pickup.sum_ns < rank.counts.reply.sum_ns
        assert rank.unread_slots == 1 and rank.unread_reply_slots == 0
    status = last.ranks[1].status
    assert (status.pid, status.phase, status.step_id, status.error) == (os.getpid(), Phase.DECODE, 5, "oops")


def test_a_difference_is_what_happened_in_between(stack, make_bus):
    driver, (worker,) = make_bus()
    segment = observe(stack, driver)
    for _ in range(5):
        round_trip(driver, [worker])
    before = Snapshot.of(segment)
    for _ in range(7):
        round_trip(driver, [worker])
    after = Snapshot.of(segment)
    between = after.ranks[0].counts - before.ranks[0].counts
    assert (between.received, between.replied, between.pickup.count, between.reply.count) == (7, 7, 7, 7)
    assert between.pickup.sum_ns == after.ranks[0].counts.pickup.sum_ns - before.ranks[0].counts.pickup.sum_ns
    nothing = after.ranks[0].counts - after.ranks[0].counts
    assert nothing.waits.spun_share is None and nothing.pickup.quantile(0.5) is None
    assert after.seconds_since(before) > 0


def test_gauges_are_the_engines_figures_by_name(stack, make_bus):
    driver, _ = make_bus()
    segment = observe(stack, driver)
    assert Snapshot.of(segment).engine == EngineStats() and Snapshot.of(segment).engine_ns == 0
    # A different value for each field: none may end up under another's name.
    stats = EngineStats(**{name: 2**40 + n for n, name in enumerate(EngineStats.__struct_fields__)})
    driver.set_gauges(stats)
    shown = Snapshot.of(segment)
    assert shown.engine == stats and 0 < shown.engine_ns <= shown.time_ns


@pytest.mark.parametrize("name", ["", "ü" * 60, "a" + "€" * 40, "x" * 500, "\udcff surrogate"])
def test_a_name_of_any_length_is_cut_at_a_character(stack, name):
    driver = stack.enter_context(DriverChannel.create(1, epoch=0, name=name))
    shown = Snapshot.of(observe(stack, driver)).name
    whole = name.encode(errors="replace").decode()
    assert whole.startswith(shown) and len(shown.encode()) >= min(len(whole.encode()), 60)


def test_a_checksum_failure_is_counted_by_whoever_read_it(stack):
    """The observer's file descriptor stands in for a faulty machine: it changes one byte of the payload."""
    driver = stack.enter_context(DriverChannel.create(1, epoch=7, has_checksums=True))
    worker = stack.enter_context(WorkerChannel.attach(driver.fd, 0))
    segment = observe(stack, driver)
    driver.publish(InitCache(7, 0x12345678), 5.0)
    size = os.fstat(driver.fd).st_size
    at = os.pread(driver.fd, size, 0).index(b"\x12\x34\x56\x78")
    os.pwrite(driver.fd, b"\x13", at)
    with pytest.raises(Exception, match="checksum"):
        worker.receive(1.0)
    snapshot = Snapshot.of(segment)
    assert snapshot.ranks[0].counts.checksum_failures == 1 and snapshot.driver.checksum_failures == 0
