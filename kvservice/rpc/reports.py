"""Wire to domain, and back, for the engine's reports of its requests."""

from __future__ import annotations

import math
from collections.abc import Mapping

from google.protobuf.message import Message

from kvservice.store.types import ReportRecord
from kvservice_api.errors import InvalidRequest
from kvservice_api.v1 import blocks_pb2 as pb

_TEXT_BYTES_MAX = 200
_TEXTS = ("client_name", "plan_reason", "outcome_reason", "tier", "transport")
_COUNTS = ("history_tokens", "new_tokens", "loaded_tokens", "computed_tokens", "loaded_bytes")
_TIMES = ("estimates", "times")  # Messages: the fields that are set are kept, by name.
_AGO_MS_MAX = 30 * 86_400_000
_PLANS: Mapping[pb.RequestPlan, str] = {
    pb.REQUEST_PLAN_UNSPECIFIED: "none",
    pb.REQUEST_PLAN_LOAD: "load",
    pb.REQUEST_PLAN_RECOMPUTE: "recompute",
    pb.REQUEST_PLAN_MIXED: "mixed",
}
_OUTCOMES: Mapping[pb.RequestOutcome, str] = {
    pb.REQUEST_OUTCOME_DONE: "done",
    pb.REQUEST_OUTCOME_MISS: "miss",
    pb.REQUEST_OUTCOME_FAILED_OVER: "failed_over",
    pb.REQUEST_OUTCOME_BREAKER_OPEN: "breaker_open",
}
_PLAN_NUMBERS = {name: number for number, name in _PLANS.items()}
_OUTCOME_NUMBERS = {name: number for number, name in _OUTCOMES.items()}


def report_record(report: pb.RequestReport, now_ms: int) -> ReportRecord:
    """Raises InvalidRequest. The request's id is the caller's to check."""
    if report.plan not in _PLANS:
        raise InvalidRequest(f"no plan has the number {report.plan}", field="plan")
    if report.outcome not in _OUTCOMES:
        raise InvalidRequest(f"no outcome has the number {report.outcome}", field="outcome")
    for name in _TEXTS:
        text = getattr(report, name)
        if len(text.encode()) > _TEXT_BYTES_MAX or not text.isprintable():
            raise InvalidRequest(f"{name} is longer than {_TEXT_BYTES_MAX} bytes, or cannot be printed", field=name)
    return ReportRecord(
        report_id=report.report_id,
        began_ms=max(0, now_ms - min(report.ago_ms, _AGO_MS_MAX)),
        plan=_PLANS[report.plan],
        outcome=_OUTCOMES[report.outcome],
        values={name: getattr(report, name) for name in (*_TEXTS, *_COUNTS)}
        | {name: _durations(getattr(report, name)) for name in _TIMES},
    )


def _durations(message: Message) -> dict[str, float]:
    """The fields that are set, by name."""
    found: dict[str, float] = {field.name: value for field, value in message.ListFields()}
    for name, value in found.items():
        if not (math.isfinite(value) and value >= 0):
            raise InvalidRequest(f"{name} is {value}; it must be a time", field=name)
    return found


def report_message(request_id: str, record: ReportRecord) -> pb.RequestReport:
    return pb.RequestReport(
        report_id=record.report_id,
        request_id=request_id,
        plan=_PLAN_NUMBERS[record.plan],
        outcome=_OUTCOME_NUMBERS[record.outcome],
        **record.values,
    )
