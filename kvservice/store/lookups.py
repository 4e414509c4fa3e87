"""Lookups of prefixes, and what engines report of the requests that made them.

Called on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvservice.blocks import BlockTable, Rows
from kvservice.clock import Clock
from kvservice.index.block_index import BlockIndex
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.leases import Client, Lease, Leases
from kvservice.store.mover.active_policy import ActivePolicy
from kvservice.store.operations.lookup_counts import LookupCounts
from kvservice.store.operations.requests import ReportRecord, Requests
from kvservice.store.operations.trace import TraceRecorder
from kvservice.store.prefix_match import PrefixMatch, Run, Tail, match_prefix, match_tails, runs_of
from kvservice.store.tasks import LoopBudget
from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import KEY_BYTES
from kvservice_api.layout import Layout, Shard

_KEYS_A_TURN = 512


class Hit(NamedTuple):
    """The answer to a lookup. `runs` are over the leading hits; `ttl_s` is the granted time of the lease; `tails`
    continue the last hit.
    """

    blocks: int
    runs: list[Run]
    lease: Lease | None
    ttl_s: float = 0.0
    tails: Sequence[Tail] = ()


class Lookups:
    def __init__(
        self,
        blocks: BlockTable,
        index: BlockIndex,
        lifecycle: BlockLifecycle,
        leases: Leases,
        policy: ActivePolicy,
        requests: Requests,
        trace: TraceRecorder,
        clock: Clock,
        counts: LookupCounts,
        loop_budget: LoopBudget,
    ) -> None:
        self._blocks = blocks
        self._index = index
        self._lifecycle = lifecycle
        self._leases = leases
        self._policy = policy
        self._requests = requests
        self._trace = trace
        self._clock = clock
        self._counts = counts
        self._loop_budget = loop_budget

    async def lookup(
        self,
        caller: Caller,
        fingerprint: bytes,
        shard: Shard | None,
        keys: Sequence[bytes],
        lease_ttl_s: float,
        request_id: str = "",
        parent_key: bytes = b"",
        later: Callable[[Callable[[], None]], object] | None = None,
    ) -> Hit:
        """How many leading blocks are stored; leases them if `lease_ttl_s` is not 0. Waits only if there are many keys.

        With a `request_id`, the lookup and its result are noted for `explain`. With the `parent_key` of the first key,
        the answer has the tails of the last hit. What the answer of a leased hit does not need, the use of the blocks
        and the counts, is noted by a function that is passed to `later`, if there is one. It calls the function soon:
        other requests may begin before, and the lease may have ended. Raises InvalidRequest, UnknownLayout,
        UnknownClient, Overloaded.
        """
        began_s = self._clock.monotonic_s()
        self._requests.check_id(request_id)
        if len(parent_key) not in (0, KEY_BYTES):
            raise InvalidRequest(f"parent_key has {len(parent_key)} bytes, not {KEY_BYTES}", field="parent_key")
        layout_id, layout = self._index.find_layout(fingerprint)
        wanted = Shard.whole(layout) if shard is None else shard.check(layout)
        found, held = PrefixMatch(), []
        parts = range(0, len(keys), _KEYS_A_TURN)
        try:
            for start in parts:
                if len(parts) > 1:
                    await self._loop_budget.slot()
                part = keys[start : start + _KEYS_A_TURN]
                more = match_prefix(self._blocks, part, layout_id, wanted)
                if len(parts) > 1:  # Other tasks run in between: the hits stay in place until all of them are leased.
                    self._lifecycle.hold(more.held)
                    held.append(more.held)
                found.extend(more)
                if len(more.rows) < len(part):
                    break
            if len(parts) > 1:
                await self._loop_budget.slot()
            client = self._leases.client(caller) if lease_ttl_s else None
            hit = self._hit(client, layout, wanted, found, lease_ttl_s)
            self._note(request_id, caller, layout_id, wanted, keys, hit)
            if parent_key:
                newest_first = self._lifecycle.tails.newest_first(keys[hit.blocks - 1] if hit.blocks else parent_key)
                tails = match_tails(self._blocks, newest_first, caller.tenant, layout_id, wanted)
                hit = hit._replace(tails=tails)
            took_s = self._clock.monotonic_s() - began_s

            def note() -> None:
                self._note_use(found.held, hit.lease)
                self._counts.note(layout_id, keys, found.rows, hit.runs, took_s)

            if later is None or hit.lease is None:
                note()
            else:
                later(note)
            return hit
        finally:
            for rows in held:
                self._lifecycle.unhold(rows)

    def _hit(self, client: Client | None, layout: Layout, wanted: Shard, found: PrefixMatch, lease_ttl_s: float) -> Hit:
        lease, ttl_s = None, 0.0
        if len(found.rows) and client is not None:
            self._policy.looked_up(found.rows)
            ttl_s = min(lease_ttl_s, self._leases.ttl_max_s)
            lease = self._leases.grant(client, layout, wanted, found.rows, found.parts, found.held, ttl_s)
        runs = runs_of(self._blocks, found.rows) if found.runs is None else found.runs
        return Hit(len(found.rows), runs, lease, ttl_s)

    def _note_use(self, rows: Rows, lease: Lease | None) -> None:
        """Without a lease, call it before anything else can change the rows."""
        if lease is not None and self._leases.find(lease.lease_id) is not lease:
            return  # It has ended already, and its rows may be other blocks'.
        self._blocks.touch(rows, self._clock.wall_ms())
        self._blocks.hits[rows] += 1
        if lease is not None:
            self._blocks.note_user(rows, lease.client.number)

    def _note(
        self, request_id: str, caller: Caller, layout_id: int, wanted: Shard, keys: Sequence[bytes], hit: Hit
    ) -> None:
        self._trace.looked_up(caller, layout_id, keys, hit.lease, request_id)
        if request_id and keys:
            who = self._leases.name_of(caller.client)
            self._requests.note_lookup(
                request_id, self._index.layouts, layout_id, wanted, who, keys, hit.runs, hit.lease
            )

    def report(self, caller: Caller, request_id: str, report: ReportRecord) -> None:
        """Note an engine's report of a request. Raises InvalidRequest."""
        self._requests.note_report(caller, request_id, report)
        self._policy.computed(report.computed_bytes_per_s)
        self._trace.reported(request_id, report)
