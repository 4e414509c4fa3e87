"""Errors on the wire: converts a KVError to a ``google.rpc.Status``, and back.

Except for the generated stubs, no other module of the package needs gRPC. ``errors.py`` defines the errors.
"""

from __future__ import annotations

from typing import Any

import kvservice_api.grpc_forks  # isort: skip  # noqa: F401  # Before any other import of gRPC.

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvservice_api.errors import (
    BlockNotFound,
    Code,
    DaemonUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    KVError,
    Overloaded,
    SessionChanged,
)
from kvservice_api.v1 import sessions_pb2

DOMAIN = "kvservice"
_ATTACHED: dict[type[KVError], type[Message]] = {SessionChanged: sessions_pb2.Session}


def to_status(error: KVError) -> status_pb2.Status:
    """The error as a ``google.rpc.Status``."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.details)
    details = [_packed(info)]
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_packed(retry))
    if error.attached is not None:
        details.append(_packed(error.attached))
    return status_pb2.Status(code=error.code, message=error.message, details=details)


def grpc_code(error: KVError) -> grpc.StatusCode:
    """The status code of a call that fails with this error."""
    return grpc.StatusCode[error.code.name]


def from_status(status: status_pb2.Status) -> KVError:
    """The error in a status. An unknown reason becomes the nearest class for its code."""
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            kind = KVError.by_reason.get(info.reason)
            if kind is not None:
                error = kind(status.message, **dict(info.metadata))
                error.attached = _attached(kind, status)
                return error
    return _by_code(status.code, status.message)


def from_rpc_error(error: grpc.RpcError) -> KVError:
    """The error of a failed call."""
    call: Any = error  # grpc raises objects that are both RpcError and Call; its types do not say so.
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # Code and message contradict the details: trust neither, keep the code.
        status = None
    if status is not None:
        return from_status(status)
    return _by_code(call.code().value[0], call.details() or "")


_BY_CODE: dict[int, type[KVError]] = {
    Code.INVALID_ARGUMENT: InvalidRequest,
    Code.DEADLINE_EXCEEDED: DeadlineExceeded,
    Code.RESOURCE_EXHAUSTED: Overloaded,
    Code.NOT_FOUND: BlockNotFound,
}


def _by_code(code: int, message: str) -> KVError:
    # Without a KVService reason the peer is another program, a proxy, or gone: the daemon is not available.
    return _BY_CODE.get(code, DaemonUnavailable)(message)


def _attached(kind: type[KVError], status: status_pb2.Status) -> Message | None:
    if kind not in _ATTACHED:
        return None
    message = _ATTACHED[kind]()
    return next((message for detail in status.details if detail.Unpack(message)), None)


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message, deterministic=True)
    return packed
