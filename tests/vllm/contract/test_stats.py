"""What vLLM exports of the connector: counted in both roles, passed on by vLLM's real scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvservice_adapter.connectors.vllm.connector import KVServiceConnector
from kvservice_adapter.connectors.vllm.stats import TransferStats
from kvservice_adapter.engine.metrics import ENGINE_METRICS
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.contract.setup import Setup
from tests.vllm.contract.steps import Steps

pytestmark = pytest.mark.fast

Value = Callable[..., float]


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon"), dram__capacity_bytes=256 * MIB) as process:
        yield process


def engine(daemon: DaemonProcess, load: str) -> Steps:
    options = {
        "address": daemon.address,
        "model_id": "numbers",
        "model_revision": "1",
        "block_tokens": 64,
        "load": load,
        "lookup_wait_s": 5.0,
        "wait_s": 0.5,
    }
    return Steps(Setup("KVServiceConnector", "kvservice_adapter.connectors.vllm", options))


def exported(steps: Steps) -> Value:
    """The samples that Prometheus would read, of all that vLLM has passed to its exporter so far."""
    registry = CollectorRegistry()
    kinds = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    labels, values = ["model_name", "engine"], {0: ["numbers", "0"]}
    metrics = KVServiceConnector.build_prom_metrics(steps.scheduler.vllm_config, kinds, labels, values)
    for data in steps.transfer_stats:
        metrics.observe(data, 0)

    def value(name: str, **labels: str) -> float:
        found = registry.get_sample_value(f"vllm:kvservice_{name}", {"model_name": "numbers", "engine": "0", **labels})
        return 0.0 if found is None else found

    return value


def stored(steps: Steps, blocks: int) -> None:
    """Take steps until vLLM has passed on that so many blocks are stored."""
    until(lambda: steps.step() is not None and exported(steps)("saved_blocks_total") >= blocks)


@pytest.mark.parametrize(("load", "waits"), [("whole", 1), ("layers", 3)])
def test_a_hit_counts_its_tokens_by_source_and_each_wait(daemon: DaemonProcess, load: str, waits: int) -> None:
    prompt = [7, *range(300)]
    with engine(daemon, load) as steps:
        steps.ask(prompt, 2)
        steps.forget_pages()
        stored(steps, 4)
        request = steps.ask(prompt, 2)
        steps.settle()
        value, hit = exported(steps), steps.hits[request.request_id]

    assert hit >= 256
    assert value("prompt_tokens_total", source="loaded") == hit == value("hit_tokens_total")
    assert value("prompt_tokens_total", source="computed") == 2 * len(prompt) - hit
    assert value("load_wait_seconds_count") == waits
    assert value("loads_total") == 1
    assert value("open_breakers") == value("breaker_openings_total") == 0


def test_plans_are_compared_with_what_vllm_measures(daemon: DaemonProcess) -> None:
    prompt = [9, *range(400)]
    with engine(daemon, "auto") as steps:
        role: Any = steps.scheduler.connector
        steps.ask(prompt, 2)
        steps.forget_pages()
        stored(steps, 6)
        rates = role._scheduler._rates
        for tokens in (100, 400):
            rates.observe_prefill(tokens, 0, 60.0 * tokens)  # As if the model were slow: its history is loaded.
        rates.observe_load(2**20, 0.001, "dram")
        steps.ask(prompt, 2)
        steps.settle()
        value = exported(steps)

    assert value("planned_seconds_count", plan="load") == value("measured_seconds_count", plan="load") == 1
    assert value("saved_seconds_total") > 60


def test_a_daemon_that_is_away_opens_the_breakers_until_it_is_back(daemon: DaemonProcess) -> None:
    with engine(daemon, "whole") as steps:
        steps.ask([3, *range(200)], 2)
        daemon.kill()
        prompts = iter(range(1000, 2000))
        until(lambda: bool(steps.ask([next(prompts), *range(200)], 2)) and exported(steps)("open_breakers") > 0)
        value = exported(steps)
        assert value("breaker_openings_total") >= value("open_breakers")
        daemon.start()
        until(lambda: bool(steps.ask([next(prompts)], 2)) and exported(steps)("open_breakers") == 0)


def test_the_stats_of_workers_are_added_up() -> None:
    first, second = TransferStats(), TransferStats()
    for each in (first, second):
        each.count(loads=1)
        each.add("load_wait_seconds", 0.5)
        each.add("failed_loads", 2, "LEASE_EXPIRED")

    assert first.aggregate(second).to_dict() == {
        "loads": 2,
        "load_wait_seconds": [0.5, 0.5],
        "failed_loads:LEASE_EXPIRED": 4,
    }
    assert first.reduce()["KVService mean load_wait_seconds"] == 0.5
    assert {metric.name for metric in ENGINE_METRICS} >= {"loads", "load_wait_seconds", "failed_loads"}
