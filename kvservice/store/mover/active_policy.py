"""The policy that the mover asks now. It can be replaced while the store runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvservice.blocks import BlockTable, Rows, TierName
from kvservice.clock import Clock
from kvservice.policy.items import Conditions
from kvservice.policy.placement import Placement
from kvservice.store.hints.placement import ExpectedRead, HintPlacement
from kvservice.store.mover.evictor import Evictor
from kvservice.store.mover.item_ranking import ItemRanking
from kvservice.store.mover.ranking import Ranked, Ranking, RecencyRanking
from kvservice.store.mover.read_ahead import ReadAhead
from kvservice.store.tasks import Tasks

_RATE_WEIGHT = 0.1  # Of the newest report.


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
        tasks: Tasks,
    ) -> None:
        """`conditions` makes those of a new policy. `block_tokens_of`: of a whole block, by layout id."""
        self._blocks = blocks
        self._conditions = conditions
        self._block_tokens_of = block_tokens_of
        self._clock = clock
        self._tasks = tasks
        self._items: ItemRanking | None = None
        self._ranking: Ranking = RecencyRanking(blocks)
        self._running: asyncio.Task[None] | None = None
        self._computed_bytes_per_s = 0.0

    def start(self, evictor: Evictor, window: HintPlacement, read_ahead: Callable[[ItemRanking], ReadAhead]) -> None:
        """`window` acts on the engines' queues for policies that do not. `read_ahead` makes what reads for a policy."""
        self._evictor = evictor
        self._window = window
        self._make_read_ahead = read_ahead
        self._read_ahead: ReadAhead | None = None
        self._hinted: dict[tuple[int, float], None] = {}

    def use(self, policy: Placement | None) -> None:
        """Use another policy from now on; None ranks single blocks by recency. It begins to learn from what happens."""
        if self._items is not None:
            self._items.close()
        if self._running is not None:
            self._running.cancel()
        self._items = self._running = self._read_ahead = None
        self._evictor.rank_again()
        self._window.want([], 0)
        if policy is None:
            self._ranking = RecencyRanking(self._blocks)
            return
        self._ranking = self._items = ItemRanking(
            self._blocks, policy, self._conditions(), self._block_tokens_of, self._clock
        )
        self._read_ahead = self._make_read_ahead(self._items)
        self._running = self._tasks.start(self._read_ahead.run(), "read ahead")

    def close(self) -> None:
        """The store has stopped."""
        if self._items is not None:
            self._items.close()

    # What the mover asks

    @property
    def name(self) -> str:
        return self._ranking.name

    @property
    def lasts_s(self) -> float:
        return self._ranking.lasts_s

    async def lowest(self, tier: TierName, rows: Rows, count_max: int) -> Ranked:
        return await self._ranking.lowest(tier, rows, count_max)

    async def wants_on_ssd(self, row: int) -> bool:
        return await self._ranking.wants_on_ssd(row)

    # Events

    def looked_up(self, rows: Rows) -> None:
        """A request has found these blocks of a prefix, and is about to lease them."""
        if self._items is not None:
            self._items.events.looked_up(rows)

    def leased(self, rows: Rows) -> None:
        if self._items is not None:
            self._items.events.leased(rows)

    def released(self, rows: Rows) -> None:
        if self._items is not None:
            self._items.events.released(rows)

    def computed(self, bytes_per_s: float) -> None:
        """An engine has reported how much KV it computes per second; 0 if it does not know."""
        if bytes_per_s:
            before = self._computed_bytes_per_s or bytes_per_s
            self._computed_bytes_per_s = before + _RATE_WEIGHT * (bytes_per_s - before)
            if self._items is not None:
                self._items.conditions.recompute_bytes_per_s = self._computed_bytes_per_s

    # Hints

    def want(self, wanted: Sequence[ExpectedRead], waiting: int) -> None:
        items, read_ahead = self._items, self._read_ahead
        if items is None or read_ahead is None:
            self._window.want(wanted, waiting)
            return
        hinted: dict[tuple[int, float], None] = {}
        for read in wanted:
            if read.hint is not None and len(read.rows):
                hinted[int(read.rows[-1]), read.due_s] = None
                if (int(read.rows[-1]), read.due_s) not in self._hinted:
                    items.events.hinted(read.rows, read.hint, read.kind)
        self._hinted = hinted
        items.events.queued([read.rows for read in wanted if read.hint is None], waiting)
        self._evictor.rank_again()
        read_ahead.look_soon()

    def coming_s(self, rows: Rows) -> float | None:
        return self._window.coming_s(rows) if self._read_ahead is None else self._read_ahead.coming_s(rows)

    def not_needed(self, rows: Rows, *, write: bool) -> None:
        self._window.not_needed(rows, write=write)

    def pause_over(self) -> bool:
        return self._window.pause_over()
