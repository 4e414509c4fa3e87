"""Spans of a request's distributed trace, in the engine's process and in the daemon: the one module of both that uses
the API of OpenTelemetry.

A trace begins in the engine. A span is made only below a span that is recorded: without one all of this costs a look
into `sys.modules`, because a process in which no other code has imported OpenTelemetry has no such span. Any thread may
call it. Nothing here raises: OpenTelemetry calls the engine's own processors of spans, and what they raise is logged
once, and costs no more than spans.

    with span("kvservice.lookup", blocks=3) as lookup:      # None if the request is not traced
        ...
        if lookup is not None:
            lookup.set(hit_blocks=2)
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, Literal, ParamSpec, Self, TypeVar

from kvservice_api.errors import KVError

T = TypeVar("T")
P = ParamSpec("P")

log = logging.getLogger(__name__)

TraceContext = Any  # OpenTelemetry's Context: the span below which new spans are made.
Kind = Literal["client", "internal", "server"]

_PARENT_HEADER = "traceparent"  # W3C Trace Context, in HTTP headers and in gRPC metadata.
_SERVER_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
_NO_SPAN: AbstractContextManager[None] = nullcontext()
_failures: list[str] = []  # The first failure of OpenTelemetry in this process, which is logged.


def _contained(call: Callable[P, T]) -> Callable[P, T | None]:
    """`call`, which returns None instead of raising what OpenTelemetry, or a processor of spans, raises."""

    @wraps(call)
    def contained(*args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if not _failures:
                _failures.append(repr(error))
                log.warning("OpenTelemetry failed: spans may be missing; this is logged once", exc_info=True)
            return None

    return contained


@_contained
def current() -> TraceContext | None:
    """The caller's trace, for spans that are made later, or on another thread. None if it is not recorded."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None or not hasattr(api, "get_current_span"):  # Another thread may be importing it.
        return None
    if not api.get_current_span().get_span_context().trace_flags.sampled:
        return None
    from opentelemetry.context import get_current

    return get_current()


@_contained
def of_headers(headers: Mapping[str, str] | None) -> TraceContext | None:
    """The trace that W3C headers name. None if they name none, if it is not recorded, or without OpenTelemetry."""
    if not headers or _PARENT_HEADER not in headers:
        return None
    try:
        from opentelemetry.trace import get_current_span
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        return None
    trace = TraceContextTextMapPropagator().extract(headers)
    return trace if get_current_span(trace).get_span_context().trace_flags.sampled else None


@_contained
def headers() -> tuple[tuple[str, str], ...] | None:
    """The caller's trace as gRPC metadata. None if it is not recorded."""
    if current() is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(found)
    return tuple(found.items())


def within(trace: TraceContext | None) -> AbstractContextManager[None]:
    """Make the block's spans part of this trace. Without one it does nothing."""
    return _NO_SPAN if trace is None else _attached(trace)


def carried(work: Callable[[], T]) -> Callable[[], T]:
    """`work`, for another thread: its spans become part of the caller's trace."""
    trace = current()
    return work if trace is None else partial(_run_within, trace, work)


def span(name: str, kind: Kind = "internal", **attributes: object) -> AbstractContextManager[OpenSpan | None]:
    """A span of the block, which the block's own spans are below. None if the caller's trace is not recorded."""
    trace = current()
    return _NO_SPAN if trace is None else OpenSpan(name, trace, kind, attributes)


def record(name: str, duration_s: float, trace: TraceContext | None = None, **attributes: object) -> None:
    """A span that took so long until now, below the given trace, by default the caller's."""
    trace = current() if trace is None else trace
    if trace is not None:
        OpenSpan(name, trace, "internal", attributes, begun_s_ago=duration_s).end()


def steps(
    items: Generator[T, None, None],
    trace: TraceContext,
    name: str,
    step_name: str,
    describe: Callable[[T], Mapping[str, object]],
    **attributes: object,
) -> Generator[T, None, None]:
    """The items, in a span of the whole iteration, with one below it for each wait for an item."""
    whole = OpenSpan(name, trace, "client", attributes)
    try:
        with closing(items):
            while True:
                begun_ns = time.time_ns()
                with whole.attached():
                    item = next(items, None)
                if item is None:
                    break
                record(step_name, (time.time_ns() - begun_ns) / 1e9, whole.context, **describe(item))
                yield item
    except BaseException as error:
        whole.end(error)
        raise
    whole.end()


class OpenSpan:
    """A span that has begun. As a context manager it is the current one, and ends with the block."""

    def __init__(
        self,
        name: str,
        trace: TraceContext,
        kind: Kind,
        attributes: Mapping[str, object],
        *,
        begun_s_ago: float = 0.0,
        linked: TraceContext | None = None,
    ) -> None:
        """The names of `attributes` get the prefix ``kvservice.``. `linked` is another span that this one refers to."""
        begun_ns = time.time_ns() - int(begun_s_ago * 1e9)
        self._span: Any  # None if it could not begin.
        self.context: TraceContext
        self._span, self.context = _begun(name, trace, kind, begun_ns, linked) or (None, trace)
        self._attached: AbstractContextManager[None] = _NO_SPAN
        self.set(**attributes)

    def set(self, **attributes: Any) -> None:
        """Attributes whose value is None are left out."""
        self._set({f"kvservice.{name}": each for name, each in attributes.items() if each is not None})

    def attached(self) -> AbstractContextManager[None]:
        """Make the block's spans part of this one."""
        return _attached(self.context)

    def end(self, error: BaseException | None = None) -> None:
        """An iteration that its caller ends early has not failed."""
        if error is not None and not isinstance(error, GeneratorExit):
            self._fail(error.reason if isinstance(error, KVError) else type(error).__name__, error)
        self._end()

    def begin_call(self, method: str) -> None:
        """The span is that of a call of a gRPC method, and the current one until `end_call`."""
        self._set({"rpc.system.name": "grpc", "rpc.method": method})
        self.__enter__()

    def end_call(self, code: str, reason: str) -> None:
        """The end of a call that a server has answered with this status, and this reason of an error or none."""
        self._set({"rpc.response.status_code": code})
        if reason and code in _SERVER_FAULTS:
            self._fail(reason, reason)
        elif reason:
            self._set({"error.type": reason})
        self.__exit__(None, None, None)

    @_contained
    def _set(self, attributes: Mapping[str, object]) -> None:
        if self._span is not None:
            self._span.set_attributes(attributes)

    @_contained
    def _fail(self, reason: str, text: object) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._set({"error.type": reason})
        if self._span is not None:
            self._span.set_status(Status(StatusCode.ERROR, str(text)))

    @_contained
    def _end(self) -> None:
        if self._span is not None:
            self._span.end()

    def __enter__(self) -> Self:
        self._attached = self.attached()
        self._attached.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._attached.__exit__(None, None, None)
        self.end(error)


def of_call(method: str, metadata: Iterable[tuple[str, str | bytes]]) -> OpenSpan | None:
    """The current span of a server's call from now until `end_call`. None if the client's trace is not recorded."""
    trace = of_headers({key: str(value) for key, value in metadata if key in (_PARENT_HEADER, "tracestate")})
    if trace is None:
        return None
    made = OpenSpan(method, trace, "server", {})
    made.begin_call(method)
    return made


@_contained
def _begun(
    name: str, trace: TraceContext, kind: Kind, begun_ns: int, linked: TraceContext | None
) -> tuple[Any, TraceContext]:
    """A new span, and the context below it."""
    from opentelemetry.trace import Link, SpanKind, get_current_span, get_tracer, set_span_in_context

    links = [] if linked is None else [Link(get_current_span(linked).get_span_context())]
    made = get_tracer("kvservice").start_span(name, trace, SpanKind[kind.upper()], links=links, start_time=begun_ns)
    return made, set_span_in_context(made, trace)


def _run_within(trace: TraceContext, work: Callable[[], T]) -> T:
    with _attached(trace):
        return work()


@contextmanager
def _attached(trace: TraceContext) -> Iterator[None]:
    token = _attach(trace)
    try:
        yield
    finally:
        if token is not None:
            _detach(token)


@_contained
def _attach(trace: TraceContext) -> Any:
    from opentelemetry.context import attach

    return attach(trace)


@_contained
def _detach(token: Any) -> None:
    from opentelemetry.context import detach

    detach(token)
