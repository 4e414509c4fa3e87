"""ReportRequest, called over the wire: the reports that it refuses, and what it keeps of unusual ones."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvservice_api.errors import InvalidRequest, RequestNotFound
from kvservice_api.v1 import admin_pb2
from kvservice_api.v1 import blocks_pb2 as pb
from tests.integration.wire import Wire, refused

SERVICE = "BlockService"


def test_ReportRequest_keeps_no_field_that_the_daemon_does_not_know(wire: Wire) -> None:
    known = pb.RequestReport(request_id="newer", outcome=pb.REQUEST_OUTCOME_DONE)
    unknown = b"\xa2\x06\x05later"  # Field 100, five bytes.
    report = pb.RequestReport.FromString(known.SerializeToString() + unknown)
    wire.blocks.ReportRequest(pb.ReportRequestRequest(report=report))
    (explained,) = wire.admin.Explain(admin_pb2.ExplainRequest(request_id="newer")).request.reports
    assert explained.report.SerializeToString() == known.SerializeToString()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 201}, "request_id"),
        ({"outcome": 0}, "outcome"),
        ({"outcome": 99}, "outcome"),
        ({"plan": 99}, "plan"),
        ({"plan_reason": "x" * 201}, "plan_reason"),
        ({"client_name": "\x1b[2J"}, "client_name"),
        ({"tier": "a\nb"}, "tier"),
        ({"estimates": pb.PlanEstimates(load_ms=float("nan"))}, "load_ms"),
        ({"times": pb.RequestTimes(waited_ms=-1)}, "waited_ms"),
        ({"times": pb.RequestTimes(first_token_ms=float("inf"))}, "first_token_ms"),
    ],
)
def test_ReportRequest_refuses_invalid_fields(wire: Wire, changes: dict[str, Any], field: str) -> None:
    fields: dict[str, Any] = {"request_id": "odd", "outcome": pb.REQUEST_OUTCOME_DONE, **changes}
    with refused(InvalidRequest, "", field=field):
        wire.blocks.ReportRequest(pb.ReportRequestRequest(report=pb.RequestReport(**fields)))
    with refused(RequestNotFound, "no request with the id"):
        wire.admin.Explain(admin_pb2.ExplainRequest(request_id=fields["request_id"] or "odd"))


def test_ReportRequest_takes_times_from_before_the_epoch_as_long_ago(wire: Wire) -> None:
    report = pb.RequestReport(request_id="old", outcome=pb.REQUEST_OUTCOME_DONE, ago_ms=2**64 - 1)
    wire.blocks.ReportRequest(pb.ReportRequestRequest(report=report))
    (report,) = wire.admin.Explain(admin_pb2.ExplainRequest(request_id="old")).request.reports
    assert 0 < report.at.seconds < time.time() - 86400
