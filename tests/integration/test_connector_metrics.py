"""What the connector for transformers exports of real requests: metrics in the default registry, and spans."""

from __future__ import annotations

from collections.abc import Iterator

import opentelemetry.trace
import pytest
import torch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY

from kvservice_adapter.rates import Rates
from tests.daemon import DaemonProcess, until
from tests.integration.media import arena
from tests.unit.connector_models import computed, connector, prompt, states, tiny_llama


def value(model_id: str, name: str, **labels: str) -> float:
    found = REGISTRY.get_sample_value(f"kvservice_adapter_{name}", {"model": model_id, **labels})
    return 0.0 if found is None else found


@pytest.fixture(scope="module")
def exported() -> Iterator[InMemorySpanExporter]:
    """The spans of this process. OpenTelemetry allows one provider per process: it stays, and is off afterwards."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    opentelemetry.trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


def test_a_request_counts_its_tokens_its_waits_and_its_plan_against_its_time(daemon: DaemonProcess) -> None:
    model, ids, rates = tiny_llama(), prompt(60), Rates()
    rates.observe_prefill(60, 0, 3.0)  # As if the model were slow: its history is loaded.
    rates.observe_load(10_000, 0.001, "dram", "shm")
    with daemon.client(transport="shm") as client, connector(client, model, model_id="counted", rates=rates) as subject:
        subject.save(ids, computed(model, ids), wait_s=30.0)
        rates.observe_load(10_000, 0.001, "dram")
        history = subject.restore(ids)
        assert history.tokens == 59
        with torch.inference_mode():
            model(ids[:, 59:], past_key_values=history.cache)

    assert value("counted", "prompt_tokens_total", source="loaded") == 59
    assert value("counted", "prompt_tokens_total", source="computed") == 1
    assert value("counted", "load_wait_seconds_count") == 3  # The model's layers.
    assert value("counted", "planned_seconds_count", plan="load") == 1
    assert value("counted", "measured_seconds_count", plan="load") == 1
    assert 0 < value("counted", "measured_seconds_sum", plan="load") < 3
    assert 0 < value("counted", "saved_seconds_total") < 3


def test_a_daemon_that_is_away_counts_failed_loads_dropped_saves_and_an_open_breaker(daemon: DaemonProcess) -> None:
    model, ids = tiny_llama(), prompt(40)
    with daemon.client() as client, connector(client, model, model_id="away", wait_s=0.2) as subject:
        cache = computed(model, ids)
        subject.save(ids, cache, wait_s=30.0)
        assert value("away", "open_breakers") == 0.0
        assert value("away", "breaker_openings_total") == 0.0
        history = subject.restore(ids)
        assert history.tokens
        with daemon.stopped():
            with torch.inference_mode():
                model(ids[:, history.cache.get_seq_length() :], past_key_values=history.cache)
            until(lambda: subject.restore(ids).error is not None and bool(value("away", "open_breakers")))
            subject.save(prompt(41), computed(model, prompt(41)))
            assert value("away", "breaker_openings_total") == 1.0
            assert value("away", "dropped_save_blocks_total", reason="BREAKER_OPEN") > 0
        until(lambda: not value("away", "open_breakers"))


def test_a_load_that_fails_is_counted_with_its_reason(daemon: DaemonProcess) -> None:
    model, ids = tiny_llama(), prompt(44)
    with daemon.client(transport="grpc") as client, connector(client, model, model_id="failing") as subject:
        cache = computed(model, ids)
        subject.save(ids, cache, wait_s=30.0)
        keys, medium = states(cache)[1][0], arena(daemon)
        medium.flip(medium.find(keys[0, 0, 4:8].numpy().tobytes()) + 17, bit=3)
        history = subject.restore(ids)
        with torch.inference_mode():
            model(ids[:, history.cache.get_seq_length() :], past_key_values=history.cache)

    assert value("failing", "failed_loads_total", reason="CHECKSUM_MISMATCH") == 1
    assert value("failing", "prompt_tokens_total", source="loaded") == 0
    assert value("failing", "prompt_tokens_total", source="computed") == 44


def test_the_loads_and_saves_of_a_request_are_in_its_trace(
    daemon: DaemonProcess, exported: InMemorySpanExporter
) -> None:
    model, ids = tiny_llama(), prompt(50)
    with daemon.client() as client, connector(client, model, model_id="traced") as subject:
        subject.save(ids, computed(model, ids), wait_s=30.0)
        with opentelemetry.trace.get_tracer("engine").start_as_current_span("request") as request:
            history = subject.restore(ids)
            output = model.generate(ids, past_key_values=history.cache, max_new_tokens=20, do_sample=False)
            subject.save(output[0, : history.cache.get_seq_length()], history.cache, wait_s=30.0)
        assert subject.flush(30.0)

    of_request = [each for each in exported.get_finished_spans() if each.name != "request"]
    assert {each.name for each in of_request} == {
        "kvservice.lookup",
        "kvservice.load",
        "kvservice.layer",
        "kvservice.save",
    }
    trace_id = request.get_span_context().trace_id
    assert {each.context.trace_id for each in of_request if each.context is not None} == {trace_id}
