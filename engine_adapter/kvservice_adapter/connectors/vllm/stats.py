"""What the connector counts, in the form that vLLM collects, logs and exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvservice_adapter.breaker import Breaker, State
from kvservice_adapter.engine.metrics import BUCKETS_S, ENGINE_METRICS, EngineMetric

# Names in vLLM's log and, with the prefix `vllm:kvservice_`, in its Prometheus metrics.
METRICS: Mapping[str, EngineMetric] = {metric.name: metric for metric in ENGINE_METRICS}


@dataclass
class TransferStats(KVConnectorStats):
    """Values since they were last taken, by name, or by ``name:label``: a sum, or for a histogram a list."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def count(self, **more: float) -> None:
        for name, value in more.items():
            self.add(name, value)

    def add(self, name: str, value: float = 1.0, label: str = "") -> None:
        metric, key = METRICS[name], f"{name}:{label}" if label else name
        assert bool(label) == bool(metric.label)
        if metric.kind == "histogram":
            self.data.setdefault(key, []).append(value)
        else:
            self.data[key] = self.data.get(key, 0) + value

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for key, value in other.data.items():
            self.data[key] = self.data[key] + value if key in self.data else value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log: sums, and the means of histograms."""
        shown: dict[str, int | float] = {}
        for key, value in self.data.items():
            if isinstance(value, list):
                shown[f"KVService mean {key}"] = round(sum(value) / len(value), 4)
            else:
                shown[f"KVService {key}"] = value
        seconds = self.data.get("load_seconds", 0.0)
        if seconds:
            shown["KVService load GB/s"] = round(self.data.get("loaded_bytes", 0) / seconds / 1e9, 2)
        return shown

    def is_empty(self) -> bool:
        return not any(self.data.values())


class BreakerStats:
    """Counts the changes of one breaker. For one thread."""

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker
        self._openings = 0
        self._is_open = False

    def count_into(self, stats: TransferStats) -> None:
        """What has changed since the last call."""
        openings, is_open = self._breaker.times_opened, self._breaker.state is not State.CLOSED
        if openings != self._openings:
            stats.add("breaker_openings", openings - self._openings)
        if is_open != self._is_open:
            stats.add("open_breakers", 1 if is_open else -1)
        self._openings, self._is_open = openings, is_open


class PrometheusMetrics(KVConnectorPromMetrics):
    """One metric per name, with vLLM's labels."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        kinds = {"counter": metric_types[Counter], "gauge": metric_types[Gauge], "histogram": metric_types[Histogram]}
        options: Mapping[str, Mapping[str, Any]] = {
            "counter": {},
            "gauge": {"multiprocess_mode": "livesum"},
            "histogram": {"buckets": BUCKETS_S},
        }
        self._metrics: dict[str, Any] = {}
        for metric in ENGINE_METRICS:
            made = self._metrics[metric.name] = kinds[metric.kind](
                name=f"vllm:kvservice_{metric.name}",
                documentation=metric.meaning.replace("`", ""),
                labelnames=[*labelnames, metric.label] if metric.label else labelnames,
                **options[metric.kind],
            )
            if not metric.label:
                for values in per_engine_labelvalues.values():
                    made.labels(*values)  # So that it is 0, and not missing, before the first event.

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, value in transfer_stats_data.items():
            name, _, label = key.partition(":")
            if name not in self._metrics:
                continue
            values = self.per_engine_labelvalues[engine_idx]
            metric = self._metrics[name].labels(*values, label) if label else self._metrics[name].labels(*values)
            if isinstance(value, list):
                for each in value:
                    metric.observe(each)
            elif value:
                metric.inc(value)
