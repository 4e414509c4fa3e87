"""Spans: what OpenTelemetry and an engine's own processors of spans raise stays here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import opentelemetry.context
import opentelemetry.trace
import pytest
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

from kvservice_api import spans

HEADERS = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}


class _Broken(SpanProcessor):
    """Raises when a span of ours begins, or ends."""

    def __init__(self, when: str) -> None:
        self._when = when

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self._raise("start", span)

    def on_end(self, span: Any) -> None:
        self._raise("end", span)

    def _raise(self, when: str, span: Any) -> None:
        if when == self._when and span.name != "request":
            raise RuntimeError("the engine's processor is broken")


@pytest.fixture(autouse=True)
def nothing_logged_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "_failures", [])


@pytest.fixture(params=["start", "end"])
def request_span(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The span of an engine's request, whose processor raises."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(_Broken(request.param))
    monkeypatch.setattr(opentelemetry.trace, "get_tracer", provider.get_tracer)
    with provider.get_tracer("engine").start_as_current_span("request") as made:
        yield made


def test_a_processor_that_raises_is_logged_once_and_the_work_is_done(
    request_span: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trace = spans.current()
    assert trace is not None
    for _ in range(2):
        with spans.span("kvservice.lookup", blocks=3) as lookup:
            assert lookup is not None
            lookup.set(hit_blocks=2)
        spans.record("kvservice.read", 0.001)
        items = spans.steps((each for each in (1, 2)), trace, "kvservice.load", "kvservice.layer", lambda _: {})
        assert list(items) == [1, 2]
        call = spans.of_call("kvservice.Lookup", HEADERS.items())
        assert call is not None
        call.end_call("INTERNAL", "INTERNAL")
        assert opentelemetry.trace.get_current_span() is request_span, "the request's span is current again"

    assert [each.levelno for each in caplog.records if each.name == spans.__name__] == [logging.WARNING]


def test_the_error_of_the_work_itself_is_what_is_raised(request_span: Any) -> None:
    with pytest.raises(KeyError, match="the work"), spans.span("kvservice.lookup"):
        raise KeyError("the work")


def test_an_api_that_raises_leaves_work_without_a_trace(request_span: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = spans.current()

    def fails(*args: object, **kwargs: object) -> Any:
        raise RuntimeError("OpenTelemetry is broken")

    for module, name in (
        (opentelemetry.context, "attach"),
        (opentelemetry.trace, "set_span_in_context"),
        (opentelemetry.trace, "get_current_span"),
    ):
        monkeypatch.setattr(module, name, fails)
        with spans.within(trace), spans.span("kvservice.lookup"):
            spans.headers()
    assert spans.of_headers(HEADERS) is None
    assert spans.current() is None
