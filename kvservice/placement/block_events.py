"""Notes of what happens to blocks, taken where it happens, for the items that are kept on another thread."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import numpy as np

from kvservice.blocks import NO_ROW, BlockTable, Rows, TierName
from kvservice.placement.block_items import BlockItems
from kvservice.placement.item_tree import IN_DRAM, ON_SSD, BlockChanges
from kvservice.policy.base import Hint
from kvservice.policy.items import grown

_FILL_ROWS = 128
_CHANGED_MAX = 128  # Blocks whose changes are noted together: a millisecond of the event loop.

Note = Callable[[BlockItems], None]


class BlockEvents:
    """Collects the events of a block table, in their order, until `take`. Call it on the event loop's thread."""

    def __init__(self, blocks: BlockTable, block_tokens_of: Callable[[int], int], now_s: Callable[[], float]) -> None:
        """`block_tokens_of`: of a whole block, by layout id. Begins to listen to the table; end it with `close`."""
        self._blocks = blocks
        self._block_tokens_of = block_tokens_of
        self._now_s = now_s
        self._notes: list[Note] = [partial(BlockItems.leases_are, leases=blocks.leases[: blocks.row_end].copy())]
        self._evicted: set[int] = set()  # Rows among them whose block has left with an eviction.
        self._changed: dict[int, bool] = {}  # Blocks with changes that are not among them yet, and whether they live.
        self._known = np.full(blocks.row_capacity, -1, np.int64)  # By row: the generation that was noted last.
        self._is_open = True
        self.on_event: Callable[[], None] = _nothing
        blocks.listeners.append(self._note_change)

    def close(self) -> None:
        """Take no more notes. A second call has no effect."""
        if self._is_open:
            self._is_open = False
            self._blocks.listeners.remove(self._note_change)

    def take(self) -> list[Note]:
        """All notes since the last call. Apply them in this order."""
        self._note_changes()
        notes, self._notes = self._notes, []
        return notes

    async def fill(self, pause: Callable[[], Awaitable[object]]) -> None:
        """Note the blocks that are in the table already, each after the one that it continues. Awaits `pause` after
        every hundred blocks.
        """
        rows = self._blocks.live_rows()
        parents = np.full(self._blocks.row_end, NO_ROW)
        for start in range(0, len(rows), _FILL_ROWS):
            await pause()
            part = rows[start : start + _FILL_ROWS]
            found = self._blocks.rows_of_keys(self._blocks.parent_key[part].tolist())
            parents[part] = np.where(found < len(parents), found, NO_ROW)  # Later rows were stored meanwhile.
        ordered = await asyncio.to_thread(_by_depth, rows, parents)  # A tenth of a second for half a million.
        for start in range(0, len(ordered), _FILL_ROWS):
            await pause()
            part = ordered[start : start + _FILL_ROWS]
            for row in part[self._blocks.live[part]].tolist():
                self._note_change(row)

    def looked_up(self, rows: Rows) -> None:
        """A request has found these blocks of a prefix, and is about to lease them."""
        self._note(partial(BlockItems.looked_up, rows=rows.copy(), now_s=self._now_s()))

    def leased(self, rows: Rows) -> None:
        self._note(partial(BlockItems.leased, rows=rows.copy()))

    def evicted(self, rows: Rows) -> None:
        """A client has evicted these blocks from DRAM."""
        self._note(partial(BlockItems.evicted, rows=rows.copy()))

    def released(self, rows: Rows) -> None:
        self._note(partial(BlockItems.released, rows=rows.copy()))

    def queued(self, requests: Sequence[Rows], waiting: int) -> None:
        """The blocks of the next requests of all queues, the next one first; in all, so many requests wait."""
        self._note(partial(BlockItems.queued, requests=list(requests), waiting=waiting, now_s=self._now_s()))

    def hinted(self, rows: Rows, hint: Hint, kind: int) -> None:
        """An application sent a hint about the session whose history ends with these blocks; see `hint_kind`."""
        self._note(partial(BlockItems.hinted, rows=rows.copy(), hint=hint, kind=kind, now_s=self._now_s()))

    def answered(self, rows: Rows, answer_tokens: int) -> None:
        """An engine has reported the length of an answer. The history ends with these blocks, or continues them."""
        self._note(partial(BlockItems.answered, rows=rows.copy(), answer_tokens=answer_tokens, now_s=self._now_s()))

    def coming(self, rows: Rows, is_coming: bool) -> None:
        """The blocks are being read to DRAM, or no longer."""
        self._note(partial(BlockItems.coming, rows=rows.copy(), is_coming=is_coming))

    def ask_again(self) -> None:
        """A read for a queued request had no space: ask the policy again, though nothing else happened."""
        self._note(partial(BlockItems.ask_again, now_s=self._now_s()))

    def _note(self, event: Callable[[BlockItems], None]) -> None:
        if self._is_open:
            self._note_changes()
            self._notes.append(event)
            self.on_event()

    def _note_change(self, row: int) -> None:
        is_live = bool(self._blocks.live[row])
        if not is_live and self._blocks.unwanted[:, row].any():
            self._evicted.add(row)
        if self._changed.get(row, is_live) != is_live or len(self._changed) == _CHANGED_MAX:
            self._note_changes()  # The row may have another block now, which comes after its parent.
        self._changed[row] = is_live
        self.on_event()

    def _note_changes(self) -> None:
        if not self._changed:
            return
        rows = np.fromiter(self._changed, np.int64, len(self._changed))
        self._changed.clear()
        changes = self._changes(rows)
        self._evicted.difference_update(rows.tolist())  # The row that is noted next may be in it already.
        self._notes.append(partial(BlockItems.changed, changes=changes, now_s=self._now_s()))

    def _changes(self, rows: Rows) -> BlockChanges:
        blocks = self._blocks
        if blocks.row_capacity > len(self._known):
            self._known = grown(self._known, blocks.row_capacity, -1)
        live, generations = blocks.live[rows], blocks.generation[rows].astype(np.int64)
        parents, shards = np.full(len(rows), NO_ROW), rows.copy()
        for place in np.flatnonzero(live & (self._known[rows] != generations)).tolist():
            row = int(rows[place])
            parents[place] = blocks.parent_row(row)
            first = int(blocks.rows_of_keys([blocks.key_of(row)])[0])
            if blocks.next_shard[first] != NO_ROW:
                known = (each for each in blocks.shards_of(first) if self._known[each] == blocks.generation[each])
                shards[place] = next(known, row)
            self._known[row] = generations[place]
        self._known[rows[~live]] = -1
        tokens = blocks.token_count[rows].astype(np.int64)
        layout_ids, which = np.unique(blocks.layout_id[rows], return_inverse=True)
        full = np.array([self._block_tokens_of(each) if each else 1 for each in layout_ids.tolist()], np.int64)
        tiers = IN_DRAM * blocks.lie_in(rows, TierName.DRAM) | ON_SSD * blocks.lie_in(rows, TierName.SSD)
        return BlockChanges(
            rows,
            generations,
            live,
            np.array([row in self._evicted for row in rows.tolist()], np.bool_),
            tiers,
            blocks.size_bytes[rows].astype(np.int64),
            tokens,
            tokens >= full[which],
            parents,
            shards,
            np.ascontiguousarray(blocks.key[rows]).view(np.int64).reshape(len(rows), -1)[:, 0],
        )


def _nothing() -> None:
    pass


def _by_depth(rows: Rows, parents: Rows) -> Rows:
    """The rows, each after its parent. `parents` is by row. Rows of a cycle of parents are in any order."""
    depth = np.zeros(len(parents), np.int64)
    ancestor = parents.copy()
    for step in range(len(parents).bit_length()):  # After each step, an ancestor is twice as far.
        below = np.flatnonzero(ancestor != NO_ROW)
        if not len(below):
            break
        depth[below] += depth[ancestor[below]] + (step == 0)
        ancestor[below] = ancestor[ancestor[below]]
    return rows[np.argsort(depth[rows], kind="stable")]
