"""What every RPC has around its handler: its caller, statuses for errors, so that handlers need no ``try``, counts."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from kvservice.store.caller import DEFAULT_TENANT, Caller
from kvservice.store.store import BlockStore
from kvservice.store.tasks import LoopBudget
from kvservice_api import spans
from kvservice_api.errors import (
    INTERNAL,
    ChecksumMismatch,
    DeadlineExceeded,
    IndexFull,
    InvalidRequest,
    KVError,
    Overloaded,
    PinsFull,
    SessionsFull,
    StorageFailed,
    TierFull,
    UnknownClient,
)
from kvservice_api.status import grpc_code, to_status

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Unary = Callable[[Any, Context], Awaitable[Any]]

_LOADS = ("LoadBlocks", "LocateBlocks", "LoadToDevice")
_TIER_USERS = (*_LOADS, "SaveBlocks", "ReserveBlocks", "CommitBlocks", "SaveFromDevice", "Prefetch", "Pin")
_SESSION_WRITERS = ("AppendTurn", "TruncateSession", "ForkSession", "RestoreSession")
_INDEX_WRITERS = (
    *(*_SESSION_WRITERS, "EndSession", "OpenLayout", "BeginGeneration"),
    *("SaveBlocks", "CommitBlocks", "SaveFromDevice", "Prefetch", "Evict", "Discard", "Drain", "Pin", "Unpin"),
)
# Reasons that the alert KVServiceCallsFail is about, and the methods that can end with them. INTERNAL and OVERLOADED
# are reasons of all methods.
ALERTED: Mapping[str, tuple[str, ...]] = {
    ChecksumMismatch.reason: _TIER_USERS,
    DeadlineExceeded.reason: _LOADS,
    IndexFull.reason: _INDEX_WRITERS,
    PinsFull.reason: ("Pin",),
    SessionsFull.reason: _SESSION_WRITERS,
    StorageFailed.reason: tuple(dict.fromkeys((*_TIER_USERS, *_INDEX_WRITERS))),
    TierFull.reason: _TIER_USERS,
}
DETAILS_KEY = "grpc-status-details-bin"
_LOCAL = "local"
_ANONYMOUS = "anonymous"
# Properties of a verified client certificate in gRPC, the most specific first. The whole subject, not its common name
# alone: certificates of several organisations may share a common name.
_NAMES = ("peer_spiffe_id", "x509_subject", "x509_subject_alternative_name", "x509_common_name")


@dataclass(frozen=True, slots=True)
class BulkContext:
    """Stands for the context of a call that has come on the bulk port. Its caller was found out over gRPC before."""

    principal: str
    certificate: bytes  # SHA-256 of the one that the client has shown; empty if it needs none.


class Callers:
    """Makes the callers of requests; no other code does. The store knows which clients are attached."""

    def __init__(self, store: BlockStore) -> None:
        self._leases = store.leases

    def of(self, context: Context, client_id: bytes = b"") -> Caller:
        """The caller of a request that names this client, or none. Raises UnknownClient if it is not attached."""
        if client_id and not self._leases.is_attached(client_id):
            raise UnknownClient("no attached client has this id: attach, then ask again", field="client_id")
        name = (
            context.principal if isinstance(context, BulkContext) else principal(context.peer(), context.auth_context())
        )
        return Caller(name, DEFAULT_TENANT, client_id)


def principal(peer: str, auth_context: Mapping[str, Iterable[bytes]]) -> str:
    """The name in the client's verified certificate, or what is known without one.

    gRPC does not give the uid of a UNIX socket's peer, so every process that may open the socket is "local".
    """
    for name in _NAMES:
        for value in auth_context.get(name, ()):
            if value:
                return value.decode("utf-8", "backslashreplace")
    return _LOCAL if peer.startswith("unix:") else _ANONYMOUS


def certificate_of(context: Context) -> bytes:
    """SHA-256 of the certificate that the client of this call has shown; empty if it needs none."""
    if isinstance(context, BulkContext):
        return context.certificate
    pem = next(iter(context.auth_context().get("x509_pem_cert", ())), b"")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode())).digest() if pem else b""


class CallCounts:
    """Counts calls by method. The metrics read the counts on other threads."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()  # By method and gRPC status code.
        # By method and reason: of `errors.py`, or INTERNAL. A call that its client cancels is no error: each load in
        # place ends so.
        self.errors: Counter[tuple[str, str]] = Counter()

    def add_method(self, method: str) -> None:
        """Count it from now on, from zero. Prometheus sees no increase in the first value of a series."""
        self.running[method] = self.ended[method, "OK"] = 0
        reasons = (reason for reason, methods in ALERTED.items() if method in methods)
        for reason in (INTERNAL, Overloaded.reason, *reasons):
            self.errors[method, reason] = 0

    def end(self, method: str, code: str, reason: str) -> None:
        """Without a `reason` it was no error."""
        self.running[method] -= 1
        self.ended[method, code] += 1
        if reason:
            self.errors[method, reason] += 1


def guarded(
    handler: Unary,
    counts: CallCounts,
    loop_budget: LoopBudget,
    parse: Callable[[bytes], Any] | None = None,
    *,
    span_name: str = "",
) -> Unary:
    """A handler that answers once or writes to its context, its errors turned into statuses, and counted. It begins
    with a slot of `loop_budget`: many calls that come at once would be one long turn of the event loop.

    `parse` reads the request of a unary call here, because a parse error inside grpc gives the caller no reason. With
    a `span_name`, calls of clients that record a trace have a span of this name in it.
    """
    method = handler.__name__
    counts.add_method(method)

    @functools.wraps(handler)
    async def call(request: Any, context: Context) -> Any:
        code, reason = "CANCELLED", ""
        counts.running[method] += 1
        span = spans.of_call(span_name, context.invocation_metadata() or ()) if span_name else None
        try:
            await loop_budget.slot()
            answer = await handler(request if parse is None else parse(request), context)
            code = "OK"
            return answer
        except KVError as error:
            code, reason = error.code.name, error.reason
            await _abort(context, error)
        except DecodeError as error:
            refusal = InvalidRequest(f"a request of {method} is malformed: {error}")
            code, reason = refusal.code.name, refusal.reason
            await _abort(context, refusal)
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError as error:
            # A write failed because the client has disconnected: no error for the log, and no client to answer.
            raise asyncio.CancelledError from error
        except Exception:  # A bug of the daemon: it ends this call only, with its traceback in the log.
            code = reason = INTERNAL
            log.exception("a handler failed: %s", method)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; the daemon's log has the details")
        finally:
            counts.end(method, code, reason)
            if span is not None:
                span.end_call(code, reason)

    return call


async def _abort(context: Context, error: KVError) -> NoReturn:
    details = ((DETAILS_KEY, to_status(error).SerializeToString()),)
    await context.abort(grpc_code(error), error.message, details)
    raise AssertionError("abort raises")
