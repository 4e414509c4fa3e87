"""What can go wrong, the status it travels as, and what the caller does next.

* KVError
  x InvalidRequest     INVALID_ARGUMENT     fix the caller; the message names the field
  x InvalidLayout      INVALID_ARGUMENT     fix the caller; the message names the dimension
  x InvalidFrame       INVALID_ARGUMENT     fix the caller; nothing of the save was kept
  x IncompleteSave     FAILED_PRECONDITION  send all of it, then commit; nothing was kept
  x LayoutMismatch     FAILED_PRECONDITION  update the older side; retrying cannot help
  x UnknownLayout      FAILED_PRECONDITION  call OpenLayout, then ask again
  x UnknownClient      FAILED_PRECONDITION  attach again, then ask again
  x LeaseExpired       FAILED_PRECONDITION  look the prefix up again
  x ScrubRunning       FAILED_PRECONDITION  wait for the scrub that runs
  x TlsFileUnusable    FAILED_PRECONDITION  correct the file that the message names
  x NotShared          FAILED_PRECONDITION  use a transport that needs no shared memory
  x DeviceUnavailable  FAILED_PRECONDITION  use a transport that needs no CUDA
  x BulkUnavailable    FAILED_PRECONDITION  use a transport that needs no bulk port
  x TransferEnded      FAILED_PRECONDITION  open another transfer, or use another transport
  x RegistrationEnded  FAILED_PRECONDITION  register the GPU memory again
  x NoWriterLock       FAILED_PRECONDITION  lock your file beside the arena, then ask again
  x ReservationEnded   FAILED_PRECONDITION  reserve again, and write again
  x TicketForeign      FAILED_PRECONDITION  look the prefix up on this daemon
  x TicketExpired      FAILED_PRECONDITION  look the prefix up again, or ask the exporter for another ticket
  x TicketSpent        FAILED_PRECONDITION  look the prefix up again; export with as many adoptions as there are ranks
  x TicketLayoutMismatch FAILED_PRECONDITION adopt with the layout that the exporter looked up
  x DaemonTooOld       FAILED_PRECONDITION  upgrade the daemon
  x TicketForged       PERMISSION_DENIED    pass on the exporter's bytes unchanged; else look the prefix up again
  x TicketNotYours     PERMISSION_DENIED    use a ticket of your own tenant
  x LeaseNotYours      PERMISSION_DENIED    use the lease of your own lookup
  x ReservationNotYours PERMISSION_DENIED   use the reservation that you made
  x BlockNotFound      NOT_FOUND            recompute
  x RequestNotFound    NOT_FOUND            ask for a later one; only the last lookups are remembered
  x SessionNotFound    NOT_FOUND            begin it again: append the whole conversation
  x SessionChanged     ABORTED              continue from the session in this error
  x TierFull           RESOURCE_EXHAUSTED   skip this save; a cache is allowed to be full
  x IndexFull          RESOURCE_EXHAUSTED   skip this save; raise the index's map size or index.layouts_max
  x PinsFull           RESOURCE_EXHAUSTED   unpin others first, or raise pins.fraction_max
  x SessionsFull       RESOURCE_EXHAUSTED   continue without a session; end or truncate some
  x Overloaded         RESOURCE_EXHAUSTED   recompute, or retry after the time given
  x ChecksumMismatch   DATA_LOSS            recompute; the daemon has dropped the block
  x UploadCorrupted    DATA_LOSS            send the block again
  x StorageFailed      UNAVAILABLE          recompute; retry later, the operator's log says more
  x Draining           UNAVAILABLE          skip this save; attach again later
  x DaemonUnavailable  UNAVAILABLE          recompute; the client reconnects on its own
  x DeadlineExceeded   DEADLINE_EXCEEDED    recompute
  x Cancelled          CANCELLED            nothing: this process has cancelled the lease's transfers itself

On the wire (``kvservice_api/status.py``) an error is its status code, its message, and a ``google.rpc.ErrorInfo`` with
the domain "kvservice" and the reason derived from the class name. Where waiting helps there is a
``google.rpc.RetryInfo`` too; SessionChanged brings the ``Session`` as it is now.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from kvservice_api.v1 import sessions_pb2


INTERNAL = "INTERNAL"  # Counted as the reason of an exception that is no KVError.


class Code(IntEnum):
    """The status codes of gRPC that our errors travel as: names and numbers of ``google.rpc.Code``."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNAVAILABLE = 14
    DATA_LOSS = 15


class KVError(Exception):
    """Base of every expected failure. Anything else reaching the wire is our bug.

    ``details`` are short strings that travel beside the message, such as the offending field.
    """

    code: ClassVar[Code]
    reason: ClassVar[str]  # Travels as ErrorInfo.reason; derived below, so it cannot drift.
    by_reason: ClassVar[dict[str, type[KVError]]] = {}
    retry_after_s: float | None = None
    attached: Any = None  # A protobuf message that travels along, or None: `kvservice_api.status` names its type.

    def __init_subclass__(cls, code: Code) -> None:
        cls.code = code
        cls.reason = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).upper()
        cls.by_reason[cls.reason] = cls

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = {name: str(value) for name, value in details.items()}


class InvalidRequest(KVError, code=Code.INVALID_ARGUMENT):
    """A field is missing, malformed or out of range."""


class InvalidLayout(KVError, code=Code.INVALID_ARGUMENT):
    """A layout's dimension is zero, too large, or contradicts another."""


class InvalidFrame(KVError, code=Code.INVALID_ARGUMENT):
    """A frame is out of range, overlaps another, is too large, or is cut off."""


class IncompleteSave(KVError, code=Code.FAILED_PRECONDITION):
    """A save was committed before all its bytes arrived, or ended without a commit."""


class LayoutMismatch(KVError, code=Code.FAILED_PRECONDITION):
    """A fingerprint is not that of the layout in the same message."""


class UnknownLayout(KVError, code=Code.FAILED_PRECONDITION):
    """No layout with this fingerprint was opened in this store."""


class UnknownClient(KVError, code=Code.FAILED_PRECONDITION):
    """The client is not attached, or no longer."""


class LeaseExpired(KVError, code=Code.FAILED_PRECONDITION):
    """The lease has ended, or there never was one of this number."""


class ScrubRunning(KVError, code=Code.FAILED_PRECONDITION):
    """Another scrub is under way."""


class TlsFileUnusable(KVError, code=Code.FAILED_PRECONDITION):
    """A certificate, key or CA file of the client cannot be used. Raised on the client's side only."""


class NotShared(KVError, code=Code.FAILED_PRECONDITION):
    """The arena cannot be read or written in place: by this client, or by any."""


class DeviceUnavailable(KVError, code=Code.FAILED_PRECONDITION):
    """The daemon cannot use CUDA, its copy failed, or the client cannot export its GPU memory."""


class BulkUnavailable(KVError, code=Code.FAILED_PRECONDITION):
    """The daemon has no bulk port, or the client cannot reach it."""


class TransferEnded(KVError, code=Code.FAILED_PRECONDITION):
    """No transfer waits for the ticket: it was used, has expired, is another client's, or a connection was lost."""


class RegistrationEnded(KVError, code=Code.FAILED_PRECONDITION):
    """The client has no registration of GPU memory with this number: it has ended, or never was."""


class NoWriterLock(KVError, code=Code.FAILED_PRECONDITION):
    """The client does not hold the lock by which the daemon knows that it may be writing."""


class ReservationEnded(KVError, code=Code.FAILED_PRECONDITION):
    """The reservation was committed or abandoned, ended with its client, or never was."""


class TicketForeign(KVError, code=Code.FAILED_PRECONDITION):
    """The lease ticket was made by another daemon, or by this one before it restarted."""


class TicketExpired(KVError, code=Code.FAILED_PRECONDITION):
    """The time of the lease ticket is over, and its blocks are no longer held for it."""


class TicketSpent(KVError, code=Code.FAILED_PRECONDITION):
    """The lease ticket was adopted the maximum number of times that its exporter allowed."""


class TicketLayoutMismatch(KVError, code=Code.FAILED_PRECONDITION):
    """The lease ticket is for blocks of another layout than the one that it was adopted with."""


class DaemonTooOld(KVError, code=Code.FAILED_PRECONDITION):
    """The daemon's version does not have what this call needs. Raised on the client's side only."""


class TicketForged(KVError, code=Code.PERMISSION_DENIED):
    """The bytes are no lease ticket of this daemon: they were cut off, changed, or invented."""


class TicketNotYours(KVError, code=Code.PERMISSION_DENIED):
    """The lease ticket belongs to another tenant."""


class LeaseNotYours(KVError, code=Code.PERMISSION_DENIED):
    """The lease belongs to another client."""


class ReservationNotYours(KVError, code=Code.PERMISSION_DENIED):
    """The reservation belongs to another client."""


class BlockNotFound(KVError, code=Code.NOT_FOUND):
    """Nothing is stored under this key."""


class RequestNotFound(KVError, code=Code.NOT_FOUND):
    """No lookup with this request id is remembered."""


class SessionNotFound(KVError, code=Code.NOT_FOUND):
    """There is no such session: it was never begun, was ended, or was not used for its time to live."""


class SessionChanged(KVError, code=Code.ABORTED):
    """The session is not at the revision that the caller expected, or exists already."""

    attached: sessions_pb2.Session | None = None
    now: Any = None  # Inside the daemon: the session as the store keeps it, of which `attached` is made.


class TierFull(KVError, code=Code.RESOURCE_EXHAUSTED):
    """A tier has no space, and nothing in it may be evicted now."""


class IndexFull(KVError, code=Code.RESOURCE_EXHAUSTED):
    """The index has no space for another record, or for another layout."""


class PinsFull(KVError, code=Code.RESOURCE_EXHAUSTED):
    """The blocks would take more of their tier than pins may."""


class SessionsFull(KVError, code=Code.RESOURCE_EXHAUSTED):
    """A limit on sessions, or on the slices of one session, is reached."""


class Overloaded(KVError, code=Code.RESOURCE_EXHAUSTED):
    """A limit on clients, leases or running transfers is reached."""

    retry_after_s = 1.0


class ChecksumMismatch(KVError, code=Code.DATA_LOSS):
    """Stored bytes are not those that were saved. The block has been dropped."""

    # In a load or a view the detail `block` is the block's position in the lease. So it is with StorageFailed.


class UploadCorrupted(KVError, code=Code.DATA_LOSS):
    """The bytes of an upload do not match the checksums of its commit."""


class StorageFailed(KVError, code=Code.UNAVAILABLE):
    """The operating system refused to read or write a tier or the index."""


class Draining(KVError, code=Code.UNAVAILABLE):
    """The daemon is stopping and accepts no new saves."""


class DaemonUnavailable(KVError, code=Code.UNAVAILABLE):
    """The client cannot reach the daemon. Raised on the client's side only."""


class DeadlineExceeded(KVError, code=Code.DEADLINE_EXCEEDED):
    """The caller's deadline has passed, or the client did not read for as long as the daemon waits."""


class Cancelled(KVError, code=Code.CANCELLED):
    """Another thread has cancelled the load or view. Raised on the client's side only."""
