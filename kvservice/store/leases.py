"""Attached clients and their leases.

A lease keeps blocks in place for a client. It ends by release, by expiry, or with its client. From then on it is not
found. If it has many blocks, their counts are decremented over the next iterations of the event loop. The store passes
the clock, and calls `expire` four times per second.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import secrets
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from kvservice.blocks import BlockTable, Rows
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.tasks import LoopBudget, Tasks
from kvservice_api.errors import InvalidRequest, KVError, LeaseExpired, LeaseNotYours, Overloaded, UnknownClient
from kvservice_api.layout import Layout, Shard

log = logging.getLogger(__name__)

_ROWS_A_TURN = 128  # They take two milliseconds of the event loop if all of them have been discarded.
_LEASES_A_TURN = 1024
_EXPIRE_EVERY_S = 0.25


@dataclass(slots=True, eq=False)
class Client:
    """One attached client. It is removed when its Attach stream ends."""

    client_id: bytes
    name: str
    number: int  # 1 or more; no two clients of this daemon's run have the same.
    attached_at_ms: int = 0  # Of the wall clock.
    leases: set[int] = field(default_factory=set)
    leased_rows: int = 0  # A row counts once per lease and mention.
    on_detach: set[Callable[[], None]] = field(default_factory=set)  # Ends the client's other resources.


@dataclass(slots=True, frozen=True)
class Lease:
    """Blocks of a prefix that stay in their place. `parts` has the rows of blocks that are stored as several shards."""

    lease_id: int
    client: Client
    layout: Layout
    shard: Shard
    rows: Rows  # One per block: the row with the whole shard, or the first of `parts`.
    parts: dict[int, tuple[int, ...]]
    held_rows: Rows  # All rows, with parts.

    def placed(self, error: KVError, table: BlockTable) -> KVError:
        """An error of one block, with the block's position in the lease: its detail `block`. Others as they are."""
        key = error.details.get("key")
        if key is not None:  # Rows of one block have one key. In one pass, because a lease may have many blocks.
            places = np.flatnonzero(table.key[self.rows] == np.void(bytes.fromhex(key)))
            if len(places):
                return type(error)(error.message, **{**error.details, "block": int(places[0])})
        return error


class Leases:
    def __init__(
        self,
        lifecycle: BlockLifecycle,
        clock: Clock,
        counters: Counters,
        tasks: Tasks,
        loop_budget: LoopBudget,
        *,
        clients_max: int,
        per_client_max: int,
        blocks_per_client_max: int,
        ttl_max_s: float,
    ) -> None:
        self.ttl_max_s = ttl_max_s
        self._lifecycle = lifecycle
        self._tasks = tasks
        self._loop_budget = loop_budget
        self._clock = clock
        self._counters = counters
        self.clients_max = clients_max
        self._per_client_max = per_client_max
        self._blocks_per_client_max = blocks_per_client_max
        self._clients: dict[bytes, Client] = {}
        self._next_client_number = 0
        self._leases: dict[int, Lease] = {}
        self._ends_at_s: dict[int, float] = {}
        self._by_end: list[tuple[float, int]] = []  # Old entries of renewed leases stay until their time.
        self._ended_rows: deque[Rows] = deque()  # Row batches of ended leases whose counts are not decremented yet.
        self._drain: asyncio.Task[None] | None = None
        self.on_begin: Callable[[Rows], None] = _nothing  # Called with the rows of each lease that begins,
        self.on_end: Callable[[Rows], None] = _nothing  # and, in any number of parts, once it has ended.
        self._next_lease_id = secrets.randbits(48) << 8  # So that numbers of an earlier daemon are not valid here.

    @property
    def client_count(self) -> int:
        return len(self._clients)

    @property
    def count(self) -> int:
        return len(self._leases)

    def start(self) -> None:
        """End leases at their time, from now on."""
        self._tasks.start(self._expire_forever(), "lease expiry")

    async def _expire_forever(self) -> None:
        while True:
            await self._clock.sleep(_EXPIRE_EVERY_S)
            while self.expire():
                await self._loop_budget.slot()

    # Clients

    @property
    def clients(self) -> Collection[Client]:
        """Those that are attached, by the time of their attachment."""
        return self._clients.values()

    def attach(self, caller: Caller, name: str) -> Client:
        """A new client; detach it at its end. Raises InvalidRequest, Overloaded."""
        if len(name) > 200:
            raise InvalidRequest("client_name is longer than 200 characters", field="client_name")
        if len(self._clients) >= self.clients_max:
            raise Overloaded(f"{self.clients_max} clients are attached, the most that this daemon takes")
        self._next_client_number += 1
        client = Client(secrets.token_bytes(16), name, self._next_client_number, self._clock.wall_ms())
        self._clients[client.client_id] = client
        log.debug("a client is attached", extra={"client": name, "number": client.number})
        return client

    def detach(self, caller: Caller, client: Client) -> None:
        """End the client's leases and its other resources."""
        del self._clients[client.client_id]
        ends = {"client": client.name, "number": client.number, "leases": len(client.leases)}
        log.debug("a client is not attached any more: its leases end", extra=ends)
        self._end([self._leases[lease_id] for lease_id in client.leases])
        for callback in list(client.on_detach):
            callback()

    def is_attached(self, client_id: bytes) -> bool:
        return client_id in self._clients

    def client(self, caller: Caller) -> Client:
        """The caller's attached client. Raises UnknownClient."""
        client = self._clients.get(caller.client)
        if client is None:
            raise UnknownClient("no attached client has this id: attach, then ask again", field="client_id")
        return client

    def name_of(self, client_id: bytes) -> str:
        """The client's name; empty if no such client is attached."""
        client = self._clients.get(client_id)
        return client.name if client is not None else ""

    # Leases

    def grant(
        self, client: Client, layout: Layout, shard: Shard, rows: Rows, parts: dict[int, tuple[int, ...]], held: Rows,
        ttl_s: float,
    ) -> Lease:  # fmt: skip
        if len(client.leases) >= self._per_client_max:
            raise Overloaded(f"the client holds {self._per_client_max} leases, which is the maximum: release some")
        if client.leased_rows + len(held) > self._blocks_per_client_max:
            raise Overloaded(
                f"the client's leases would hold over {self._blocks_per_client_max} blocks, which is the maximum: "
                "release some"
            )
        self._next_lease_id += 1
        lease = Lease(self._next_lease_id, client, layout, shard, rows, parts, held)
        self._lifecycle.lease(held)
        self.on_begin(held)
        self._leases[lease.lease_id] = lease
        client.leases.add(lease.lease_id)
        client.leased_rows += len(held)
        self._set_end(lease.lease_id, ttl_s)
        self._counters.leases_granted += 1
        return lease

    def get(self, caller: Caller, lease_id: int) -> Lease:
        """The lease. Raises LeaseExpired once its time is over, also before `expire` has run."""
        client = self.client(caller)
        lease = self.find(lease_id)
        if lease is None:
            raise LeaseExpired("the lease has ended: look the prefix up again", lease_id=lease_id)
        if lease.client is not client:
            raise LeaseNotYours("the lease belongs to another client", lease_id=lease_id)
        return lease

    def find(self, lease_id: int) -> Lease | None:
        """The lease of this number, of any client; None once its time is over."""
        lease = self._leases.get(lease_id)
        return lease if lease is not None and self._ends_at_s[lease_id] > self._clock.monotonic_s() else None

    def end(self, lease: Lease) -> None:
        self._end([lease])

    def renew(self, caller: Caller, lease_id: int, ttl_s: float) -> float:
        """Make the lease end `ttl_s` from now, or after the longest allowed time. Returns the granted seconds.

        Raises InvalidRequest, UnknownClient, LeaseExpired, LeaseNotYours.
        """
        ttl_s = self.granted_s(ttl_s, "ttl_ms is 0; to end a lease, release it", "ttl_ms")
        self._set_end(self.get(caller, lease_id).lease_id, ttl_s)
        return ttl_s

    def granted_s(self, ttl_s: float, where_zero: str, field: str) -> float:
        """The time that a lease gets. Raises InvalidRequest, with the text `where_zero`."""
        if not ttl_s:
            raise InvalidRequest(where_zero, field=field)
        return min(ttl_s, self.ttl_max_s)

    async def release(self, caller: Caller, lease_id: int) -> None:
        """End a lease, and return once ended leases hold nothing any more. Raises LeaseNotYours."""
        self.begin_release(caller, lease_id)
        await self.drain_ended()

    def begin_release(self, caller: Caller, lease_id: int) -> None:
        """End a lease; its blocks are freed in parts that fit into one iteration of the event loop each."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return
        if lease.client.client_id != caller.client:
            raise LeaseNotYours("the lease belongs to another client", lease_id=lease_id)
        self._end([lease])

    def expire(self) -> bool:
        """End leases whose time is over, as many as fit into one iteration of the event loop. Returns whether some are
        left.
        """
        now_s = self._clock.monotonic_s()
        over: dict[int, Lease] = {}  # A renewed lease may have two entries.
        while self._by_end and self._by_end[0][0] <= now_s and len(over) < _LEASES_A_TURN:
            _, lease_id = heapq.heappop(self._by_end)
            if lease_id in self._leases and self._ends_at_s[lease_id] <= now_s:
                over[lease_id] = self._leases[lease_id]
        self._counters.leases_expired += len(over)
        self._end(over.values())
        return bool(self._by_end) and self._by_end[0][0] <= now_s

    async def drain_ended(self) -> None:
        """Wait until ended leases hold nothing any more."""
        while self._ended_rows and self._drain is not None:
            await asyncio.wait({self._drain})

    def _set_end(self, lease_id: int, ttl_s: float) -> None:
        end_s = self._clock.monotonic_s() + ttl_s
        self._ends_at_s[lease_id] = end_s
        heapq.heappush(self._by_end, (end_s, lease_id))
        if len(self._by_end) > 2 * len(self._ends_at_s) + 1024:  # Mostly entries of renewed or released leases.
            self._by_end = [(end_s, lease_id) for lease_id, end_s in self._ends_at_s.items()]
            heapq.heapify(self._by_end)

    def _end(self, leases: Collection[Lease]) -> None:
        """End all of them: a client that disconnects may have had a thousand."""
        for lease in leases:
            del self._leases[lease.lease_id]
            del self._ends_at_s[lease.lease_id]
            lease.client.leases.discard(lease.lease_id)
            lease.client.leased_rows -= len(lease.held_rows)
            self._ended_rows.append(lease.held_rows)
        if self._drain is None:
            self._unlease_batch()
            if self._ended_rows:
                self._drain = self._tasks.start(self._drain_ended_forever(), "end of leases")

    async def _drain_ended_forever(self) -> None:
        try:
            while self._ended_rows:
                await self._loop_budget.slot()
                self._unlease_batch()
        finally:
            self._drain = None

    def _unlease_batch(self) -> None:
        """A batch of ended leases whose rows fit into one iteration of the event loop."""
        room = _ROWS_A_TURN
        while self._ended_rows and room:
            rows = self._ended_rows.popleft()
            if len(rows) > room:
                self._ended_rows.appendleft(rows[room:])
            self._lifecycle.unlease(rows[:room])
            self.on_end(rows[:room])
            room -= min(room, max(len(rows), 16))  # A bound on the number of small leases.


def _nothing(rows: Rows) -> None:
    """What a lease's begin and end cause as long as nothing else is set."""
