"""Reads the sources of all metrics when Prometheus asks, on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kvservice.counters import Durations
from kvservice.metrics.rows import PREFIX, Sources
from kvservice.metrics.table import METRICS


class TableCollector(Collector):
    """Makes the metrics of the table from `sources`, which is called at each scrape: plain numbers only."""

    def __init__(self, sources: Callable[[], Sources]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        sources = self._sources()
        for metric in METRICS:
            make = _MAKERS[metric.kind]
            yield make(PREFIX + metric.name, metric.meaning, metric.labels, metric.read(sources))


def counter(name: str, text: str, labels: Sequence[str], samples: Mapping[Any, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in samples.items():
        family.add_metric(values, count)
    return family


def gauge(name: str, text: str, labels: Sequence[str], samples: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, value)
    return family


def histogram(name: str, text: str, labels: Sequence[str], samples: Mapping[Any, Durations]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, durations in samples.items():
        bounds = [*map(floatToGoString, durations.bounds_s), "+Inf"]
        buckets = zip(bounds, accumulate(durations.counts()), strict=True)
        family.add_metric(values, list(buckets), durations.sum_s)
    return family


_MAKERS: Mapping[str, Callable[[str, str, Sequence[str], Mapping[Any, Any]], Metric]] = {
    "counter": counter,
    "gauge": gauge,
    "histogram": histogram,
}
