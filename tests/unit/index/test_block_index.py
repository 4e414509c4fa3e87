"""The block index: two environments of one store, its layouts, and indexes that are refused or emptied at open."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest

from kvservice.blocks import TierName
from kvservice.index.block_index import BlockIndex
from kvservice.index.environment import LAYOUTS, META, SESSIONS, Environment, _Merged
from kvservice.index.errors import StoreDamaged, StoreTooNew
from kvservice.index.identity import SCHEMA
from kvservice_api.errors import IndexFull, StorageFailed
from kvservice_api.layout import LayerGroup, Layout, Rotary
from tests.layouts import changed
from tests.unit.index_samples import LAYOUT, some_keys, some_records

MIB = 2**20
ARENA, OTHER_ARENA = b"a" * 16, b"b" * 16
WINDOW = Layout("window", groups=[LayerGroup(2, 2, 8, 8, "float16", window=32)], block_tokens=16)
GROUPS = Layout(
    "groups", groups=[LayerGroup(2, 2, 8, 8, "float16"), LayerGroup(1, 4, 8, 8, "float16")], block_tokens=16
)
OTHER_LAYOUT = changed(LAYOUT, rotary=Rotary("yarn", "half", 8, 10000.0, (("factor", 4.0),)), layers=3)


@contextmanager
def opened(
    path: Path, *, layouts_max: int = 256, before_commit: Callable[[], None] | None = None
) -> Iterator[BlockIndex]:
    index = BlockIndex.open(path / "index", map_bytes=4 * MIB, layouts_max=layouts_max, before_commit=before_commit)
    try:
        yield index
    finally:
        index.close()


async def change(directory: Path, database: bytes, items: dict[bytes, bytes | None]) -> None:
    """Write into a closed index without its rules."""
    environment = Environment(directory, map_bytes=4 * MIB, durable=False)
    for key, value in items.items():
        if value is None:
            await environment.delete(database, [key])
        else:
            await environment.put(database, [key], lambda value=value: [value])  # type: ignore[misc]
    environment.close()


def stored(directory: Path, database: bytes) -> dict[bytes, bytes]:
    """The content of a closed index."""
    environment = Environment(directory, map_bytes=4 * MIB, durable=False)
    found = {key: value for keys, values in environment.read(database) for key, value in zip(keys, values, strict=True)}
    environment.close()
    return found


async def given_dram_record(store: Path, arena: Path, arena_id: bytes = ARENA) -> None:
    with opened(store) as index:
        index.open_volatile(arena, arena_id, map_bytes=4 * MIB)
        await index.put_layout(LAYOUT)
        await index.put(TierName.DRAM, some_keys(2), some_records(2))


def dram_keys(store: Path, arena: Path, arena_id: bytes = ARENA) -> tuple[str, list[bytes]]:
    with opened(store) as index:
        why_emptied = index.open_volatile(arena, arena_id, map_bytes=4 * MIB)
        return why_emptied, sorted(index.load(TierName.DRAM).keys)


def test_a_store_keeps_its_id(tmp_path: Path) -> None:
    with opened(tmp_path / "one") as one, opened(tmp_path / "two") as two:
        first, second = one.store_id, two.store_id

    with opened(tmp_path / "one") as one:
        assert one.store_id == first
    assert len(first) == 16
    assert first != second


async def test_records_of_both_tiers_survive_and_do_not_mix(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        index.open_volatile(tmp_path / "arena", ARENA, map_bytes=4 * MIB)
        await index.put_layout(LAYOUT)
        await asyncio.gather(
            index.put(TierName.SSD, some_keys(3), some_records(3)),
            index.put(TierName.DRAM, some_keys(4), some_records(4)),
        )
        await index.delete(TierName.SSD, some_keys(1))

    with opened(tmp_path) as index:
        assert index.open_volatile(tmp_path / "arena", ARENA, map_bytes=4 * MIB) == ""
        assert sorted(index.load(TierName.SSD).keys) == sorted(some_keys(3)[1:])
        found = index.load(TierName.DRAM)
        assert sorted(found.keys) == sorted(some_keys(4))
        assert not found.damaged
        for key, record in zip(found.keys, found.records, strict=True):
            assert record["trailer_checksum"] == some_keys(4).index(key) + 7


async def test_only_records_of_bytes_on_disk_wait_for_the_disk(tmp_path: Path) -> None:
    synced: list[int] = []
    with opened(tmp_path, before_commit=lambda: synced.append(1)) as index:
        index.open_volatile(tmp_path / "arena", ARENA, map_bytes=4 * MIB)
        await index.put(TierName.DRAM, some_keys(1), some_records(1))
        assert not synced

        await index.put(TierName.SSD, some_keys(1), some_records(1))
        assert synced


async def test_a_store_of_a_newer_schema_is_refused_and_keeps_what_it_has(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        await index.put_layout(LAYOUT)
        await index.put(TierName.SSD, some_keys(1), some_records(1))
    await change(tmp_path / "index", META, {b"schema": b"99"})

    with pytest.raises(StoreTooNew, match=rf"99.*{SCHEMA}"):
        BlockIndex.open(tmp_path / "index", map_bytes=4 * MIB)

    await change(tmp_path / "index", META, {b"schema": b"%d" % SCHEMA})
    with opened(tmp_path) as index:
        assert index.load(TierName.SSD).keys == some_keys(1)


async def test_a_store_of_the_schema_before_sessions_is_upgraded_and_loses_nothing(tmp_path: Path) -> None:
    await given_dram_record(tmp_path, tmp_path / "arena")
    with opened(tmp_path) as index:
        await index.put(TierName.SSD, some_keys(1), some_records(1))
    as_it_was = (tmp_path / "index", tmp_path / "arena")
    for directory in as_it_was:
        await change(directory, META, {b"schema": b"1"})
        without_database(directory, SESSIONS)

    with opened(tmp_path) as index:
        assert index.open_volatile(tmp_path / "arena", ARENA, map_bytes=4 * MIB) == ""
        assert index.load(TierName.SSD).keys == some_keys(1)
        assert sorted(index.load(TierName.DRAM).keys) == sorted(some_keys(2))
        assert index.load_sessions() == []
    for directory in as_it_was:
        assert stored(directory, META)[b"schema"] == b"2", "so that a daemon that knows 2 can open it"


def schemas(*directories: Path) -> list[bytes]:
    return [stored(directory, META)[b"schema"] for directory in directories]


@pytest.mark.parametrize("layout", [GROUPS, WINDOW], ids=["groups", "window"])
async def test_a_store_is_of_schema_3_from_its_first_layout_on_that_needs_it_and_keeps_its_dram_tier(
    tmp_path: Path, layout: Layout
) -> None:
    await given_dram_record(tmp_path, tmp_path / "arena")
    both = (tmp_path / "index", tmp_path / "arena")
    assert schemas(*both) == [b"2", b"2"]
    assert dram_keys(tmp_path, tmp_path / "arena") == ("", sorted(some_keys(2)))
    assert schemas(*both) == [b"2", b"2"], "a restart changes nothing"

    with opened(tmp_path) as index:
        await index.put_layout(layout)
    assert schemas(tmp_path / "index") == [b"3"]

    assert dram_keys(tmp_path, tmp_path / "arena") == ("", sorted(some_keys(2)))
    assert schemas(*both) == [b"3", b"3"]


async def test_the_schema_is_on_disk_before_the_layout_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that knows only schema 2 takes such a layout for damaged, and removes its blocks."""
    write = Environment._write

    def failing(environment: Environment, merged: _Merged) -> None:
        if LAYOUTS in merged:
            raise StorageFailed("the drive is gone")
        write(environment, merged)

    monkeypatch.setattr(Environment, "_write", failing)
    with opened(tmp_path) as index, pytest.raises(StorageFailed):
        await index.put_layout(GROUPS)
    assert (schemas(tmp_path / "index"), stored(tmp_path / "index", LAYOUTS)) == ([b"3"], {})


async def test_a_layout_that_is_refused_leaves_the_schema_as_it_is(tmp_path: Path) -> None:
    with opened(tmp_path, layouts_max=1) as index:
        await index.put_layout(LAYOUT)
        with pytest.raises(IndexFull):
            await index.put_layout(GROUPS)
    assert schemas(tmp_path / "index") == [b"2"]


async def test_a_store_of_schema_2_that_has_a_layout_of_schema_3_is_upgraded(tmp_path: Path) -> None:
    """As an unreleased version may have left it; also for a new index that replaces a lost one."""
    with opened(tmp_path) as index:
        await index.put_layout(GROUPS)
    await change(tmp_path / "index", META, {b"schema": b"2"})
    with opened(tmp_path):
        pass
    assert schemas(tmp_path / "index") == [b"3"]

    meta, layouts = stored(tmp_path / "index", META), stored(tmp_path / "index", LAYOUTS)
    BlockIndex.create(tmp_path / "new", map_bytes=4 * MIB, meta={**meta, b"schema": b"2"}, layouts=layouts).close()
    assert schemas(tmp_path / "new") == [b"3"]


def without_database(directory: Path, name: bytes) -> None:
    with lmdb.open(str(directory), map_size=4 * MIB, max_dbs=8, lock=False) as environment:
        database = environment.open_db(name)
        with environment.begin(write=True) as transaction:
            transaction.drop(database)


@pytest.mark.parametrize(
    "damage", [{b"schema": None}, {b"schema": b"one"}, {b"store_id": None}, {b"store_id": b"short"}]
)
async def test_a_store_that_does_not_say_what_it_is_is_refused(
    tmp_path: Path, damage: dict[bytes, bytes | None]
) -> None:
    with opened(tmp_path):
        pass
    await change(tmp_path / "index", META, damage)

    with pytest.raises(StoreDamaged):
        BlockIndex.open(tmp_path / "index", map_bytes=4 * MIB)


async def test_the_index_of_an_arena_that_is_gone_is_emptied(tmp_path: Path) -> None:
    await given_dram_record(tmp_path, tmp_path / "arena")

    assert dram_keys(tmp_path, tmp_path / "arena") == ("", sorted(some_keys(2)))
    assert dram_keys(tmp_path, tmp_path / "arena", OTHER_ARENA) == ("arena_id differs", [])
    assert dram_keys(tmp_path, tmp_path / "arena", OTHER_ARENA) == ("", [])


async def test_the_arena_index_of_another_store_is_emptied(tmp_path: Path) -> None:
    await given_dram_record(tmp_path / "one", tmp_path / "arena")

    assert dram_keys(tmp_path / "two", tmp_path / "arena") == ("store_id differs", [])


async def test_the_arena_index_of_another_schema_is_emptied(tmp_path: Path) -> None:
    await given_dram_record(tmp_path, tmp_path / "arena")
    await change(tmp_path / "arena", META, {b"schema": b"99"})

    assert dram_keys(tmp_path, tmp_path / "arena") == ("schema differs", [])


async def test_an_arena_index_that_is_garbage_is_created_again(tmp_path: Path) -> None:
    await given_dram_record(tmp_path, tmp_path / "arena")
    (tmp_path / "arena" / "data.mdb").write_bytes(os.urandom(65536))

    why_emptied, keys = dram_keys(tmp_path, tmp_path / "arena")

    assert "damaged" in why_emptied
    assert keys == []


async def test_layouts_get_ids_and_keep_them(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        assert index.layout_id(LAYOUT.fingerprint) is None
        ids = [await index.put_layout(layout) for layout in (LAYOUT, OTHER_LAYOUT, LAYOUT)]
        assert ids[0] == ids[2] != ids[1]

    with opened(tmp_path) as index:
        assert dict(index.layouts) == {ids[0]: LAYOUT, ids[1]: OTHER_LAYOUT}
        assert index.layout_id(OTHER_LAYOUT.fingerprint) == ids[1]
        assert await index.put_layout(OTHER_LAYOUT) == ids[1]


def some_layouts(count: int) -> list[Layout]:
    return [dataclasses.replace(LAYOUT, model_id=f"model {number}") for number in range(count)]


async def test_a_store_takes_so_many_layouts_and_refuses_further_ones(tmp_path: Path) -> None:
    first, second, third, fourth = some_layouts(4)
    with opened(tmp_path, layouts_max=3) as index:
        await index.put_layout(first)
        found = await asyncio.gather(*map(index.put_layout, (second, third, third, fourth)), return_exceptions=True)
        assert found[:3] == [2, 3, 3]
        assert isinstance(found[3], IndexFull)
        assert "3 layouts, as many as index.layouts_max allows" in found[3].message
        assert await index.put_layout(second) == 2, "what is known is no further one"

    with opened(tmp_path, layouts_max=2) as index:
        assert len(index.layouts) == 3, "those that it has are kept"


async def test_a_start_at_the_limit_forgets_the_layouts_that_no_record_names_and_gives_no_id_again(
    tmp_path: Path,
) -> None:
    layouts = some_layouts(4)
    with opened(tmp_path) as index:
        index.open_volatile(tmp_path / "arena", ARENA, map_bytes=4 * MIB)
        on_ssd, _, in_dram, last = [await index.put_layout(layout) for layout in layouts]
        await index.put(TierName.SSD, some_keys(1), some_records(1, layout_id=on_ssd))
        await index.put(TierName.DRAM, some_keys(1, 1), some_records(1, 1, layout_id=in_dram))

    with opened(tmp_path, layouts_max=5) as index:
        index.open_volatile(tmp_path / "arena", ARENA, map_bytes=4 * MIB)
        assert index.forget_unused_layouts() == 0, "there is room for another"
    with opened(tmp_path, layouts_max=4) as index:
        index.open_volatile(tmp_path / "arena", ARENA, map_bytes=4 * MIB)
        assert index.forget_unused_layouts() == 2
        assert index.layout_id(layouts[3].fingerprint) is None
    with opened(tmp_path, layouts_max=4) as index:
        index.open_volatile(tmp_path / "arena", ARENA, map_bytes=4 * MIB)
        assert dict(index.layouts) == {on_ssd: layouts[0], in_dram: layouts[2]}
        for tier, key in ((TierName.SSD, some_keys(1)), (TierName.DRAM, some_keys(1, 1))):
            assert (index.load(tier).keys, index.load(tier).damaged) == (key, {})
        assert await index.put_layout(layouts[3]) == last + 1


@pytest.mark.parametrize("what", ["a file", "a folder for each layout", "a link to itself"])
async def test_a_folder_of_layouts_that_cannot_be_used_never_stops_a_start(tmp_path: Path, what: str) -> None:
    first, second = some_layouts(2)
    with opened(tmp_path) as index:
        index.open_volatile(tmp_path / "arena", ARENA, map_bytes=4 * MIB)
        for layout in (first, second):
            await index.put_layout(layout)
        await index.put(TierName.SSD, some_keys(1), some_records(1, layout_id=1))
    folder = tmp_path / "layouts"
    shutil.rmtree(folder)
    if what == "a file":
        folder.touch()
    elif what == "a folder for each layout":
        for layout in (first, second):
            (folder / layout.fingerprint.hex()).mkdir(parents=True)
    else:
        folder.symlink_to(folder)
    with opened(tmp_path, layouts_max=2) as index:
        index.open_volatile(tmp_path / "arena", ARENA, map_bytes=4 * MIB)
        assert index.forget_unused_layouts() == 1
        assert await index.put_layout(OTHER_LAYOUT) == 3

    entry = stored(tmp_path / "index", LAYOUTS)[first.fingerprint]
    await change(tmp_path / "index", LAYOUTS, {first.fingerprint: entry[:-1] + bytes([entry[-1] ^ 1])})
    with opened(tmp_path) as index:
        assert index.layout_entries.damaged == [first.fingerprint]


async def test_a_layout_opened_by_many_at_once_gets_one_id(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        given_up = asyncio.ensure_future(index.put_layout(LAYOUT))
        others = [asyncio.ensure_future(index.put_layout(LAYOUT)) for _ in range(9)]
        await asyncio.sleep(0)
        given_up.cancel()
        ids = await asyncio.gather(*others)

        assert dict(index.layouts) == dict.fromkeys(ids, LAYOUT)

    with opened(tmp_path) as index:
        assert dict(index.layouts) == dict.fromkeys(ids, LAYOUT)


async def test_a_layout_that_could_not_be_stored_is_unknown_and_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(environment: Environment, merged: _Merged) -> None:
        raise StorageFailed("the drive is gone")

    with opened(tmp_path) as index:
        with monkeypatch.context() as patched:
            patched.setattr(Environment, "_write", failing)
            with pytest.raises(StorageFailed):
                await index.put_layout(LAYOUT)
        assert not index.layouts

        layout_id = await index.put_layout(LAYOUT)
        assert index.layouts[layout_id] == LAYOUT


async def test_a_damaged_layout_is_left_out_and_its_id_is_not_given_again(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        await index.put_layout(OTHER_LAYOUT)
        lost = await index.put_layout(LAYOUT)
        await index.put(TierName.SSD, some_keys(1), some_records(1, layout_id=lost))
    value = stored(tmp_path / "index", LAYOUTS)[LAYOUT.fingerprint]
    shutil.rmtree(tmp_path / "layouts")
    for position in range(len(value)):
        damaged = bytearray(value)
        damaged[position] ^= 1
        await change(tmp_path / "index", LAYOUTS, {LAYOUT.fingerprint: bytes(damaged)})
        with opened(tmp_path) as index:
            assert index.layout_entries.damaged == [LAYOUT.fingerprint]
            assert list(index.layouts.values()) == [OTHER_LAYOUT]

    with opened(tmp_path) as index:
        assert index.load(TierName.SSD).damaged == {some_keys(1)[0]: "its layout is unknown"}
        assert await index.put_layout(LAYOUT) == lost + 1


async def test_a_full_index_says_so_and_takes_records_again_once_others_are_gone(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        index.open_volatile(tmp_path / "arena", ARENA, map_bytes=MIB)
        count, refused = 0, False
        while not refused:
            try:
                await index.put(TierName.DRAM, some_keys(100, count), some_records(100, count))
                count += 100
            except IndexFull:
                refused = True
        assert index.used_sizes[TierName.DRAM] <= 0.9 * index.map_sizes[TierName.DRAM]

        await index.delete(TierName.DRAM, some_keys(count + 100))
        await index.put(TierName.DRAM, some_keys(100), some_records(100))


async def given_layouts_and_a_block(store: Path) -> dict[bytes, bytes]:
    """The entries of two layouts; the block is of the second."""
    with opened(store) as index:
        await index.put_layout(OTHER_LAYOUT)
        layout_id = await index.put_layout(LAYOUT)
        await index.put(TierName.SSD, some_keys(1), some_records(1, layout_id=layout_id))
    return stored(store / "index", LAYOUTS)


async def test_a_damaged_layout_is_taken_from_its_file_and_written_again(tmp_path: Path) -> None:
    """Wherever in its key and in its value a bit flipped."""
    entries = await given_layouts_and_a_block(tmp_path)
    key, value = LAYOUT.fingerprint, entries[LAYOUT.fingerprint]
    for position in range(0, len(key + value), 3):
        damaged = bytearray(key + value)
        damaged[position] ^= 4
        items: dict[bytes, bytes | None] = {key: None, bytes(damaged[: len(key)]): bytes(damaged[len(key) :])}
        await change(tmp_path / "index", LAYOUTS, items)
        with opened(tmp_path) as index:
            assert dict(index.layouts) == {1: OTHER_LAYOUT, 2: LAYOUT}
            assert (index.layout_entries.damaged, index.load(TierName.SSD).damaged) == ([], {})
        assert stored(tmp_path / "index", LAYOUTS) == entries


async def test_a_damaged_layout_whose_file_is_damaged_too_is_not_guessed(tmp_path: Path) -> None:
    entries = await given_layouts_and_a_block(tmp_path)
    damaged = entries[LAYOUT.fingerprint][:-1] + b"\0"
    await change(tmp_path / "index", LAYOUTS, {LAYOUT.fingerprint: damaged})
    (tmp_path / "layouts" / LAYOUT.fingerprint.hex()).write_bytes(damaged)
    with opened(tmp_path) as index:
        assert index.layout_entries.damaged == [LAYOUT.fingerprint]
        assert list(index.layouts.values()) == [OTHER_LAYOUT]


async def test_an_index_that_begins_with_zeros_and_has_more_is_no_first_start(tmp_path: Path) -> None:
    """Nothing else shows that the store existed before: its SSD files are on a missing drive."""
    await given_layouts_and_a_block(tmp_path)
    (tmp_path / "store_id").unlink()
    path = tmp_path / "index" / "data.mdb"
    found = bytes(8192) + path.read_bytes()[8192:]
    path.write_bytes(found)
    for create in (True, False):
        with pytest.raises(StoreDamaged, match="first two pages"):
            BlockIndex.open(tmp_path / "index", map_bytes=4 * MIB, create=create)
        assert path.read_bytes() == found


@pytest.mark.parametrize("content", [b"", bytes(3 * MIB)])
def test_a_first_start_that_was_cut_off_is_one_for_a_start_and_no_store_for_a_check(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "index" / "data.mdb"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StoreDamaged, match="is empty: nothing was written"):
        BlockIndex.open(tmp_path / "index", map_bytes=4 * MIB, create=False)
    assert path.read_bytes() == content
    with opened(tmp_path) as index:
        assert len(index.store_id) == 16


@pytest.mark.parametrize(
    ("names", "words"), [(["store_id"], "store_id is there"), (["store_id", "ssd-000.kv"], "are there")]
)
def test_the_message_about_a_lost_index_names_what_tells_of_the_store(
    tmp_path: Path, names: list[str], words: str
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(StoreDamaged, match=f"{words}, so the store was made before"):
        BlockIndex.open(tmp_path / "index", map_bytes=4 * MIB)
