"""The error table, and errors after a transfer over the wire."""

from __future__ import annotations

import re
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from kvservice_api import errors
from kvservice_api.errors import DaemonUnavailable, InvalidRequest, KVError
from kvservice_api.status import from_rpc_error, from_status, to_status

TABLE = re.findall(r"^ +x (\w+) +([A-Z_]+) +\S", errors.__doc__ or "", re.MULTILINE)
KINDS = list(KVError.by_reason.values())


def test_the_table_in_the_docstring_names_every_error_with_its_code() -> None:
    assert [(kind.__name__, kind.code.name) for kind in KINDS] == TABLE


def test_errors_stand_in_the_table_code_by_code() -> None:
    codes = [code for _, code in TABLE]

    assert codes == sorted(codes, key=codes.index)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
class TestEveryError:
    def test_survives_the_wire(self, kind: type[KVError]) -> None:
        data = to_status(kind("what happened", field="keys", size=7)).SerializeToString()

        error = from_status(status_pb2.Status.FromString(data))

        assert type(error) is kind
        assert error.message == str(error) == "what happened"
        assert error.details == {"field": "keys", "size": "7"}

    def test_carries_a_code_that_grpc_knows_and_a_reason_derived_from_its_name(self, kind: type[KVError]) -> None:
        assert code_pb2.Code.Name(to_status(kind("")).code) == kind.code.name
        assert kind.reason.replace("_", "") == kind.__name__.upper()

    def test_says_when_to_retry_where_waiting_helps(self, kind: type[KVError]) -> None:
        retry = error_details_pb2.RetryInfo.DESCRIPTOR
        retries = [detail for detail in to_status(kind("")).details if detail.Is(retry)]

        assert len(retries) == (kind.retry_after_s is not None)

    def test_says_in_one_sentence_what_has_happened(self, kind: type[KVError]) -> None:
        assert kind.__doc__
        assert kind.__doc__.endswith(".")


def status_with(reason: str, domain: str, code: grpc.StatusCode) -> status_pb2.Status:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
    return status_pb2.Status(code=code.value[0], message="m", details=[detail])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "InvalidRequest"),
        (grpc.StatusCode.NOT_FOUND, "BlockNotFound"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Overloaded"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DeadlineExceeded"),
        (grpc.StatusCode.UNIMPLEMENTED, "DaemonUnavailable"),
        (grpc.StatusCode.UNKNOWN, "DaemonUnavailable"),
    ],
)
def test_an_unknown_reason_becomes_the_nearest_error_of_its_code(code: grpc.StatusCode, expected: str) -> None:
    error = from_status(status_with("REASON_OF_A_LATER_VERSION", "kvservice", code))

    assert type(error).__name__ == expected


def test_a_reason_of_another_domain_is_not_ours() -> None:
    status = status_with("BLOCK_NOT_FOUND", "example.com", grpc.StatusCode.UNAVAILABLE)

    assert type(from_status(status)) is DaemonUnavailable


class FailedCall(grpc.RpcError):
    """A call as grpc raises it: the error is also the call."""

    def __init__(self, code: grpc.StatusCode, status: status_pb2.Status | None) -> None:
        self._code, self._status = code, status

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._status.message if self._status else None

    def trailing_metadata(self) -> Any:
        return (("grpc-status-details-bin", self._status.SerializeToString()),) if self._status else ()


def test_a_failed_call_becomes_the_error_in_its_status() -> None:
    status = to_status(InvalidRequest("keys is empty", field="keys"))

    error = from_rpc_error(FailedCall(grpc.StatusCode.INVALID_ARGUMENT, status))

    assert type(error) is InvalidRequest
    assert error.details == {"field": "keys"}


def test_a_failed_call_without_status_becomes_the_nearest_error_of_its_code() -> None:
    assert type(from_rpc_error(FailedCall(grpc.StatusCode.UNAVAILABLE, None))) is DaemonUnavailable


def test_a_status_that_contradicts_the_call_is_not_trusted() -> None:
    status = to_status(InvalidRequest("keys is empty"))

    assert type(from_rpc_error(FailedCall(grpc.StatusCode.UNAVAILABLE, status))) is DaemonUnavailable
