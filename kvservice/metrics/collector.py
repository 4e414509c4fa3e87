"""Reads the sources of all metrics when Prometheus asks, on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kvservice.counters import Durations
from kvservice.metrics.rows import PREFIX, Labels, Sources
from kvservice.metrics.table import METRICS

_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


class TableCollector(Collector):
    """Makes the metrics of the table from `sources`, which is called at each scrape: plain numbers only."""

    def __init__(self, sources: Callable[[], Sources]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        sources = self._sources()
        for metric in METRICS:
            family = _FAMILIES[metric.kind](PREFIX + metric.name, metric.meaning, labels=metric.labels)
            for labels, value in metric.read(sources).items():
                if isinstance(value, Durations):
                    _add_durations(family, labels, value)
                else:
                    family.add_metric(labels, value)
            yield family


def _add_durations(family: HistogramMetricFamily, labels: Labels, durations: Durations) -> None:
    names = [*map(floatToGoString, durations.bounds_s), "+Inf"]
    buckets = list(zip(names, accumulate(durations.counts()), strict=True))
    family.add_metric(labels, buckets, durations.sum_s)
