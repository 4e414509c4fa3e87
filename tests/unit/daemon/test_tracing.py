"""What a daemon says when it cannot export spans."""

from __future__ import annotations

import sys
import threading
from unittest.mock import Mock

import pytest

from kvservice.config import ConfigError
from kvservice.tracing import Tracing


def test_without_the_package_the_setting_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)

    with pytest.raises(ConfigError, match=r"tracing\.enabled: .* install KVService's extra otel"):
        Tracing("1")


def test_a_protocol_that_is_not_known_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")

    with pytest.raises(ConfigError, match=r"'http/json'; it must be one of grpc, http/protobuf"):
        Tracing("1")


def test_it_ends_without_a_new_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk")
    monkeypatch.setattr("opentelemetry.trace.set_tracer_provider", lambda provider: None)
    tracing = Tracing("1")
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
    tracing.close()
