"""Engines' reports of their requests: checked, and kept as messages."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kvservice.store.types import ReportRecord
from kvservice_api.errors import InvalidRequest
from kvservice_api.v1 import blocks_pb2 as pb

_TEXT_BYTES_MAX = 200
_TEXTS = ("client_name", "plan_reason", "outcome_reason", "tier", "transport")
_AGO_MS_MAX = 30 * 86_400_000
PLANS: Mapping[pb.RequestPlan, str] = {
    pb.REQUEST_PLAN_UNSPECIFIED: "none",
    pb.REQUEST_PLAN_LOAD: "load",
    pb.REQUEST_PLAN_RECOMPUTE: "recompute",
    pb.REQUEST_PLAN_MIXED: "mixed",
}
OUTCOMES: Mapping[pb.RequestOutcome, str] = {
    pb.REQUEST_OUTCOME_DONE: "done",
    pb.REQUEST_OUTCOME_MISS: "miss",
    pb.REQUEST_OUTCOME_FAILED_OVER: "failed_over",
    pb.REQUEST_OUTCOME_BREAKER_OPEN: "breaker_open",
}


def report_record(report: pb.RequestReport, now_ms: int) -> ReportRecord:
    """The record has `report` itself, which the caller must not change afterwards. Does not check the request's id.

    Raises InvalidRequest.
    """
    if report.plan not in PLANS:
        raise InvalidRequest(f"no plan has the number {report.plan}", field="plan")
    if report.outcome not in OUTCOMES:
        raise InvalidRequest(f"no outcome has the number {report.outcome}", field="outcome")
    for name in _TEXTS:
        text = getattr(report, name)
        if len(text.encode()) > _TEXT_BYTES_MAX or not text.isprintable():
            raise InvalidRequest(f"{name} is longer than {_TEXT_BYTES_MAX} bytes, or cannot be printed", field=name)
    for times in (report.estimates, report.times):
        for field, value in times.ListFields():
            if not (math.isfinite(value) and value >= 0):
                raise InvalidRequest(f"{field.name} is {value}; it must be a time", field=field.name)
    began_ms = max(0, now_ms - min(report.ago_ms, _AGO_MS_MAX))
    report.ClearField("ago_ms")  # It was relative to the time of sending.
    report.DiscardUnknownFields()  # They may have any size.
    plan, outcome = PLANS[report.plan], OUTCOMES[report.outcome]
    return ReportRecord(report.report_id, began_ms, plan, outcome, report, _computed_bytes_per_s(report))


def _computed_bytes_per_s(report: pb.RequestReport) -> float:
    """How much KV the engine would compute per second: by its estimate of the time without a load. 0 if unknown."""
    compute_s = report.estimates.recompute_ms / 1000
    if not compute_s or not report.loaded_tokens:
        return 0.0
    tokens = report.history_tokens + report.new_tokens
    return tokens / compute_s * report.loaded_bytes / report.loaded_tokens
