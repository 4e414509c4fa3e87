"""What Prometheus sees: the counters, the tiers' fill, and how punctual the event loop is."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from kvservice.blocks import TierName
from kvservice.config import Address
from kvservice.counters import HELP
from kvservice.store.block_store import BlockStore

_HEARTBEAT_S = 0.005
_WINDOW_S = 3.0
_PREFIX = "kvservice_"


class Heartbeat:
    """Measures how late the event loop is: a beat every 5 ms, and by how much each one came too late."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.latest_ms = 0.0  # The worst since the start.
        self._recent_ms = [0.0, 0.0]  # The worst of the last whole window, and of the one that runs.
        self._window_ends_s = 0.0
        self._histogram = Histogram(
            _PREFIX + "event_loop_delay_seconds",
            "How much later than due a heartbeat of the event loop came.",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0),
            registry=registry,
        )

    async def run(self) -> None:
        while True:
            due = time.monotonic() + _HEARTBEAT_S
            await asyncio.sleep(_HEARTBEAT_S)
            late_s = max(0.0, time.monotonic() - due)
            self._histogram.observe(late_s)
            self.latest_ms = max(self.latest_ms, late_s * 1000)
            if due >= self._window_ends_s:
                self._recent_ms = [self._recent_ms[1], 0.0]
                self._window_ends_s = due + _WINDOW_S
            self._recent_ms[1] = max(self._recent_ms[1], late_s * 1000)

    @property
    def recent_ms(self) -> float:
        """The worst of the last few seconds."""
        return max(self._recent_ms)


class StoreCollector(Collector):
    """Reads the store when Prometheus asks, from another thread: plain numbers only."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        store = self._store
        for name, value in store.counters.as_dict().items():
            yield CounterMetricFamily(_PREFIX + name, HELP[name], value=value)
        capacity = GaugeMetricFamily(_PREFIX + "tier_capacity_bytes", "What extents may take.", labels=["tier"])
        used = GaugeMetricFamily(_PREFIX + "tier_used_bytes", "What extents take.", labels=["tier"])
        refusing = GaugeMetricFamily(_PREFIX + "tier_refusing", "1 while a tier takes no blocks.", labels=["tier"])
        index_used = GaugeMetricFamily(_PREFIX + "index_used_bytes", "Pages in use in a tier's index.", labels=["tier"])
        index_map = GaugeMetricFamily(_PREFIX + "index_map_bytes", "Size of a tier's index.", labels=["tier"])
        for tier, space in store.residency.tiers.items():
            capacity.add_metric([tier], space.capacity_bytes)
            used.add_metric([tier], space.used_bytes)
            refusing.add_metric([tier], 1 if space.refusing_because else 0)
        for tier in TierName:
            index_used.add_metric([tier], store.index.used_bytes(tier))
            index_map.add_metric([tier], store.index.map_bytes(tier))
        yield from (capacity, used, refusing, index_used, index_map)
        yield GaugeMetricFamily(_PREFIX + "blocks", "Stored objects.", value=store.blocks.live_count)
        yield GaugeMetricFamily(_PREFIX + "clients", "Attached clients.", value=store.leases.client_count)
        yield GaugeMetricFamily(_PREFIX + "leases", "Leases that run.", value=store.leases.count)
        yield GaugeMetricFamily(_PREFIX + "uploads", "Blocks being uploaded.", value=len(store.ingests.uploads))


class MetricsServer:
    """HTTP for Prometheus, on a thread of its own."""

    def __init__(self, address: str, store: BlockStore, registry: CollectorRegistry) -> None:
        host, port = Address.parse(address)
        registry.register(StoreCollector(store))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        if hasattr(gc, "callbacks"):
            GCCollector(registry=registry)
        self._server: WSGIServer
        self._thread: Thread
        self._server, self._thread = start_http_server(port, host, registry)
        self.port = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
