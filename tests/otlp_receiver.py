"""A receiver of OTLP over gRPC, as a collector is: it decodes what exporters send, and keeps the spans."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

_Kind = trace_pb2.Span.SpanKind


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it was sent. Times in nanoseconds of the wall clock."""

    service: str
    name: str
    kind: str  # "client", "internal" or "server".
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    begin_ns: int
    end_ns: int
    has_failed: bool
    attributes: dict[str, Any]


class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """A context manager: it listens on a port of its own while the context is open."""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self._changed = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(2))
        add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server  # Generated, without types.
        add(self, self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    @property
    def environment(self) -> dict[str, str]:
        """What exporters read. They send spans soon after their end."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_BSP_SCHEDULE_DELAY": "20",
        }

    def Export(self, request: Any, context: Any) -> Any:
        with self._changed:
            for resource in request.resource_spans:
                service = _attributes(resource.resource.attributes)["service.name"]
                for scope in resource.scope_spans:
                    self.spans += [_span(service, each) for each in scope.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, trace_id: bytes, names: set[str], timeout_s: float = 60.0) -> list[ReceivedSpan]:
        """The spans of a trace, by their begin, once it has spans of all these names."""

        def found() -> list[ReceivedSpan]:
            return sorted((each for each in self.spans if each.trace_id == trace_id), key=lambda each: each.begin_ns)

        def is_whole() -> bool:
            return names <= {each.name for each in found()}

        with self._changed:
            assert self._changed.wait_for(is_whole, timeout_s), names - {each.name for each in found()}
            return found()

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop(None).wait()


def _span(service: str, span: Any) -> ReceivedSpan:
    return ReceivedSpan(
        service,
        span.name,
        _Kind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        span.trace_id,
        span.span_id,
        span.parent_span_id,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        _attributes(span.attributes),
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in pairs}
