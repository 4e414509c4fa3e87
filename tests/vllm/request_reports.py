"""Reports of requests, as an operator sees them in `kvctl explain`."""

from __future__ import annotations

from contextlib import suppress

from kvservice_api.errors import RequestNotFound
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import Client
from tests.daemon import until


def report_of(client: Client, request_id: str) -> pb.RequestReport:
    """The report of a request, once it has arrived."""
    reports: list[pb.RequestReport] = []

    def has_arrived() -> bool:
        with suppress(RequestNotFound):
            reports.extend(each.report for each in client.admin.explain_request(request_id).reports)
        return bool(reports)

    until(has_arrived)
    (report,) = reports
    return report
