"""Runs a policy beside the one that decides, on a thread of its own: it gets the same events, and changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from kvservice.blocks import BlockTable
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.placement.block_events import BlockEvents
from kvservice.placement.shadow import Found, ShadowStore
from kvservice.policy.items import Conditions
from kvservice.policy.placement import Placement
from kvservice.store.mover.item_ranking import ItemRanking
from kvservice.store.tasks import LoopBudget

log = logging.getLogger(__name__)

_EVERY_S = 0.1
_PAUSE_AFTER_ERROR_S = 10.0


class ShadowFacts(NamedTuple):
    name: str
    since_ms: int
    requests: int  # That read something which the store has.
    real: Found  # In the same time; its reads ahead are not counted here.
    shadow: Found


class ShadowRun:
    """Call it on the event loop's thread, and end it with `close`."""

    def __init__(
        self,
        blocks: BlockTable,
        policy: Placement,
        conditions: Conditions,
        block_tokens_of: Callable[[int], int],
        measured_bytes_per_s: Callable[[], float],
        clock: Clock,
        loop_budget: LoopBudget,
    ) -> None:
        """`measured_bytes_per_s`: of the SSD, 0 until it is known. The others: see `ItemRanking`."""
        self._name = policy.name
        self._store = ShadowStore(policy, conditions)
        self.conditions = conditions
        self._ranking = ItemRanking(blocks, self._store, conditions, block_tokens_of, clock, Counters())
        self._measured_bytes_per_s = measured_bytes_per_s
        self._clock = clock
        self._loop_budget = loop_budget
        self.since_ms = clock.wall_ms()
        self.looks = 0  # So far.

    @property
    def events(self) -> BlockEvents:
        return self._ranking.events

    def close(self) -> None:
        """Take no more notes. The thread ends."""
        self._ranking.close()

    async def run(self) -> None:
        """Forever: first group what is stored, and begin with it, then follow the events."""
        try:
            await self._run()
        finally:
            self.events.close()  # Else notes would grow without bound, because nothing takes them.

    async def _run(self) -> None:
        await self.events.fill(self._loop_budget.slot)
        await self._ranking.on_thread(lambda items, now_s: self._store.begin(items.items, now_s))
        self.since_ms = self._clock.wall_ms()
        while True:
            pause_s = _EVERY_S
            if measured := self._measured_bytes_per_s():
                self.conditions.ssd_bytes_per_s = measured
            try:
                await self._ranking.on_thread(lambda items, now_s: items.reads(now_s))
            except Exception:
                log.exception("the shadow policy %s failed", self._name)
                pause_s = _PAUSE_AFTER_ERROR_S
            self.looks += 1
            await self._clock.sleep(pause_s)

    async def facts(self) -> ShadowFacts:
        """What the shadow would have done so far."""

        def counted() -> tuple[int, Found, Found]:
            requests, real, shadow = self._store.counts()
            return requests, replace(real), replace(shadow)

        return ShadowFacts(self._name, self.since_ms, *await self._ranking.on_thread(lambda items, now_s: counted()))
