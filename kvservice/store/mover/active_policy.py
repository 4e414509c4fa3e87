"""The policy that the mover asks now. It can be replaced while the store runs, and another one can run beside it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, Rows, TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.placement.block_events import BlockEvents
from kvservice.policy.base import Hint
from kvservice.policy.items import Conditions
from kvservice.policy.placement import Placement
from kvservice.store.hints.placement import ExpectedRead, HintPlacement
from kvservice.store.mover.evictor import Evictor
from kvservice.store.mover.item_ranking import ItemRanking
from kvservice.store.mover.learned_counts import LearnedCounts
from kvservice.store.mover.ranking import Ranked, Ranking, RecencyRanking, Valuation
from kvservice.store.mover.read_ahead import ReadAhead
from kvservice.store.mover.shadow_run import ShadowRun
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.tasks import Tasks

log = logging.getLogger(__name__)

_KEEP_EVERY_S = 300.0  # What policies have learned is written that often, and at the end.
_KEEP_WITHIN_S = 3.0  # A switch and a stop wait for it.
_RATE_WEIGHT = 0.1  # Of the newest report,
_RATE_FACTOR = 2.0  # which counts as at most so many times the mean before it, and at least this part of it.
_RATE_MAX = 1e13  # Bytes of KV per second: more is an error.


class ActivePolicy:
    """A `Ranking` and a `HintPlacement`: by recency of single blocks, or by a policy over items.

    Call it on the event loop's thread. Events may come before `start`.
    """

    def __init__(
        self,
        blocks: BlockTable,
        conditions: Callable[[], Conditions],
        block_tokens_of: Callable[[int], int],
        clock: Clock,
        counters: Counters,
        tasks: Tasks,
        learned: LearnedCounts,
    ) -> None:
        """`conditions` makes those of a new policy. `block_tokens_of`: of a whole block, by layout id. A policy begins
        with what it has in `learned`.
        """
        self._blocks = blocks
        self._conditions = conditions
        self._block_tokens_of = block_tokens_of
        self._clock = clock
        self._counters = counters
        self._tasks = tasks
        self._learned = learned
        self._keeping = asyncio.Lock()
        self._items: ItemRanking | None = None
        self._listening: tuple[BlockEvents, ...] = ()  # Those of the policy, if it is over items, and of the shadow.
        self.shadow: ShadowRun | None = None
        self.since_ms = clock.wall_ms()
        self._ranking: Ranking = RecencyRanking(blocks)
        self._running: asyncio.Task[None] | None = None
        self._computed_bytes_per_s = 0.0

    def start(
        self,
        evictor: Evictor,
        window: HintPlacement,
        read_ahead: Callable[[ItemRanking], ReadAhead],
        shadow: Callable[[Placement], ShadowRun],
        write_behind: WriteBehind | None,
    ) -> None:
        """`window` acts on the engines' queues for policies that do not. `read_ahead` makes what reads for a policy,
        and `shadow` what runs a policy beside it.
        """
        self._evictor = evictor
        self._window = window
        self._make_read_ahead = read_ahead
        self._read_ahead: ReadAhead | None = None
        self._hinted: dict[tuple[int, float], None] = {}
        self._has_new = False  # A policy that has not got the engines' queues yet.
        self._make_shadow = shadow
        self._write_behind = write_behind
        self._shadowing: asyncio.Task[None] | None = None
        self._tasks.start(self._keep_forever(), "what policies have learned")

    def use(self, policy: Placement | None) -> None:
        """Use another policy from now on; None ranks single blocks by recency. It begins to learn from what happens."""
        if self._items is not None:
            self._items.close()
        if self._read_ahead is not None:
            self._read_ahead.stop()
        if self._running is not None:
            self._running.cancel()
        self._items = self._running = self._read_ahead = None
        self.since_ms = self._clock.wall_ms()
        self._evictor.rank_again()
        self._window.want([], 0)
        self._hinted, self._has_new = {}, True
        if policy is None:
            self._ranking = RecencyRanking(self._blocks)
        else:
            known = self._learned.of(policy.name)
            if known and not policy.restore(known):
                log.warning("what the policy %s had learned is of another version: it learns again", policy.name)
            conditions = self._conditions()
            conditions.recompute_bytes_per_s = self._computed_bytes_per_s
            self._ranking = self._items = ItemRanking(
                self._blocks, policy, conditions, self._block_tokens_of, self._clock, self._counters
            )
            self._read_ahead = self._make_read_ahead(self._items)
            self._running = self._tasks.start(self._read_ahead.run(), "read ahead")
        self._listen()

    async def switch(self, policy: Placement | None) -> None:
        """As `use`, while the store runs: what the present policy has learned is kept for its return."""
        await self.keep_learned()
        self.use(policy)
        if self._write_behind is not None:  # The new policy may want on SSD what the last one had refused.
            self._tasks.start(self._write_behind.add_all(), "copies that the last policy refused")

    def run_shadow(self, policy: Placement | None) -> None:
        """Run this policy beside the present one from now on, without any effect; None ends that."""
        if self.shadow is not None and self._shadowing is not None:
            self._shadowing.cancel()
            self.shadow.close()
        self.shadow = self._shadowing = None
        if policy is not None:
            self.shadow = self._make_shadow(policy)
            self.shadow.conditions.recompute_bytes_per_s = self._computed_bytes_per_s
            self._has_new = True
            self._shadowing = self._tasks.start(self.shadow.run(), "shadow policy")
        self._listen()

    def _listen(self) -> None:
        events = [each.events for each in (self._items, self.shadow) if each is not None]
        self._listening = tuple(events)

    def close(self) -> None:
        """The store has stopped: end the threads."""
        for each in (self._items, self.shadow):
            if each is not None:
                each.close()

    # What is learned

    async def keep_learned(self) -> None:
        """Write what the policy has learned. A failure is logged: the file then stays as it was."""
        items = self._items
        if items is None:
            return
        try:
            async with self._clock.timeout(_KEEP_WITHIN_S), self._keeping:
                state = await items.on_thread(lambda known, now_s: known.policy.state())
                if (data := self._learned.keep(items.name, state)) is not None:
                    await asyncio.to_thread(self._learned.write, data)
        except Exception as error:
            log.warning("what the policy %s has learned was not written: %s", items.name, error)

    async def _keep_forever(self) -> None:
        while True:
            await self._clock.sleep(_KEEP_EVERY_S)
            await self.keep_learned()

    # What the mover asks

    @property
    def name(self) -> str:
        return self._ranking.name

    @property
    def lasts_s(self) -> float:
        return self._ranking.lasts_s

    async def lowest(self, tier: TierName, rows: Rows, count_max: int) -> Ranked:
        while True:
            ranking = self._ranking
            ranked = await ranking.lowest(tier, rows, count_max)
            if ranking is self._ranking:  # Else the scores are those of a policy that has been replaced.
                return ranked

    async def wanted_on_ssd(self, rows: Rows) -> NDArray[np.bool_]:
        while True:
            ranking = self._ranking
            wanted = await ranking.wanted_on_ssd(rows)
            if ranking is self._ranking:
                return wanted

    # What operators ask

    @property
    def items(self) -> ItemRanking | None:
        """The policy, if it is over items."""
        return self._items

    async def explain(self, row: int) -> list[Valuation]:
        """What a block is worth in each tier that the policy knows. Empty if the policy does not know the block."""
        try:
            return await self._ranking.explain(row)
        except Exception:  # A policy's bug: the other facts about the block are right.
            log.exception("the policy %s failed to explain a block", self.name)
            return []

    # Events

    def looked_up(self, rows: Rows) -> None:
        """A request has found these blocks of a prefix, and is about to lease them."""
        for events in self._listening:
            events.looked_up(rows)

    def leased(self, rows: Rows) -> None:
        for events in self._listening:
            events.leased(rows)

    def released(self, rows: Rows) -> None:
        for events in self._listening:
            events.released(rows)

    def evicted(self, rows: Rows) -> None:
        """A client has evicted these blocks from DRAM: they are not read ahead until a request has used them."""
        for events in self._listening:
            events.evicted(rows)

    def computed(self, bytes_per_s: float) -> None:
        """An engine has reported how much KV it computes per second; 0 if it does not know."""
        if bytes_per_s > 0:  # Not NaN.
            before = self._computed_bytes_per_s or min(bytes_per_s, _RATE_MAX)
            bytes_per_s = min(max(bytes_per_s, before / _RATE_FACTOR), before * _RATE_FACTOR, _RATE_MAX)
            self._computed_bytes_per_s = before + _RATE_WEIGHT * (bytes_per_s - before)
            for each in (self._items, self.shadow):
                if each is not None:
                    each.conditions.recompute_bytes_per_s = self._computed_bytes_per_s

    # Hints

    def want(self, wanted: Sequence[ExpectedRead], waiting: int) -> None:
        hinted: dict[tuple[int, float], None] = {}
        for read in wanted:
            if read.hint is not None and len(read.rows):
                hinted[int(read.rows[-1]), read.due_s] = None
                if (int(read.rows[-1]), read.due_s) not in self._hinted:
                    for events in self._listening:
                        events.hinted(read.rows, read.hint, read.kind)
        # A new policy ignores requests for blocks that it does not know yet.
        knows_blocks = self._read_ahead is None or self._read_ahead.looks > 0
        self._hinted = hinted if knows_blocks else {}
        self._has_new = not knows_blocks or (self.shadow is not None and not self.shadow.looks)
        for events in self._listening:
            events.queued([read.rows for read in wanted if read.hint is None], waiting)
        if self._read_ahead is None:
            self._window.want(wanted, waiting)
            return
        self._evictor.rank_again()
        self._read_ahead.look_soon()

    def coming_s(self, rows: Rows) -> float | None:
        return self._window.coming_s(rows) if self._read_ahead is None else self._read_ahead.coming_s(rows)

    def not_needed(self, rows: Rows, *, write: bool) -> None:
        self._window.not_needed(rows, write=write)
        if len(rows):
            for events in self._listening:
                events.hinted(rows, Hint.ENDED, 0)

    def answered(self, rows: Rows, answer_tokens: int) -> None:
        for events in self._listening:
            events.answered(rows, answer_tokens)

    def pause_over(self) -> bool:
        return self._has_new or self._window.pause_over()
