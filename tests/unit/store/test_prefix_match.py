"""Lookups: the rows of a chain's leading blocks, in one shard or several."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.blocks import NO_ROW, BlockTable, Extent, TierName
from kvservice.store.leases import Client, Lease
from kvservice.store.prefix_match import match_prefix
from kvservice.store.transfers.coverage import cover
from kvservice_api.errors import UnknownClient
from kvservice_api.layout import Shard
from tests.stores import CALLER, LAYOUT, WHOLE, OpenStore, caller_of, some_chain, some_images, until
from tests.unit.store.test_coverage import shards

KEYS = [bytes([number]) * 32 for number in range(8)]
LEFT, RIGHT = Shard(0, 2, 0, 1), Shard(0, 2, 1, 2)


def stored(table: BlockTable, key: bytes, shard: Shard, *, layout_id: int = 1, tier: TierName | None = None) -> int:
    row = table.add(
        key,
        shard,
        parent_key=b"",
        layout_id=layout_id,
        tenant=0,
        token_count=1,
        size_bytes=1,
        trailer_checksum=0,
        now_ms=0,
    )
    if tier is not None:
        table.set_extent(row, tier, Extent(0, 0, 1))
    table.link(row)
    return row


def rows_of_one(table: BlockTable, key: bytes, layout_id: int, wanted: Shard) -> tuple[int, ...]:
    """One block's rows that together have `wanted`, found one by one."""
    first = int(table.rows_of_keys([key])[0])
    rows = [row for row in table.shards_of(first) if table.layout_id[row] == layout_id and table.tiers_of(row)]
    for row in rows:
        if table.shard_of(row).covers(wanted):
            return (row,)
    plan = cover([table.shard_of(row) for row in rows], wanted)
    return tuple(rows[source] for source in sorted({run.source for layer in plan for run in layer})) if plan else ()


objects = st.tuples(
    st.sampled_from(KEYS), shards(), st.sampled_from([1, 1, 1, 2]), st.sampled_from([TierName.DRAM, TierName.SSD, None])
)


@given(
    st.lists(objects, max_size=60, unique_by=lambda each: (each[0], each[1])),
    st.lists(st.sampled_from(KEYS), max_size=12),
    shards(),
)
def test_all_blocks_together_are_found_as_each_of_them_alone(
    there: list[tuple[bytes, Shard, int, TierName | None]], keys: list[bytes], wanted: Shard
) -> None:
    table = BlockTable(8)
    for key, shard, layout_id, tier in there:
        stored(table, key, shard, layout_id=layout_id, tier=tier)
    expected: list[tuple[int, ...]] = []
    for key in keys:
        rows = rows_of_one(table, key, 1, wanted)
        if not rows:
            break
        expected.append(rows)
    found = match_prefix(table, keys, 1, wanted)
    assert [found.parts.get(block, (row,)) for block, row in enumerate(found.rows.tolist())] == expected
    assert all(len(rows) > 1 for rows in found.parts.values())
    assert sorted(found.held.tolist()) == sorted(row for rows in expected for row in rows)


def test_the_table_is_asked_no_more_often_for_many_blocks_in_shards_than_for_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks are processed together, without Python code per block."""
    calls = 0
    decode = BlockTable.shard_of

    def counted(table: BlockTable, row: int) -> Shard:
        nonlocal calls
        calls += 1
        return decode(table, row)

    monkeypatch.setattr(BlockTable, "shard_of", counted)
    table = BlockTable()
    keys = [number.to_bytes(32, "big") for number in range(512)]
    for key in keys:
        for shard in (LEFT, RIGHT):
            stored(table, key, shard, tier=TierName.DRAM)
    for wanted, most in ((LEFT, 0), (RIGHT, 0), (WHOLE, 2)):
        calls = 0
        assert len(match_prefix(table, keys, 1, wanted).rows) == 512
        assert calls <= most


# In several iterations of the event loop


async def saved(opened: OpenStore, client: Client, blocks: int) -> tuple[bytes, ...]:
    chain = some_chain(blocks)
    for shard in (LEFT, RIGHT):
        assert not (await opened.save(client, chain, some_images(chain, shard=shard), shard=shard)).refused
    await opened.settle()
    return chain.keys


async def test_a_long_lookup_answers_as_a_short_one_and_lets_the_event_loop_go_round(
    opened: OpenStore, client: Client
) -> None:
    keys = [*await saved(opened, client, 20)] * 200
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    hit = await opened.store.lookups.lookup(caller_of(client), LAYOUT.fingerprint, WHOLE, keys, 30)
    counting.cancel()
    assert turns >= 3
    short = opened.lookup(client, keys[:20])
    assert hit.lease is not None and short is not None
    assert (hit.blocks, hit.runs) == (4000, [(4000, True, True)])
    assert hit.lease.rows.tolist() == short.rows.tolist() * 200
    assert hit.lease.parts == {block + 20 * turn: rows for block, rows in short.parts.items() for turn in range(200)}
    assert sorted(hit.lease.held_rows.tolist()) == sorted(short.held_rows.tolist() * 200)
    for lease in (hit.lease, short):
        opened.leases.begin_release(caller_of(client), lease.lease_id)
    await opened.leases.drain_ended()
    assert not opened.blocks.leases.any() and not opened.blocks.holds.any()


async def test_the_use_of_blocks_is_noted_after_the_answer_and_only_while_their_lease_exists(
    opened: OpenStore, client: Client
) -> None:
    chain = some_chain(2)
    await opened.save(client, chain, some_images(chain))
    notes: list[Callable[[], None]] = []

    async def looked_up() -> Lease:
        lookup = opened.store.lookups.lookup
        hit = await lookup(caller_of(client), LAYOUT.fingerprint, WHOLE, chain.keys, 30, later=notes.append)
        assert hit.lease is not None
        return hit.lease

    lease = await looked_up()
    rows = lease.rows
    before = opened.blocks.access_seq[rows].tolist()
    assert opened.blocks.leases[rows].tolist() == [1, 1]
    assert opened.blocks.hits[rows].tolist() == [0, 0]
    notes.pop()()
    assert opened.blocks.hits[rows].tolist() == [1, 1]
    assert all(after > seq for after, seq in zip(opened.blocks.access_seq[rows].tolist(), before, strict=True))

    await opened.leases.release(caller_of(client), (await looked_up()).lease_id)
    notes.pop()()
    assert opened.blocks.hits[rows].tolist() == [1, 1], "its rows may have other blocks by then"


async def test_a_long_lookup_ends_with_the_first_block_that_is_missing(opened: OpenStore, client: Client) -> None:
    keys = [*await saved(opened, client, 20)] * 200
    keys[1500] = b"\0" * 32
    hit = await opened.store.lookups.lookup(caller_of(client), LAYOUT.fingerprint, WHOLE, keys, 0)
    assert hit.blocks == 1500 and hit.lease is None
    assert not opened.blocks.holds.any()


async def test_what_a_long_lookup_has_found_stays_until_its_lease_has_it(
    opened: OpenStore, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tasks evict and discard between its iterations: the lease has rows that still have these blocks."""
    first, *_, last = keys = await saved(opened, client, 20)
    pace, gate, waiting = opened.loop_budget.slot, asyncio.Event(), asyncio.Event()
    taken = 0

    async def turn() -> None:
        nonlocal taken
        taken += 1
        if taken == 2:
            waiting.set()
            await gate.wait()
        await pace()

    monkeypatch.setattr(opened.loop_budget, "slot", turn)
    asking = asyncio.create_task(
        opened.store.lookups.lookup(caller_of(client), LAYOUT.fingerprint, WHOLE, [*keys[:-1]] * 40, 30)
    )
    await waiting.wait()
    rows = list(opened.blocks.shards_of(int(opened.blocks.rows_of_keys([first])[0])))
    assert (await opened.store.moves.evict(CALLER, [first, last], TierName.DRAM)).evicted == 2, (
        "only what was not found"
    )
    discarding = asyncio.create_task(opened.store.operators.discard(CALLER, [first]))
    await until(lambda: opened.hits([first]) == 0)
    gate.set()
    hit = await asking
    await discarding
    assert hit.blocks == 513, "the second part ends where the discarded block was"
    assert hit.lease is not None and set(rows) <= set(hit.lease.held_rows.tolist())
    assert all(opened.blocks.is_resident(row, TierName.DRAM) for row in hit.lease.held_rows.tolist())
    assert len(await opened.load(hit.lease, range(19))) == 2
    opened.leases.begin_release(caller_of(client), hit.lease.lease_id)
    await opened.settle()
    assert opened.blocks.row_of(first, LEFT) == NO_ROW


async def test_a_long_lookup_of_a_client_that_has_gone_leases_nothing(opened: OpenStore, client: Client) -> None:
    keys = [*await saved(opened, client, 20)] * 200
    asking = asyncio.ensure_future(opened.store.lookups.lookup(caller_of(client), LAYOUT.fingerprint, WHOLE, keys, 30))
    await asyncio.sleep(0)
    opened.store.leases.detach(CALLER, client)
    with pytest.raises(UnknownClient):
        await asking
    blocks = opened.blocks
    assert not np.concatenate([blocks.leases, blocks.holds]).any()
