"""Tickets: random bytes with which a connection joins its transfer, once, for a short time."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from kvservice_api.bulk import TICKET_BYTES

_REMEMBERED = 4096  # Tickets that have ended, kept only to count refusals by their reason.
_OFFERS_MAX = 1024  # Offers of transfers of one kind with open tickets. Many of them are never taken up.


class HasCaller(Protocol):
    """What a ticket is bound to."""

    client_id: bytes
    certificate: bytes  # SHA-256 of the client's certificate; empty without one.


T = TypeVar("T", bound=HasCaller)


class TicketRefused(Exception):
    """`reason` is "unknown", "used", "expired" or "foreign". The client is not told which."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True, eq=False)
class _Issue(Generic[T]):
    """What all tickets of a transfer have in common."""

    transfer: T
    expires_s: float
    is_used: bool = False  # Any of its tickets.


class _Ticket(NamedTuple, Generic[T]):
    issue: _Issue[T]
    number: int


class TransferTickets(Generic[T]):
    """All open tickets. Any thread may call it. Only digests are kept: a lookup takes the same time for each guess."""

    def __init__(self) -> None:
        self._open: dict[bytes, _Ticket[T]] = {}
        self._ended: OrderedDict[bytes, str] = OrderedDict()
        # Digests of the tickets of each, by the kind of its transfer, the oldest first.
        self._offers: defaultdict[type, deque[list[bytes]]] = defaultdict(deque)
        self._lock = threading.Lock()

    @property
    def open_count(self) -> int:
        return len(self._open)

    def issue(self, transfer: T, count: int, expires_s: float, *, is_offer: bool = False) -> list[bytes]:
        """Tickets for a transfer. Those of an offer end before their time if many more of its kind are made."""
        tickets = [secrets.token_bytes(TICKET_BYTES) for _ in range(count)]
        digests = [_digest(ticket) for ticket in tickets]
        issue = _Issue(transfer, expires_s)
        with self._lock:
            for number, digest in enumerate(digests):
                self._open[digest] = _Ticket(issue, number)
            if is_offer:
                offers = self._offers[type(transfer)]
                offers.append(digests)
                if len(offers) > _OFFERS_MAX:
                    for digest in self._open.keys() & offers.popleft():
                        self._end(digest, "expired")
        return tickets

    def use(self, ticket: bytes, client_id: bytes, certificate: bytes, now_s: float) -> tuple[T, int]:
        """The transfer, and the ticket's number in it. Raises TicketRefused. A stranger does not use it up."""
        digest = _digest(ticket)
        with self._lock:
            found = self._open.get(digest)
            if found is None:
                raise TicketRefused(self._ended.get(digest, "unknown"))
            issue = found.issue
            if (issue.transfer.client_id, issue.transfer.certificate) != (client_id, certificate):
                raise TicketRefused("foreign")
            is_late = issue.expires_s <= now_s
            issue.is_used |= not is_late
            self._end(digest, "expired" if is_late else "used")
        if is_late:
            raise TicketRefused("expired")
        return issue.transfer, found.number

    def expire(self, now_s: float) -> list[T]:
        """End the tickets whose time is over. Returns the transfers of which no ticket was used.

        A connection uses its ticket first, and joins the transfer a moment later.
        """
        with self._lock:
            over = {digest: each.issue for digest, each in self._open.items() if each.issue.expires_s <= now_s}
            for digest in over:
                self._end(digest, "expired")
            return [issue.transfer for issue in dict.fromkeys(over.values()) if not issue.is_used]

    def _end(self, digest: bytes, why: str) -> None:
        del self._open[digest]
        self._ended[digest] = why
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)


def _digest(ticket: bytes) -> bytes:
    return hashlib.sha256(ticket).digest()
