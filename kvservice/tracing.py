"""Exports the daemon's spans by OTLP: the one module of the daemon that imports OpenTelemetry's SDK, if it is enabled.

`kvservice_api.spans` makes the spans, for calls whose client sends a recorded trace. OpenTelemetry's own environment
variables say where they are sent, and how: ``OTEL_EXPORTER_OTLP_ENDPOINT`` and the like.
"""

from __future__ import annotations

import os
import threading
from importlib import import_module
from typing import Any

from kvservice.config import ConfigError

_MODULES = {"grpc": "opentelemetry.exporter.otlp.proto.grpc", "http/protobuf": "opentelemetry.exporter.otlp.proto.http"}
_SENT_S = 2.0  # At the end: for spans that are not sent yet.


class Tracing:
    """The exporter of this process. Made once; its thread sends spans until `close`."""

    def __init__(self, version: str) -> None:
        """Raises ConfigError if a package is missing, or the protocol is not known."""
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        protocol = protocol or "grpc"
        if protocol not in _MODULES:
            raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; it must be one of {', '.join(_MODULES)}")
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            exporter: Any = import_module(f"{_MODULES[protocol]}.trace_exporter").OTLPSpanExporter()
        except ImportError as error:
            needed = "KVService's extra otel" if protocol == "grpc" else "opentelemetry-exporter-otlp-proto-http"
            raise ConfigError(f"tracing.enabled: {error}; install {needed}") from error
        ours = Resource({"service.name": "kvservice", "service.version": version})
        resource = Resource.create().merge(ours).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(self._provider)
        self._closing = threading.Event()
        self._ending = threading.Thread(target=self._end, name="tracing-end", daemon=True)
        self._ending.start()  # Now, because later the process may get no thread.

    def close(self) -> None:
        """Send what is not sent yet. Blocks for two seconds at most: a collector that does not answer takes ten."""
        self._closing.set()
        self._ending.join(_SENT_S)

    def _end(self) -> None:
        self._closing.wait()
        self._provider.shutdown()
