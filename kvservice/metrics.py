"""What Prometheus sees: the counters, the tiers' fill, and how punctual the event loop is."""

from __future__ import annotations

import gc
import logging
import os
import socket
import time
from collections.abc import Iterator
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Gauge, Histogram, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from kvservice.clock import Clock
from kvservice.counters import HELP, Counters
from kvservice.rpc.addresses import AddressUnusable, reason
from kvservice.rpc.tls import Certificates
from kvservice.store.store import BlockStore
from kvservice_api.address import parse_listen_address

log = logging.getLogger(__name__)

_BEAT_S = 0.005
_IDLE_BEAT_S = 0.05  # Beats of 5 ms alone would take a processor 1 % of its time.
_BUSY_SHARE = 0.05  # Of a beat, the event loop's processor time from which on the loop is not idle. A beat takes 1 %.
_PATIENCE_S = 10.0  # How long a request for metrics may be silent.
_WINDOW_S = 3.0
_PREFIX = "kvservice_"


class Heartbeat:
    """Measures the event loop's delay: how much later than due each of its beats runs.

    A beat is due every 5 ms while the loop works, and every 50 ms while it is idle. A callback that blocks an idle
    loop delays the next beat all the same. The time for which the loop's thread waited for a processor is measured
    too: it is the machine's delay, not the daemon's.
    """

    def __init__(self, clock: Clock, registry: CollectorRegistry | None = None) -> None:
        self._clock = clock
        self.latest_ms = 0.0  # The worst since the start.
        self._recent_ms = [0.0, 0.0]  # The worst of the last whole window, and of the one that runs.
        self._window_ends_s = 0.0
        buckets = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0)
        self._delay = Histogram(
            _PREFIX + "event_loop_delay_seconds",
            "How late a heartbeat of the event loop was.",
            buckets=buckets,
            registry=registry,
        )
        self._own_delay = Histogram(
            _PREFIX + "event_loop_own_delay_seconds",
            "The same without the time for which the event loop's thread waited for a processor.",
            buckets=buckets,
            registry=registry,
        )

    async def run(self) -> None:
        with _ProcessorWait() as processor_wait:
            beat_s = _IDLE_BEAT_S
            while True:
                waited_s, used_s = processor_wait.total_s(), time.thread_time()
                due = self._clock.monotonic_s() + beat_s
                await self._clock.sleep(beat_s)
                late_s = max(0.0, self._clock.monotonic_s() - due)
                self._delay.observe(late_s)
                self._own_delay.observe(max(0.0, late_s - (processor_wait.total_s() - waited_s)))
                self.latest_ms = max(self.latest_ms, late_s * 1000)
                if due >= self._window_ends_s:
                    self._recent_ms = [self._recent_ms[1], 0.0]
                    self._window_ends_s = due + _WINDOW_S
                self._recent_ms[1] = max(self._recent_ms[1], late_s * 1000)
                beat_s = next_beat_s(beat_s, time.thread_time() - used_s)

    @property
    def recent_ms(self) -> float:
        """The worst of the last few seconds."""
        return max(self._recent_ms)


def next_beat_s(beat_s: float, used_s: float) -> float:
    """When the next beat is due, in seconds: soon if the loop's thread used the processor for long in the last beat."""
    return _BEAT_S if used_s > _BUSY_SHARE * beat_s else _IDLE_BEAT_S


class _ProcessorWait:
    """How long this thread has been ready to run without a processor to run on, as the kernel counts it."""

    def __enter__(self) -> Self:
        try:
            self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1  # A kernel that does not count it.
        return self

    def __exit__(self, *exc: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def total_s(self) -> float:
        if self._fd < 0:
            return 0.0
        _on_processor_ns, waited_ns, _slices = os.pread(self._fd, 100, 0).split()
        return int(waited_ns) / 1e9


class StoreCollector(Collector):
    """Reads the store when Prometheus asks, from another thread: plain numbers only."""

    def __init__(self, store: BlockStore, counters: Counters) -> None:
        self._store = store
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        facts = self._store.status.facts()
        for name, value in self._counters.as_dict().items():
            yield CounterMetricFamily(_PREFIX + name, HELP[name], value=value)
        reported = CounterMetricFamily(
            _PREFIX + "requests_reported",
            "Requests that engines reported, by plan and outcome.",
            labels=["plan", "outcome"],
        )
        for (plan, outcome), count in facts.reported.items():
            reported.add_metric([plan, outcome], count)
        yield reported
        capacity = GaugeMetricFamily(_PREFIX + "tier_capacity_bytes", "What extents may take.", labels=["tier"])
        configured = GaugeMetricFamily(
            _PREFIX + "tier_configured_bytes",
            "What extents could take if nothing kept the tier smaller than its setting.",
            labels=["tier"],
        )
        used = GaugeMetricFamily(_PREFIX + "tier_used_bytes", "What extents take.", labels=["tier"])
        refusing = GaugeMetricFamily(_PREFIX + "tier_refusing", "1 while a tier takes no blocks.", labels=["tier"])
        index_used = GaugeMetricFamily(_PREFIX + "index_used_bytes", "Pages in use in a tier's index.", labels=["tier"])
        index_map = GaugeMetricFamily(_PREFIX + "index_map_bytes", "Size of a tier's index.", labels=["tier"])
        for tier in facts.tiers:
            capacity.add_metric([tier.name], tier.capacity_bytes)
            configured.add_metric([tier.name], tier.configured_bytes)
            used.add_metric([tier.name], tier.used_bytes)
            refusing.add_metric([tier.name], 1 if tier.refusing_because else 0)
        for name in facts.index_map_bytes:
            index_used.add_metric([name], facts.index_used_bytes[name])
            index_map.add_metric([name], facts.index_map_bytes[name])
        yield from (capacity, configured, used, refusing, index_used, index_map)
        yield GaugeMetricFamily(_PREFIX + "blocks", "Stored objects.", value=facts.blocks)
        yield GaugeMetricFamily(_PREFIX + "clients", "Attached clients.", value=facts.clients)
        yield GaugeMetricFamily(_PREFIX + "leases", "Leases that run.", value=facts.leases)
        yield GaugeMetricFamily(_PREFIX + "hint_streams", "Clients that send hints.", value=facts.hint_streams)
        yield GaugeMetricFamily(
            _PREFIX + "queued_requests", "Requests in the queues that clients sent.", value=facts.queued_requests
        )
        yield GaugeMetricFamily(_PREFIX + "uploads", "Blocks being uploaded.", value=facts.uploads)


class MetricsServer:
    """HTTP for Prometheus, on threads of its own; with TLS where there are `certificates`."""

    def __init__(
        self,
        address: str,
        store: BlockStore,
        counters: Counters,
        registry: CollectorRegistry,
        certificates: Certificates | None = None,
    ) -> None:
        registry.register(StoreCollector(store, counters))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        if hasattr(gc, "callbacks"):
            GCCollector(registry=registry)
        if certificates is not None:
            Gauge(
                _PREFIX + "tls_certificate_expires_seconds",
                "When the certificate in use expires, since the epoch.",
                registry=registry,
            ).set_function(lambda: certificates.latest.expires_at_s)
        try:
            self._server = _HttpServer(*parse_listen_address(address), certificates)
        except OSError as error:
            raise AddressUnusable("server.metrics_address", address, reason(error)) from error
        self._server.set_app(make_wsgi_app(registry))
        self.port = self._server.server_port
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _HttpServer(ThreadingMixIn, WSGIServer):
    """A thread a connection: one that says nothing holds up no other."""

    daemon_threads = True

    def __init__(self, host: str, port: int, certificates: Certificates | None) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        self._certificates = certificates
        super().__init__((str(found[0][4][0]), port), _SilentHandler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, peer = super().get_request()
        connection.settimeout(_PATIENCE_S)
        if self._certificates is not None:
            # The first read does the handshake: on the connection's thread, not on the one that accepts.
            context = self._certificates.latest.context
            connection = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, peer

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("a request for metrics failed", exc_info=True)


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (its name there)
        pass
