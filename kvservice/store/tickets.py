"""Lease tickets: bytes with which other clients of this daemon adopt the blocks of a lease.

A ticket holds the blocks with a lease of its own, which belongs to no client: from the export until the ticket expires,
or until it was adopted the maximum number of times. So the blocks of a valid ticket are never evicted, also if the
exporter ends. The bytes of a ticket are::

    0           4            8                16               24                 32
    | "KVT1"    | tenant u32 | boot epoch u64 | number u64     | expires at u64   |
    32                                        64                                  96
    | layout fingerprint, 32 bytes            | HMAC-SHA256 over all before it    |

Little-endian. The number is that of the ticket's own lease; the time is in milliseconds of the store's monotonic
clock. The key of the HMAC is drawn when the daemon starts and never leaves it. Only this process reads tickets.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from typing import NamedTuple

from kvservice.blocks import BlockTable
from kvservice.clock import Clock
from kvservice.store.caller import Caller
from kvservice.store.leases import Client, Lease, Leases
from kvservice.store.mover.promoter import Promoter
from kvservice.store.operations.requests import Requests
from kvservice.store.prefix_match import Run, narrowed, runs_of
from kvservice.store.tasks import LoopBudget
from kvservice_api.errors import (
    InvalidRequest,
    Overloaded,
    TicketExpired,
    TicketForeign,
    TicketForged,
    TicketLayoutMismatch,
    TicketNotYours,
    TicketSpent,
)
from kvservice_api.layout import Shard

TICKET_BYTES = 96
ADOPTIONS_MAX = 4096

_FIELDS = struct.Struct("<4sIQQQ32s")
_MAGIC = b"KVT1"
_MAC = "sha256"
_MAC_BYTES = 32
assert _FIELDS.size + _MAC_BYTES == TICKET_BYTES


class _Ticket(NamedTuple):
    magic: bytes
    tenant: int
    boot_epoch: int
    number: int
    expires_at_ms: int
    fingerprint: bytes


class Adopted(NamedTuple):
    """An adopted lease, its granted time, the tiers of its blocks, and the token count of each."""

    lease: Lease
    ttl_s: float
    runs: list[Run]
    token_counts: list[int]


class Tickets:
    """Exports leases as tickets, and grants leases for tickets."""

    def __init__(
        self,
        leases: Leases,
        blocks: BlockTable,
        requests: Requests,
        promoter: Promoter | None,
        clock: Clock,
        loop_budget: LoopBudget,
        *,
        boot_epoch: int,
    ) -> None:
        self._leases = leases
        self._blocks = blocks
        self._requests = requests
        self._promoter = promoter
        self._clock = clock
        self._loop_budget = loop_budget
        self._boot_epoch = boot_epoch
        self._secret = secrets.token_bytes(32)
        # Per exporting client, a client that owns the leases of its tickets, so that the limits of one client bound
        # them. It is not attached, so no request can name it, and it outlives the exporter.
        self._holders: dict[bytes, Client] = {}
        self._adoptions_left: dict[int, int] = {}  # Ticket number -> remaining adoptions.
        self._forget_at = 64

    def export(self, caller: Caller, lease_id: int, ttl_s: float, adoptions: int) -> tuple[bytes, float]:
        """A ticket for the lease's blocks, which does not depend on the lease, and the seconds for which it holds them.

        A ticket is made for a load that is about to come: blocks that DRAM lacks are promoted from now on.
        Raises InvalidRequest, LeaseExpired, LeaseNotYours, UnknownClient; Overloaded if this client's open tickets hold
        as many leases or blocks as one client may.
        """
        ttl_s = self._leases.granted_s(ttl_s, "ttl_ms is 0", "ttl_ms")
        if not 1 <= adoptions <= ADOPTIONS_MAX:
            raise InvalidRequest(f"adoptions is {adoptions}; it must be in 1..{ADOPTIONS_MAX}", field="adoptions")
        lease = self._leases.get(caller, lease_id)
        self._forget_expired()
        holder = self._holders.setdefault(caller.client, Client(b"", "lease tickets", 0))
        expires_at_ms = int((self._clock.monotonic_s() + ttl_s) * 1000)  # Rounded down: not after the hold's end.
        try:
            held = self._leases.grant(
                holder, lease.layout, lease.shard, lease.rows, lease.parts, lease.held_rows, ttl_s
            )
        except Overloaded as error:
            raise Overloaded(
                "this client's open tickets hold the maximum of leases or blocks: wait until some are adopted "
                "or have expired"
            ) from error
        self._adoptions_left[held.lease_id] = adoptions
        self._requests.follow(lease.lease_id, held.lease_id)
        missing = held.held_rows[~self._blocks.lie_in(held.held_rows, self._blocks.first_tier)].tolist()
        if missing and self._promoter is not None:
            self._promoter.prefetch(missing, within_s=0.0)
        ticket = _Ticket(
            _MAGIC, caller.tenant.number, self._boot_epoch, held.lease_id, expires_at_ms, lease.layout.fingerprint
        )
        return self._encode(ticket), ttl_s

    async def adopt(
        self, caller: Caller, ticket: bytes, fingerprint: bytes, shard: Shard | None, lease_ttl_s: float
    ) -> Adopted:
        """A lease of the caller's own on the ticket's blocks, for a shard within the exported one.

        Raises the errors of `_held`, InvalidRequest, UnknownClient, Overloaded. A refused adoption does not count.
        """
        ttl_s = self._leases.granted_s(lease_ttl_s, "lease_ttl_ms is 0", "lease_ttl_ms")
        client = self._leases.client(caller)
        number, held = self._held(caller, ticket, fingerprint)
        part = held
        if shard is not None and shard != held.shard:
            part = await narrowed(self._blocks, held, shard, self._loop_budget)
        # Check the ticket and the client again: other tasks ran meanwhile.
        client = self._leases.client(caller)
        self._held(caller, ticket, fingerprint)
        lease = self._leases.grant(client, part.layout, part.shard, part.rows, part.parts, part.held_rows, ttl_s)
        self._requests.follow(number, lease.lease_id)
        self._adoptions_left[number] -= 1
        if not self._adoptions_left[number]:
            del self._adoptions_left[number]
            self._leases.end(held)
        return Adopted(lease, ttl_s, runs_of(self._blocks, lease.rows), self._blocks.token_count[lease.rows].tolist())

    def _held(self, caller: Caller, data: bytes, fingerprint: bytes) -> tuple[int, Lease]:
        """The ticket's number and its own lease.

        Raises TicketForged, TicketForeign, TicketNotYours, TicketLayoutMismatch, TicketExpired, TicketSpent.
        """
        ticket = self._decode(data)
        if ticket.tenant != caller.tenant.number:
            raise TicketNotYours("the ticket belongs to another tenant")
        if ticket.fingerprint != fingerprint:
            raise TicketLayoutMismatch(
                f"the ticket is for the layout {ticket.fingerprint.hex()}, not {fingerprint.hex() or '(empty)'}"
            )
        if ticket.expires_at_ms <= self._clock.monotonic_s() * 1000:
            raise TicketExpired("the ticket has expired: look the prefix up again")
        held = self._leases.find(ticket.number)
        if held is None or ticket.number not in self._adoptions_left:
            raise TicketSpent("the ticket was adopted as often as its exporter allowed")
        return ticket.number, held

    def _encode(self, ticket: _Ticket) -> bytes:
        fields = _FIELDS.pack(*ticket)
        return fields + hmac.digest(self._secret, fields, _MAC)

    def _decode(self, data: bytes) -> _Ticket:
        if len(data) != TICKET_BYTES or not data.startswith(_MAGIC):
            raise TicketForged(f"these {len(data)} bytes are no lease ticket")
        fields, mac = data[: _FIELDS.size], data[_FIELDS.size :]
        ticket = _Ticket(*_FIELDS.unpack(fields))
        if ticket.boot_epoch != self._boot_epoch:
            raise TicketForeign("the ticket is another daemon's, or from before this daemon's restart")
        if not hmac.compare_digest(mac, hmac.digest(self._secret, fields, _MAC)):
            raise TicketForged("this daemon did not issue this ticket: its bytes were changed or invented")
        return ticket

    def _forget_expired(self) -> None:
        """Drop the entries of expired tickets, once there are twice as many entries as tickets."""
        if len(self._adoptions_left) + len(self._holders) < self._forget_at:
            return
        self._holders = {client: holder for client, holder in self._holders.items() if holder.leases}
        open_tickets = {number for holder in self._holders.values() for number in holder.leases}
        self._adoptions_left = {number: left for number, left in self._adoptions_left.items() if number in open_tickets}
        self._forget_at = 2 * (len(self._adoptions_left) + len(self._holders)) + 64
