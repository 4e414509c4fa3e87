"""A reopened store: the table follows from the records, and untrusted records are dropped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvservice.blocks import TierName
from kvservice.index.records import Records
from kvservice.store.leases import Client
from kvservice_api.errors import IndexFull
from kvservice_api.layout import Shard
from tests.stores import CALLER, LAYOUT, WHOLE, OpenStore, StoreFiles, layers_of, some_chain, some_images, until
from tests.unit.index_samples import some_keys, some_records

BLOCK = 12 * 1024


def opened_again(opened: OpenStore) -> OpenStore:
    return opened.files.open()


async def saved(opened: OpenStore, blocks: int = 4, *, seed: int = 0, on_ssd: bool = True) -> list[bytes]:
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(blocks, seed=seed)
    outcome = await opened.save(client, chain, some_images(chain, seed=seed), on_ssd=on_ssd)
    assert not outcome.refused
    return list(chain.keys)


@pytest.mark.parametrize("end", ["close", "kill"])
async def test_a_store_that_is_opened_again_has_every_block_where_it_was(opened: OpenStore, end: str) -> None:
    both = await saved(opened, seed=1)
    only_dram, only_ssd = await saved(opened, seed=2), await saved(opened, seed=3)
    await opened.store.moves.evict(CALLER, only_dram, TierName.SSD)
    await opened.store.moves.evict(CALLER, only_ssd, TierName.DRAM)
    client = opened.store.leases.attach(CALLER, "test")
    halves = (Shard(0, 2, 0, 1), Shard(0, 2, 1, 2))
    sharded = some_chain(2, seed=4)
    for half in halves:
        await opened.save(client, sharded, some_images(sharded, shard=half), shard=half)
    await opened.settle()
    before = everything(opened)

    await getattr(opened, end)()
    again = opened_again(opened)
    try:
        assert everything(again) == before
        assert again.unsettled() == "", "free space is what no record names"
        assert again.hits(sharded.keys) == 2
        lease = again.lookup(again.store.leases.attach(CALLER, "test"), both)
        assert lease is not None
        assert await again.load(lease) == layers_of(some_images(some_chain(4, seed=1), seed=1))
    finally:
        await again.close()


def everything(opened: OpenStore) -> dict[bytes, tuple[object, ...]]:
    blocks = opened.blocks
    columns = "layout_id token_count size_bytes trailer_checksum stored_at_ms".split()
    return {
        blocks.object_key_of(row): (
            *(blocks.extent(row, tier) for tier in (TierName.DRAM, TierName.SSD)),
            *(int(getattr(blocks, column)[row]) for column in columns),
            blocks.parent_key[row].tobytes(),
        )
        for row in blocks.live_rows().tolist()
    }


async def test_the_order_of_use_survives_a_restart_and_continues_from_there(opened: OpenStore) -> None:
    first, second = await saved(opened, 2, seed=1), await saved(opened, 2, seed=2)
    opened.hits(first)
    before = opened.blocks.next_access_seq
    await opened.close()

    again = opened_again(opened)
    try:
        blocks = again.blocks
        used = [int(blocks.access_seq[blocks.row_of(key, WHOLE)]) for key in (*second[::-1], *first[::-1])]
        assert used == sorted(used)
        assert blocks.hits[blocks.row_of(first[0], WHOLE)] == 1
        assert blocks.next_access_seq == before
    finally:
        await again.close()


async def test_after_a_crash_use_times_since_the_last_flush_are_not_known_and_nothing_else(opened: OpenStore) -> None:
    keys = await saved(opened)
    await opened.block_lifecycle.flush_recency()
    opened.hits(keys)
    await opened.kill()
    again = opened_again(opened)
    try:
        assert not again.blocks.hits[again.blocks.live_rows()].any()
        assert again.hits(keys) == 4
    finally:
        await again.close()


async def test_blocks_that_only_dram_had_are_written_to_ssd_by_the_next_daemon(
    store_files: Callable[..., StoreFiles],
) -> None:
    opened = store_files().open(started=False)  # Its mover never runs.
    await opened.store.layouts.open(CALLER, LAYOUT)
    keys = await saved(opened, on_ssd=False)
    await opened.kill()
    again = opened_again(opened)
    try:
        assert again.residency(keys[0]) == {TierName.DRAM}
        await until(lambda: all(again.residency(key) == {TierName.DRAM, TierName.SSD} for key in keys))
    finally:
        await again.close()


async def test_after_a_power_cut_the_dram_tier_is_empty_and_the_ssd_whole(opened: OpenStore) -> None:
    on_ssd = await saved(opened, seed=1)
    await opened.settle()
    only_dram = await saved(opened, seed=2)
    await opened.store.moves.evict(CALLER, only_dram, TierName.SSD)
    await opened.kill()
    opened.files.lose_power()
    again = opened_again(opened)
    try:
        assert (again.hits(on_ssd), again.hits(only_dram)) == (4, 0)
        assert again.dram.used_bytes == 0 and again.unsettled() == ""
    finally:
        await again.close()


# Records that cannot be trusted


def misplaced(records: Records, opened: OpenStore) -> None:
    records["offset_bytes"] = opened.dram.capacity_bytes


def crooked(records: Records, opened: OpenStore) -> None:
    records["offset_bytes"] += 512


def overflowing(records: Records, opened: OpenStore) -> None:
    records["offset_bytes"] = 2**64 - 4096


def in_another_file(records: Records, opened: OpenStore) -> None:
    records["segment"] = 7


def too_small(records: Records, opened: OpenStore) -> None:
    records["size_bytes"] -= 4096


def with_too_many_tokens(records: Records, opened: OpenStore) -> None:
    records["token_count"] = LAYOUT.block_tokens + 1


def of_an_unknown_layout(records: Records, opened: OpenStore) -> None:
    records["layout_id"] = 77


def at_the_place_of_another(records: Records, opened: OpenStore) -> None:
    records["offset_bytes"] = BLOCK


def of_other_bytes_than_on_ssd(records: Records, opened: OpenStore) -> None:
    records["trailer_checksum"] ^= np.uint64(1)


REASONS: dict[Callable[[Records, OpenStore], None], str] = {
    misplaced: "its extent is outside the tier",
    crooked: "its extent ",
    overflowing: "its extent overlaps another",
    in_another_file: "its extent is outside the tier",
    too_small: "it does not fit its layout",
    with_too_many_tokens: "it does not fit its layout",
    of_an_unknown_layout: "its layout is unknown",
    at_the_place_of_another: "its extent overlaps another",
    of_other_bytes_than_on_ssd: "its copy in the other tier has other bytes",
}


@pytest.mark.parametrize("spoil", REASONS)
async def test_a_record_that_contradicts_the_store_is_dropped_for_good_and_its_space_is_free(
    opened: OpenStore, spoil: Callable[[Records, OpenStore], None], caplog: pytest.LogCaptureFixture
) -> None:
    keys = await saved(opened, 2)
    await opened.settle()
    name = keys[0] + WHOLE.encode()
    found = opened.index.load(TierName.DRAM)
    records = found.records[[found.keys.index(name)]].copy()
    spoil(records, opened)
    await opened.index.put(TierName.DRAM, [name], records)
    await opened.kill()

    again = opened_again(opened)
    try:
        assert again.residency(keys[0]) == {TierName.SSD}, "the copy that can be trusted stays"
        [message] = [record.getMessage() for record in caplog.records if "contradict the store" in record.getMessage()]
        assert "of the tier dram" in message and f": {REASONS[spoil]}" in message
        await until(lambda: again.unsettled() == "")
        assert again.hits(keys) == 2
        lease = again.lookup(again.store.leases.attach(CALLER, "test"), keys)
        assert lease is not None
        assert await again.load(lease) == layers_of(some_images(some_chain(2)))
    finally:
        await again.close()


async def test_a_store_that_belongs_to_the_arena_of_another_starts_with_an_empty_dram_tier(
    store_files: Callable[..., StoreFiles],
) -> None:
    one, other = store_files(), store_files()
    for files in (one, other):
        opened = files.open()
        await opened.store.layouts.open(CALLER, LAYOUT)
        await saved(opened)
        await opened.close()
    [mine], [others] = (list(files.shared_memory.iterdir()) for files in (one, other))
    for path in sorted(mine.rglob("*")):
        if path.is_file():
            path.write_bytes((others / path.relative_to(mine)).read_bytes())

    again = one.open()
    try:
        assert again.arena.why_new and again.dram.used_bytes == 0
        assert again.hits(some_chain(4).keys) == 4
    finally:
        await again.close()


async def test_damage_in_a_recovered_block_is_found_at_its_first_load(opened: OpenStore, client: Client) -> None:
    keys = await saved(opened, 2)
    await opened.settle()
    extent = opened.extents(TierName.DRAM)[int(opened.blocks.rows_of_keys(keys[:1])[0])]
    await opened.kill()
    [arena] = Path(opened.files.shared_memory).rglob("arena")
    with arena.open("r+b") as file:
        file.seek(4096 + extent.offset_bytes + 100)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))

    again = opened_again(opened)
    try:
        lease = again.lookup(again.store.leases.attach(CALLER, "test"), keys)
        assert lease is not None
        answers: Any = await asyncio.gather(again.load(lease), return_exceptions=True)
        assert type(answers[0]).__name__ == "ChecksumMismatch"
        assert again.hits(keys) == 0 and again.counters.quarantined_blocks == 1
    finally:
        await again.close()


async def test_the_table_has_rows_from_the_start_for_as_many_blocks_as_the_index_can_name(opened: OpenStore) -> None:
    """Growing later would copy all of it, on the event loop."""
    blocks, named = opened.blocks, 0
    for tier in (TierName.DRAM, TierName.SSD):
        first = named
        with contextlib.suppress(IndexFull):
            while True:
                await opened.index.put(tier, some_keys(200, named), some_records(200, named))
                named += 200
        assert named - first > 2000, "it was full"

    assert blocks.row_capacity >= named
    assert blocks.rows_likely < blocks.row_capacity, "others, who pay for each, go by what is likely"
