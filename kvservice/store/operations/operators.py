"""What operators list, explain, discard and record.

Called on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from kvservice.blocks import NO_ROW, BlockTable, TierName
from kvservice.counters import Counters
from kvservice.index.block_index import BlockIndex
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.hints.exchange import HintExchange
from kvservice.store.leases import Client, Leases
from kvservice.store.operations.explain import Explain, ExplainedBlock, ExplainedRequest, ExplainedSession
from kvservice.store.operations.listings import BlockFacts, LayoutFacts, Listings
from kvservice.store.operations.requests import Requests
from kvservice.store.operations.trace import TRACE_MAX_S, TraceRecorder, TraceStep
from kvservice.store.sessions.manifests import StoredSession
from kvservice.store.sessions.sessions import Sessions
from kvservice.store.tasks import LoopBudget, in_parts
from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import KEY_BYTES
from kvservice_api.layout import Shard

DISCARD_KEYS_MAX = 65536  # In one call.
_FINGERPRINT_BYTES = 32


class ClientFacts(NamedTuple):
    """An attached client, and how many requests its queue has; None if it sends no hints."""

    client: Client
    queued_requests: int | None


class Operators:
    def __init__(
        self,
        blocks: BlockTable,
        index: BlockIndex,
        lifecycle: BlockLifecycle,
        counters: Counters,
        sessions: Sessions,
        listings: Listings,
        explain: Explain,
        requests: Requests,
        trace: TraceRecorder,
        leases: Leases,
        hints: HintExchange,
        loop_budget: LoopBudget,
    ) -> None:
        self._blocks = blocks
        self._index = index
        self._lifecycle = lifecycle
        self._counters = counters
        self._sessions = sessions
        self._listings = listings
        self._explain = explain
        self._requests = requests
        self._trace = trace
        self._leases = leases
        self._hints = hints
        self._loop_budget = loop_budget

    async def list_blocks(
        self,
        caller: Caller,
        page_token: str,
        page_size: int,
        fingerprint: bytes,
        tiers: Sequence[TierName],
        key_prefix: str,
    ) -> tuple[list[BlockFacts], str]:
        """A page of stored objects: of one layout unless `fingerprint` is empty, with a copy in each of `tiers`, and
        with keys that begin with these hexadecimal digits.

        Also returns the next page's token, empty on the last page. Raises InvalidRequest.
        """
        layout_id = self._listed_layout(fingerprint)
        return await self._listings.blocks(
            caller, page_token, page_size, layout_id=layout_id, tiers=tiers, key_prefix=key_prefix
        )

    async def list_sessions(
        self, caller: Caller, page_token: str, page_size: int, fingerprint: bytes, session_id: str
    ) -> tuple[list[StoredSession], str]:
        """A page of sessions, as `list_blocks`; with a `session_id` those of this id."""
        layout_id = self._listed_layout(fingerprint)
        found, token = await self._listings.sessions(caller, page_token, page_size, session_id, layout_id)
        return [self._sessions.stored(each) for each in found], token

    async def list_layouts(self, caller: Caller, page_token: str, page_size: int) -> tuple[list[LayoutFacts], str]:
        """A page of the layouts that the store knows, as `list_blocks`."""
        return await self._listings.layouts(caller, page_token, page_size)

    def list_clients(self, caller: Caller, page_token: str, page_size: int) -> tuple[list[ClientFacts], str]:
        """A page of the attached clients, as `list_blocks`."""
        found, token = self._listings.clients(caller, page_token, page_size, self._leases.clients)
        return [ClientFacts(each, self._hints.queued_of(each)) for each in found], token

    def _listed_layout(self, fingerprint: bytes) -> int | None:
        """The layout's id; -1 for one that was never opened, which has no blocks; None for an empty fingerprint."""
        if not fingerprint:
            return None
        if len(fingerprint) != _FINGERPRINT_BYTES:
            raise InvalidRequest(
                f"a fingerprint has {_FINGERPRINT_BYTES} bytes, not {len(fingerprint)}", field="layout_fingerprint"
            )
        layout_id = self._index.layout_id(fingerprint)
        return -1 if layout_id is None else layout_id

    async def explain_block(self, caller: Caller, key: bytes) -> ExplainedBlock:
        """The places of a block and its worth to the policy, or why it is a miss. Raises InvalidRequest."""
        if len(key) != KEY_BYTES:
            raise InvalidRequest(f"a key has {KEY_BYTES} bytes, not {len(key)}", field="key")
        return await self._explain.valued_block(caller, key)

    async def remembered_key(self, caller: Caller, prefix: str) -> bytes:
        """The only key in the history that begins so. Raises BlockNotFound, InvalidRequest."""
        return await self._explain.remembered_key(caller, prefix)

    def explain_request(self, caller: Caller, request_id: str) -> ExplainedRequest:
        """A request's lookups and their results. Raises RequestNotFound."""
        found = self._requests.get(caller, request_id)
        lookups = self._explain.lookups(caller, found)
        return ExplainedRequest(lookups, found.lookups_more, found.reports, found.reports_more)

    async def explain_session(self, caller: Caller, session_id: str) -> list[ExplainedSession]:
        """The sessions of this id, one per layout, and why the first missing slice of each is a miss.

        Does not count as a use. Raises SessionNotFound.
        """
        found = []
        for manifest in self._sessions.find_by_id(caller, session_id):
            history = self._sessions.history(manifest, Shard.whole(self._index.layouts[manifest.layout_id]))
            found.append(await self._explain.session(caller, history))
        return found

    async def discard(self, caller: Caller, keys: Sequence[bytes]) -> tuple[int, int]:
        """Discard blocks from all tiers, pinned or not. Returns the number of objects, and of keys without one."""
        missing = 0

        async def discard(part: Sequence[bytes]) -> int:
            nonlocal missing
            first = self._blocks.rows_of_keys(part)
            missing += int((first == NO_ROW).sum())
            return await self._discard([row for start in first.tolist() for row in self._blocks.shards_of(start)])

        discarded = sum(await in_parts(list(dict.fromkeys(keys)), discard, self._loop_budget))
        return discarded, missing

    async def discard_layout(self, caller: Caller, fingerprint: bytes | None) -> int:
        """Discard all blocks of a layout, or all blocks."""
        blocks = self._blocks
        rows = blocks.live_rows()
        if fingerprint is not None:
            self._listed_layout(fingerprint)  # Raises InvalidRequest for an invalid fingerprint.
            rows = rows[blocks.layout_id[rows] == self._index.find_layout(fingerprint)[0]]
        marks = blocks.generation[rows]

        async def discard(part: Sequence[int]) -> int:
            some, before = rows[part], marks[part]
            return await self._discard(some[blocks.live[some] & (blocks.generation[some] == before)].tolist())

        return sum(await in_parts(range(len(rows)), discard, self._loop_budget))

    async def _discard(self, rows: list[int]) -> int:
        """Returns their number. As many as fit into one turn of the event loop."""
        await self._lifecycle.discard(rows)
        self._counters.discarded_blocks += len(rows)
        return len(rows)

    def record_trace(self, caller: Caller, fingerprint: bytes, duration_s: float) -> AsyncGenerator[TraceStep, None]:
        """The turns that end from now on, of one layout: the first turn's if `fingerprint` is empty.

        Raises InvalidRequest, UnknownLayout; the generator raises Overloaded.
        """
        if not 0 < duration_s <= TRACE_MAX_S:
            raise InvalidRequest(
                f"duration_ms must be from 1 ms to {TRACE_MAX_S / 86400:.0f} days", field="duration_ms"
            )
        layout_id = self._index.find_layout(fingerprint)[0] if fingerprint else None
        return self._trace.record(caller, layout_id, duration_s)
