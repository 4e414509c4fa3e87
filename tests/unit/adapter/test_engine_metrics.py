"""What an engine's first token counts, from the plan and the measured time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvservice_adapter.engine.metrics import ENGINE_METRICS, count_first_token, reason_of
from kvservice_adapter.load import LoadFailed
from kvservice_api.cost import Kind, Plan
from kvservice_api.errors import ChecksumMismatch

ESTIMATES = {Kind.LOAD: 0.25, Kind.RECOMPUTE: 2.0}


def counted(plan: Plan | None, measured_s: float, **tokens: int) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}

    def add(name: str, value: float, label: str) -> None:
        metric = next(each for each in ENGINE_METRICS if each.name == name)
        assert bool(metric.label) == bool(label)
        found[name, label] = value

    count_first_token(add, plan, measured_s, **tokens)
    return found


def test_a_load_saves_the_estimated_time_of_computing_less_the_measured_time() -> None:
    plan = Plan(Kind.LOAD, 0, 512, ESTIMATES, "")

    assert counted(plan, 0.5, loaded=512, computed=30, engine_cache=64) == {
        ("prompt_tokens", "loaded"): 512,
        ("prompt_tokens", "computed"): 30,
        ("prompt_tokens", "engine_cache"): 64,
        ("planned_seconds", "load"): 0.25,
        ("measured_seconds", "load"): 0.5,
        ("saved_seconds", ""): 1.5,
    }


def test_a_load_that_took_longer_than_computing_saves_nothing() -> None:
    plan = Plan(Kind.LOAD, 0, 512, ESTIMATES, "")

    assert counted(plan, 3.0, loaded=512, computed=30)["saved_seconds", ""] == 0.0


def test_a_recomputation_is_compared_with_its_plan_and_saves_nothing() -> None:
    plan = Plan(Kind.RECOMPUTE, 512, 0, ESTIMATES, "")

    assert counted(plan, 2.5, loaded=0, computed=542) == {
        ("prompt_tokens", "computed"): 542,
        ("planned_seconds", "recompute"): 2.0,
        ("measured_seconds", "recompute"): 2.5,
    }


@pytest.mark.parametrize("plan", [None, Plan(Kind.LOAD, 0, 512, {}, "nothing was measured")])
def test_without_an_estimate_only_tokens_are_counted(plan: Plan | None) -> None:
    assert set(counted(plan, 2.5, loaded=0, computed=542)) == {("prompt_tokens", "computed")}


def test_the_reason_of_a_failed_load_is_that_of_its_cause() -> None:
    failed = LoadFailed("layer 3 is not loaded")
    failed.__cause__ = ChecksumMismatch("layer 3 is damaged")

    assert reason_of(failed) == "CHECKSUM_MISMATCH"
    assert reason_of(LoadFailed("layer 3 did not arrive in time")) == "DEADLINE_EXCEEDED"
    assert reason_of(ValueError()) == "INTERNAL"


def test_without_prometheus_client_nothing_is_counted() -> None:
    program = """
import sys
sys.modules["prometheus_client"] = None  # As if it were not installed.
from kvservice_adapter.engine.metrics import EngineMetrics
EngineMetrics("model").add("prompt_tokens", 5, "loaded")
EngineMetrics("model").breaker_changed(True)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
