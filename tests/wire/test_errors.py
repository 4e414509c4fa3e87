"""An error's status has the same bytes in every release."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from kvservice_api import errors
from kvservice_api.status import from_status, to_status
from kvservice_api.v1 import sessions_pb2
from tests.wire.vectors import golden

ERRORS = golden("errors")


@pytest.mark.parametrize("vector", ERRORS, ids=lambda vector: vector["reason"])
class TestStatus:
    def test_it_is_the_golden_one(self, vector: dict[str, Any]) -> None:
        error = getattr(errors, vector["error"])(vector["message"], **vector["details"])

        assert to_status(error).SerializeToString(deterministic=True).hex() == vector["status"]

    def test_plain_protobuf_classes_read_it(self, vector: dict[str, Any]) -> None:
        status = status_pb2.Status.FromString(bytes.fromhex(vector["status"]))
        info = error_details_pb2.ErrorInfo()

        assert status.details[0].Unpack(info)
        assert status.code == grpc.StatusCode[vector["code"]].value[0]
        assert (status.message, info.reason, info.domain) == (vector["message"], vector["reason"], "kvservice")
        assert dict(info.metadata) == vector["details"]


def test_a_session_travels_with_SESSION_CHANGED() -> None:
    error = errors.SessionChanged("it is at revision 3", revision=3)
    error.attached = sessions_pb2.Session(session_id="chat", revision=3)
    status = to_status(error)
    plain = sessions_pb2.Session()

    assert any(detail.Unpack(plain) for detail in status.details)
    assert plain == error.attached
    assert from_status(status).attached == error.attached
