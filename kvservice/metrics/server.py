"""The HTTP server of the metrics, and of the daemon's health."""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from kvservice.metrics.collector import TableCollector
from kvservice.metrics.heartbeat import Heartbeat
from kvservice.metrics.rows import Sources
from kvservice.rpc.addresses import AddressUnusable, reason
from kvservice.rpc.tls import Certificates
from kvservice_api.address import parse_listen_address

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0  # How long a request for metrics may be silent.
_SILENT_MAX_S = 10.0  # After so long without a beat, the event loop counts as hung.


class Health(NamedTuple):
    is_well: bool
    text: str


def health(heartbeat: Heartbeat, state: str) -> Health:
    """The health of a daemon in this state: whether its event loop runs."""
    silent_s = heartbeat.silent_s
    if silent_s is None:
        return Health(False, "starting")
    if silent_s > _SILENT_MAX_S:
        return Health(False, f"the event loop has not run for {silent_s:.0f} s")
    return Health(True, state)


class MetricsServer:
    """HTTP for Prometheus and for probes, on threads of its own; with TLS where there are `certificates`.

    ``/metrics`` has the metrics. ``/healthz`` answers 200 while the event loop runs, with the daemon's state, and 503
    before it serves or after the loop was silent for 10 seconds. Any other path is 404.
    """

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        sources: Callable[[], Sources],
        health: Callable[[], Health],
        certificates: Certificates | None = None,
    ) -> None:
        registry.register(TableCollector(sources))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        if hasattr(gc, "callbacks"):
            GCCollector(registry=registry)
        try:
            self._server = _HttpServer(*parse_listen_address(address), certificates)
        except OSError as error:
            raise AddressUnusable("server.metrics_address", address, reason(error)) from error
        self._server.set_app(_by_path(make_wsgi_app(registry), health))
        self.port = self._server.server_port
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _by_path(metrics: WSGIApplication, health: Callable[[], Health]) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)
        if path == "/healthz":
            is_well, text = health()
            status = "200 OK" if is_well else "503 Service Unavailable"
        else:
            status, text = "404 Not Found", "the metrics are at /metrics, and the health at /healthz"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]

    return answer


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
