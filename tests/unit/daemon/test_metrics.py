"""The table of metrics: its names follow Prometheus' conventions, and it has every total."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

from kvservice.counters import TOTALS, Durations, DurationsBy
from kvservice.metrics.collector import histogram
from kvservice.metrics.heartbeat import Heartbeat
from kvservice.metrics.rows import Metric as Row
from kvservice.metrics.server import health
from kvservice.metrics.table import METRICS
from tests.clock import FakeClock

# As `promtool check metrics` has them.
NOT_BASE_UNITS = "ms us ns minutes hours days milliseconds microseconds nanoseconds kb mb gb kib mib gib kilobytes bits"
ABBREVIATIONS = "s sec secs b num cnt tot avg"


@pytest.mark.parametrize("row", METRICS, ids=lambda row: row.name)
def test_a_name_follows_the_conventions_of_prometheus(row: Row) -> None:
    words = row.name.split("_")

    assert re.fullmatch("[a-z][a-z0-9_]*", row.name)
    assert (words[-1] == "total") == (row.kind == "counter")
    assert words[-1] not in ("count", "sum", "bucket"), "they are the series of a histogram"
    assert not {"counter", "gauge", "histogram", *NOT_BASE_UNITS.split(), *ABBREVIATIONS.split()} & set(words)
    assert row.kind != "histogram" or words[-1] == "seconds"
    assert (words[-1] == "info") == (row.name in ("build_info", "layout_info", "policy_info"))
    assert all(
        re.fullmatch("[a-z][a-z_]*", label) and label not in ("le", "quantile", "job", "instance")
        for label in row.labels
    )
    assert not {"dram", "ssd"} & set(words), "a tier is a label"
    assert row.meaning.endswith(".") and row.use.endswith(".")


def test_each_metric_has_a_name_and_a_meaning_of_its_own() -> None:
    assert max(Counter(row.name for row in METRICS).values()) == 1
    assert max(Counter(row.meaning for row in METRICS).values()) <= 3, "only 'the same in bytes' may be said again"


def test_every_total_of_status_is_a_metric_once() -> None:
    named = [total for row in METRICS for total in row.totals]

    assert sorted(named) == sorted(TOTALS)


def test_a_histogram_counts_each_duration_in_the_buckets_from_its_own_on() -> None:
    durations = Durations((0.001, 0.01, 1.0))
    for seconds in (0.0, 0.001, 0.0011, 0.5, 30.0):
        durations.observe(seconds)

    class Sample(Collector):
        def collect(self) -> list[Metric]:
            return [histogram("test_seconds", "Test.", ("path",), {("stream",): durations})]

    registry = CollectorRegistry()
    registry.register(Sample())
    buckets = {"0.001": 2, "0.01": 3, "1.0": 4, "+Inf": 5}
    for bound, count in buckets.items():
        assert registry.get_sample_value("test_seconds_bucket", {"path": "stream", "le": bound}) == count
    assert registry.get_sample_value("test_seconds_count", {"path": "stream"}) == 5
    assert registry.get_sample_value("test_seconds_sum", {"path": "stream"}) == pytest.approx(30.5021)
    assert b"_created" not in generate_latest(registry)


def test_durations_have_a_histogram_for_each_of_their_labels() -> None:
    times = DurationsBy()
    times["load", "dram"].observe(1.0)
    times["load", "dram"].observe(1.0)
    times["load", "ssd"].observe(1.0)

    assert {labels: sum(durations.counts()) for labels, durations in times.items()} == {
        ("load", "dram"): 2,
        ("load", "ssd"): 1,
    }


def test_health_is_bad_before_the_first_beat_and_when_beats_stop() -> None:
    clock = FakeClock()
    heartbeat = Heartbeat(clock)
    assert health(heartbeat, "serving") == (False, "starting")
    heartbeat.beat()
    assert health(heartbeat, "draining") == (True, "draining")
    clock.advance(seconds=11)
    assert health(heartbeat, "serving") == (False, "the event loop has not run for 11 s")
