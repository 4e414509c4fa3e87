"""What the connector counts, in the form that vLLM collects, logs and exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

# Names in vLLM's log and, with the prefix `vllm:kvservice_` and the suffix `_total`, in its Prometheus metrics.
COUNTERS: Mapping[str, str] = {
    "lookups": "Requests that were looked up.",
    "hits": "Requests of which a prefix is stored.",
    "hit_tokens": "Tokens of those prefixes that vLLM did not have itself.",
    "computed_hits": "Requests of which a prefix is stored, and was computed because that is faster.",
    "late_lookups": "Lookups that the daemon did not answer in time: the request was computed.",
    "loads": "Loads that ended with their KV in vLLM's pages.",
    "failed_loads": "Loads that failed: their tokens were computed.",
    "loaded_bytes": "Bytes that were loaded.",
    "load_seconds": "Seconds that loads took.",
    "saved_blocks": "Blocks that were stored.",
    "already_stored_blocks": "Blocks that were to be stored, and were already.",
    "errors": "Errors in the connector itself, each of which is logged once.",
}


@dataclass
class TransferStats(KVConnectorStats):
    """Counts since they were last taken."""

    def reset(self) -> None:
        self.data: dict[str, float] = {}

    def count(self, **more: float) -> None:
        for name, value in more.items():
            assert name in COUNTERS
            self.data[name] = self.data.get(name, 0) + value

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log."""
        shown: dict[str, int | float] = {f"KVService {name}": value for name, value in self.data.items()}
        seconds = self.data.get("load_seconds", 0.0)
        if seconds:
            shown["KVService load GB/s"] = round(self.data.get("loaded_bytes", 0) / seconds / 1e9, 2)
        return shown

    def is_empty(self) -> bool:
        return not any(self.data.values())


class PrometheusMetrics(KVConnectorPromMetrics):
    """One counter per name, with vLLM's labels."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:kvservice_{name}", documentation=text, labelnames=labelnames)
            self._counters[name] = {
                engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if name in self._counters and value:
                self._counters[name][engine_idx].inc(value)
