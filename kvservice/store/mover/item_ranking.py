"""A policy over items, beside the event loop: events go to a thread of its own, and decisions come back.

The event loop's thread only takes notes of events. The thread groups the blocks into items and asks the policy, so that
a scan of all items delays no request. Nothing but the thread touches the items.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, Rows, TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.placement.block_events import BlockEvents, Note
from kvservice.placement.block_items import BlockItems
from kvservice.placement.item_tree import NO_ITEM
from kvservice.policy.items import NOT_QUEUED, Conditions
from kvservice.policy.placement import Placement
from kvservice.store.mover.ranking import Ranked, RecencyRanking, Valuation
from kvservice.tiers.files import executor_of

log = logging.getLogger(__name__)

T = TypeVar("T")

# Scores change with time, and the last conversation that ended is often the one to evict. So an order of victims lasts
# only a multiple of the time that ranking takes, at most _RANKING_LASTS_S.
_RANKING_SHARE, _RANKING_LASTS_S = 20, 0.25
_RESERVED_WEIGHT = 0.05  # Of the newest measurement of what loads and saves reserve.
_DECIDED_TIERS = 2  # Policies know the first two tiers.
_LATE_S = 0.1  # After this time the evictor takes blocks by recency,
_STUCK_S = 5.0  # and after this time blocks are written to SSD without a decision.
_LOG_EVERY_S = 60.0  # Each eviction and each write may find that the policy is late or fails.


class WantedRead(NamedTuple):
    """Blocks to copy up to DRAM, in the order of their chain, until `deadline_s` of the store's monotonic clock."""

    item: int
    rows: Rows
    generations: NDArray[np.int64]
    deadline_s: float
    worth: float  # Only blocks with a lower score are evicted for it.
    is_queued: bool  # A queued request will read them, as an engine's hint says.


class Look(NamedTuple):
    """What the policy wants now."""

    reads: list[WantedRead] | None  # As of `BlockItems.reads`.
    next_s: float  # When to look again.


class ItemRanking:
    """A `Ranking` by the items that the blocks belong to. Call it on the event loop's thread."""

    def __init__(
        self,
        blocks: BlockTable,
        policy: Placement,
        conditions: Conditions,
        block_tokens_of: Callable[[int], int],
        clock: Clock,
        counters: Counters,
    ) -> None:
        """`block_tokens_of` gives the tokens of a whole block, by layout id."""
        self._counters = counters
        self.conditions = conditions
        self._policy_name = policy.name
        self._blocks = blocks
        self._clock = clock
        self._items = BlockItems(policy, conditions, blocks.row_capacity)
        self._notes: deque[Note] = deque()  # For the thread: a call that is cancelled leaves them to the next one.
        self._by_recency = RecencyRanking(blocks)
        self._thread = executor_of(1, "placement")
        self._dram_bytes = conditions.dram_capacity_bytes
        self._reserved_bytes = 0.0  # Of DRAM, for loads and saves that run: recent mean.
        self._took_s = 0.0  # How long the last ranking took,
        self._look_s = 0.0  # and the last look.
        self._logs_again_s = -math.inf
        self._asks_ssd = type(policy).wants_on_ssd is not Placement.wants_on_ssd
        self.events = BlockEvents(blocks, block_tokens_of, clock.monotonic_s)

    def close(self) -> None:
        """Take no more notes. The thread ends after what it was asked: those who wait for it get their answers."""
        self.events.close()
        self._thread.shutdown(wait=False)

    @property
    def name(self) -> str:
        return self._policy_name

    @property
    def lasts_s(self) -> float:
        return min(_RANKING_SHARE * self._took_s, _RANKING_LASTS_S)

    @property
    def ranking_s(self) -> float:
        """How long the last ranking took, with the wait for the thread."""
        return self._took_s

    @property
    def look_s(self) -> float:
        """How long the last look took, with the wait for the thread."""
        return self._look_s

    # Decisions

    async def on_thread(self, ask: Callable[[BlockItems, float], T]) -> T:
        """Give the thread all events, then let it answer, with the present time."""
        self._notes.extend(self.events.take())
        now_s = self._clock.monotonic_s()
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, ask, now_s)

    def _answer(self, ask: Callable[[BlockItems, float], T], now_s: float) -> T:
        while self._notes:
            self._notes.popleft()(self._items)
        self._items.settle(now_s)
        return ask(self._items, now_s)

    async def lowest(self, tier: TierName, rows: Rows, count_max: int) -> Ranked:
        """As `Ranking.lowest`. By recency if the policy is late or fails, and in tiers that it does not know."""
        if self._blocks.position(tier) < _DECIDED_TIERS:
            try:
                began_s = self._clock.monotonic_s()
                async with self._clock.timeout(_LATE_S):
                    ranked = await self.on_thread(lambda items, now_s: items.lowest(rows, tier, count_max, now_s))
                self._took_s = self._clock.monotonic_s() - began_s
                if len(ranked[0]):
                    return Ranked(*ranked)
            except Exception as error:
                self._note_failure(f"blocks leave {tier} by recency", error)
        by_recency = await self._by_recency.lowest(tier, rows, count_max)
        return by_recency._replace(scores=np.full(len(by_recency.rows), np.finfo(np.float64).max))

    async def look(self, used_bytes: int, left: int) -> Look:
        """What the policy wants to be read ahead now. DRAM has `used_bytes` in use. `left` reads of earlier looks have
        not begun.

        What is in use and belongs to no block is reserved for loads and saves: the policy has so much less DRAM.
        """
        conditions = self.conditions
        began_s = self._clock.monotonic_s()
        look, known_bytes = await self.on_thread(partial(_look, left=left))
        self._look_s = self._clock.monotonic_s() - began_s
        reserved = max(0, used_bytes - known_bytes)
        self._reserved_bytes += _RESERVED_WEIGHT * (reserved - self._reserved_bytes)
        conditions.dram_capacity_bytes = max(0, self._dram_bytes - int(self._reserved_bytes))
        return look

    async def wanted_on_ssd(self, rows: Rows) -> NDArray[np.bool_]:
        if self._asks_ssd:
            try:
                async with self._clock.timeout(_STUCK_S):
                    return await self.on_thread(lambda items, now_s: items.wanted_on_ssd(rows, now_s))
            except Exception as error:
                self._note_failure("blocks are written to SSD", error)
        return np.ones(len(rows), np.bool_)

    def _note_failure(self, instead: str, error: Exception) -> None:
        self._counters.policy_failures += 1
        now_s = self._clock.monotonic_s()
        if now_s < self._logs_again_s:
            return
        self._logs_again_s = now_s + _LOG_EVERY_S
        if isinstance(error, TimeoutError):
            log.warning("the policy %s is late: %s", self.name, instead)
        else:
            log.error("the policy %s failed: %s", self.name, instead, exc_info=error)

    async def explain(self, row: int) -> list[Valuation]:
        tiers = self._blocks.tiers[:_DECIDED_TIERS]
        return await self.on_thread(lambda items, now_s: _explain(items, row, tiers, now_s))


def _explain(items: BlockItems, row: int, tiers: Sequence[TierName], now_s: float) -> list[Valuation]:
    item = items.item_of(row)
    if item == NO_ITEM:
        return []
    table, policy = items.items, items.policy
    return [
        Valuation(
            tier,
            float(policy.retention(table, np.array([item]), tier, now_s)[0]),
            policy.explain(table, item, tier, now_s),
        )
        for tier in tiers
    ]


def _look(items: BlockItems, now_s: float, left: int) -> tuple[Look, int]:
    """What the policy wants, and the bytes of DRAM that its items have, or will have after its reads."""
    promotions, policy, table = items.reads(now_s, left), items.policy, items.items
    known_bytes = int(table.dram_bytes.sum() + table.coming_bytes.sum())
    if promotions is None:
        return Look(None, policy.look_at_s), known_bytes
    reads = []
    each = items.rows_of_each([promotion.row for promotion in promotions])
    for (item, deadline_s, worth), of_item in zip(promotions, each, strict=True):
        is_queued = bool(table.queue_seq[item] != NOT_QUEUED)
        rows = items.outside_dram(of_item if is_queued else items.to_guess(of_item))
        if len(rows):
            reads.append(WantedRead(item, rows, items.generations(rows), deadline_s, worth, is_queued))
        else:
            items.unwant(item)
    return Look(reads, policy.look_at_s), known_bytes
