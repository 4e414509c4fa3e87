"""Prefix lookup: which rows have the wanted shard of a chain's leading blocks, and their tiers.

All blocks are processed together, step by step: find each block's first row; find the row with all of the wanted shard;
for blocks without such a row, find several rows that have it together. A chain is stored in few combinations of shards,
so the last step runs once per combination.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, BlockTable, Rows
from kvservice.store.caller import Tenant
from kvservice.store.leases import Lease
from kvservice.store.tasks import LoopBudget
from kvservice.store.transfers.coverage import cover
from kvservice_api.errors import InvalidRequest
from kvservice_api.layout import Shard

Run = tuple[int, bool, bool]  # Count of consecutive blocks, whether they are in DRAM, whether they are on SSD.

Tail = tuple[bytes, int]  # A partial block: its key, its number of tokens.
TAILS_MAX = 4

_NOTHING = np.empty(0, np.int64)
_TAIL_ROWS_MAX = 64  # Older rows are not examined. So many take 2.5 ms of the event loop if none has the shard.
_PARTS_A_TURN = 512  # They take two milliseconds of the event loop.


@dataclass(slots=True)
class PrefixMatch:
    """The stored leading blocks of a chain."""

    rows: Rows = field(default_factory=lambda: _NOTHING)  # One per block: with all of it, or its first part.
    parts: dict[int, tuple[int, ...]] = field(default_factory=dict)  # Block -> its rows, if there are several.
    held: Rows = field(default_factory=lambda: _NOTHING)  # All rows, with parts.
    runs: list[Run] | None = None  # The tiers of `rows` when they were found; None if `runs_of` is to find them.

    def extend(self, more: PrefixMatch) -> None:
        """Append the next blocks."""
        if not len(self.rows):
            self.rows, self.parts, self.held, self.runs = more.rows, more.parts, more.held, more.runs
            return
        self.runs = None
        self.parts |= {len(self.rows) + block: rows for block, rows in more.parts.items()}
        self.rows = np.concatenate([self.rows, more.rows])
        self.held = np.concatenate([self.held, more.held])


def match_prefix(blocks: BlockTable, keys: Sequence[bytes], layout_id: int, wanted: Shard) -> PrefixMatch:
    """The leading blocks that have all of `wanted`. Takes at most a millisecond for 512 keys."""
    rows = blocks.rows_of_keys(keys)
    rows = rows[: _leading(rows != NO_ROW)]
    if (run := _alike(blocks, rows, layout_id, wanted)) is not None:
        return PrefixMatch(rows, {}, rows, [run])
    whole = _usable(blocks, rows, layout_id) & blocks.cover(rows, wanted)
    if whole.all():
        return PrefixMatch(rows, {}, rows)
    shards = _shards(blocks, rows, layout_id)
    covering = blocks.cover(shards, wanted) & (shards != NO_ROW)
    by_one = covering.any(axis=1)
    rows = np.where(by_one, shards[np.arange(len(rows)), covering.argmax(axis=1)], NO_ROW)
    if by_one.all():
        return PrefixMatch(rows, {}, rows)
    return _joined(blocks, rows, shards, wanted)


def _alike(blocks: BlockTable, rows: Rows, layout_id: int, wanted: Shard) -> Run | None:
    """All rows as one run, if they have exactly the wanted shard, and copies in the same tiers: the usual case, with
    half of the calls of NumPy, which take some microseconds each.
    """
    if not len(rows) or not blocks.are_all(rows, layout_id, wanted):
        return None
    run = _same_tiers(blocks.lie_in_tiers(rows))
    return run if run is not None and any(run[1:]) else None


def _same_tiers(is_in: NDArray[np.bool_]) -> Run | None:
    """The rows as one run, if all of them have copies in the same tiers. ``[tier, row]``, with a row or more."""
    if not (is_in == is_in[:, :1]).all():
        return None
    first, *others = is_in[:, 0].tolist()
    return is_in.shape[1], first, any(others)


def match_tails(
    blocks: BlockTable, newest_first: Iterable[int], tenant: Tenant, layout_id: int, wanted: Shard
) -> list[Tail]:
    """The newest partial blocks of the tenant that have all of `wanted`. At most `TAILS_MAX`, the newest first."""
    rows = np.fromiter(islice(newest_first, _TAIL_ROWS_MAX), np.int64)
    rows = rows[(blocks.tenant[rows] == tenant.number) & (blocks.layout_id[rows] == layout_id)]
    found: list[Tail] = []
    for key in dict.fromkeys(blocks.key[rows].tolist()):  # A key may have several shards.
        match = match_prefix(blocks, [key], layout_id, wanted)
        if len(match.rows):
            found.append((key, int(blocks.token_count[match.rows[0]])))
            if len(found) == TAILS_MAX:
                break
    return found


def _joined(blocks: BlockTable, rows: Rows, shards: Rows, wanted: Shard) -> PrefixMatch:
    """`rows`, with the first part instead of NO_ROW for blocks in several parts, up to the first incomplete block."""
    codes = np.where(shards != NO_ROW, blocks.shard[shards].view(np.uint64), 0)
    joined: dict[int, tuple[int, ...]] = {}
    extra: list[Rows] = []
    open_ones = np.flatnonzero(rows == NO_ROW)
    end = len(rows)
    while len(open_ones):
        first = open_ones[0]
        alike = (codes[open_ones] == codes[first]).all(axis=1)
        same, open_ones = open_ones[alike], open_ones[~alike]
        sources = _sources(blocks, shards[first], wanted)
        if not sources:
            end = int(first)
            break
        several = shards[same][:, sources]
        rows[same] = several[:, 0]
        joined.update(zip(same.tolist(), map(tuple, several.tolist()), strict=True))
        extra.append(several[:, 1:].ravel())
    if end < len(rows):
        joined = {block: several for block, several in joined.items() if block < end}
        extra = [np.array([row for several in joined.values() for row in several[1:]], np.int64)]
        rows = rows[:end]
    return PrefixMatch(rows, joined, np.concatenate([rows, *extra]))


async def narrowed(blocks: BlockTable, lease: Lease, shard: Shard, loop_budget: LoopBudget) -> Lease:
    """The lease as one of another shard, which is within its own.

    Blocks in several parts keep the parts that the shard needs. `Leases` does not know the result, so check that the
    lease has not ended when the result is used. Raises InvalidRequest.
    """
    shard.check(lease.layout)
    if not lease.shard.covers(shard):
        raise InvalidRequest(f"{shard} is not within the lease's {lease.shard}", field="shard")
    rows, parts = lease.rows.copy(), {}
    chosen: dict[tuple[bytes, ...], list[int]] = {}  # Per way to cut a block: there are few.
    for count, (block, several) in enumerate(lease.parts.items()):
        if count % _PARTS_A_TURN == _PARTS_A_TURN - 1:
            await loop_budget.slot()
        stored = tuple(blocks.shard[list(several)].tolist())
        if stored not in chosen:
            chosen[stored] = _taken([blocks.shard_of(row) for row in several], shard)
        taken = tuple(several[source] for source in chosen[stored])
        rows[block] = taken[0]
        if len(taken) > 1:
            parts[block] = taken
    extra = np.array([row for several in parts.values() for row in several[1:]], np.int64)
    return replace(lease, shard=shard, rows=rows, parts=parts, held_rows=np.concatenate([rows, extra]))


def _taken(stored: Sequence[Shard], wanted: Shard) -> list[int]:
    """The shards that are needed of these, which cover `wanted` together: one if that is enough."""
    whole = next((source for source, shard in enumerate(stored) if shard.covers(wanted)), None)
    if whole is not None:
        return [whole]
    plan = cover(stored, wanted)
    assert plan is not None, "a lease holds only what covers its shard"
    return sorted({run.source for layer in plan for run in layer})


def _sources(blocks: BlockTable, shards: Rows, wanted: Shard) -> list[int]:
    """Positions of the block's shards that together have `wanted`; empty if they do not."""
    positions = np.flatnonzero(shards != NO_ROW).tolist()
    plan = cover([blocks.shard_of(row) for row in shards[positions].tolist()], wanted)
    if plan is None:
        return []
    return [positions[source] for source in sorted({run.source for layer in plan for run in layer})]


def _shards(blocks: BlockTable, first_rows: Rows, layout_id: int) -> Rows:
    """All usable rows of each block, ``[block, shard]`` in the order of the table; other places have NO_ROW."""
    columns = []
    row = first_rows
    while (there := row != NO_ROW).any():
        usable = there & _usable(blocks, row, layout_id)
        columns.append(np.where(usable, row, NO_ROW))
        row = np.where(there, blocks.next_shard[row], NO_ROW)
    return np.stack(columns, axis=1)


def _usable(blocks: BlockTable, rows: Rows, layout_id: int) -> NDArray[np.bool_]:
    usable: NDArray[np.bool_] = blocks.lie_anywhere(rows) & (blocks.layout_id[rows] == layout_id)
    return usable


def _leading(good: NDArray[np.bool_]) -> int:
    """How many leading values are true."""
    return len(good) if good.all() else int(good.argmin())


def runs_of(blocks: BlockTable, rows: Rows) -> list[Run]:
    """The tiers of consecutive rows, as runs."""
    if not len(rows):
        return []
    if (run := _same_tiers(blocks.lie_in_tiers(rows))) is not None:
        return [run]
    sets = blocks.tier_sets(rows)
    changes = (np.flatnonzero(sets[1:] != sets[:-1]) + 1).tolist()
    starts, ends = [0, *changes], [*changes, len(rows)]
    return [
        (end - start, bool(tiers & 1), bool(tiers >> 1))
        for start, end, tiers in zip(starts, ends, sets[starts].tolist(), strict=True)
    ]
