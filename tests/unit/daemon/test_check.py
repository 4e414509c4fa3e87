"""``kvservice check``: finds every kind of damage in a stopped store, and repairs it if possible."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvservice import check
from kvservice.blocks import Extent, TierName, object_key
from kvservice.index import pages
from kvservice.index.block_index import BlockIndex
from kvservice.index.environment import BLOCKS, LAYOUTS, META, SESSIONS, Environment
from kvservice.index.records import RECORD, Records, encode_records, new_records
from kvservice.index.session_records import session_name
from kvservice.index.store_lock import StoreLock
from kvservice.store.image_check import scratch
from kvservice.tiers.arena import Arena
from kvservice.tiers.base import Tier
from kvservice.tiers.dram import DramTier
from kvservice.tiers.ssd import SsdTier
from kvservice_api.image import (
    PAGE_BYTES,
    Descriptor,
    Trailer,
    block_geometry,
    checksum,
    descriptor_offset,
    tenant_tag,
)
from kvservice_api.keys import block_chain
from kvservice_api.layout import Layout, Shard

MIB = 2**20
FILE_BYTES = 4 * MIB + PAGE_BYTES  # A header, and 4 MiB for blocks.
LAYOUT = Layout("model", "float16", layers=3, kv_heads=2, k_head_dim=64, v_head_dim=64, block_tokens=64)
SHARD, OTHER_SHARD = Shard(0, 3, 0, 1), Shard(0, 3, 1, 2)
CHAIN = block_chain(LAYOUT, range(4 * 64))
KEYS = [object_key(key, SHARD) for key in CHAIN]
GEOMETRY = block_geometry(LAYOUT, SHARD, 64)


@dataclass
class Store:
    """A stopped store with four blocks on SSD, the first three of them in DRAM too."""

    path: Path
    shared_memory: Path
    extents: dict[TierName, list[Extent]]

    @property
    def ssd_file(self) -> Path:
        return self.path / "ssd-000.kv"

    @property
    def arena_file(self) -> Path:
        [path] = self.shared_memory.glob("*/arena")
        return path

    def index_of(self, tier: TierName) -> Path:
        return self.path / "index" if tier == TierName.SSD else self.arena_file.parent / "index"

    def file_of(self, tier: TierName) -> Path:
        return self.ssd_file if tier == TierName.SSD else self.arena_file

    def flip(self, tier: TierName, block: int, offset: int, bit: int = 0) -> None:
        """Change one bit of a block's image."""
        with self.file_of(tier).open("r+b") as file:
            position = PAGE_BYTES + self.extents[tier][block].offset_bytes + offset
            file.seek(position)
            [byte] = file.read(1)
            file.seek(position)
            file.write(bytes([byte ^ 1 << bit]))

    def change(self, tier: TierName, database: bytes, change: Callable[[dict[bytes, bytes]], None]) -> None:
        """Change a database of an index without the index's rules."""
        with opened_environment(self.index_of(tier)) as environment:
            items = contents(environment, database)
            change(items)
            environment.write_now(database, items)

    def change_record(self, tier: TierName, block: int, **fields: int) -> None:
        """Change a record so that its crc is right and its content is not."""

        def change(items: dict[bytes, bytes]) -> None:
            record = np.frombuffer(items[KEYS[block]], RECORD).copy()
            for name, value in fields.items():
                record[name] = value
            [items[KEYS[block]]] = encode_records([KEYS[block]], record)

        self.change(tier, BLOCKS, change)

    def check(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """Exit code and JSON report of a check."""
        with pytest.MonkeyPatch.context() as patch:
            printed: list[str] = []
            patch.setattr("builtins.print", lambda text, file=None: printed.append(str(text)))
            code = check.main([str(self.path), "--json", *arguments])
        return code, json.loads(printed[0]) if code < 2 else {"error": printed[0]}


@contextmanager
def opened_environment(directory: Path) -> Iterator[Environment]:
    environment = Environment(directory, map_bytes=MIB, durable=False)
    yield environment
    environment.close()


def contents(environment: Environment, database: bytes) -> dict[bytes, bytes]:
    return {k: v for keys, values in environment.read(database) for k, v in zip(keys, values, strict=True)}


def image_of(block: int, secret: bytes) -> tuple[memoryview, int]:
    """A block's image, as a store with this secret writes it, and its trailer's checksum."""
    image = scratch(GEOMETRY.image_bytes)
    data = np.frombuffer(image, np.uint8)
    data[:] = 0
    data[: GEOMETRY.payload_bytes] = np.random.default_rng(block).integers(0, 256, GEOMETRY.payload_bytes)
    slices = [image[slice(*GEOMETRY.slice_range(layer))] for layer in range(LAYOUT.layers)]
    trailer = Trailer(CHAIN.keys[block], SHARD, np.array(list(map(checksum, slices)), np.uint64)).encode()
    data[GEOMETRY.trailer_offset :] = np.frombuffer(trailer, np.uint8)
    parent_key = CHAIN.keys[block - 1] if block else CHAIN.parent
    descriptor = Descriptor(64, parent_key, LAYOUT.fingerprint, tenant_tag("default"), 1, checksum(trailer))
    start = descriptor_offset(GEOMETRY)
    data[start : GEOMETRY.trailer_offset] = np.frombuffer(descriptor.encode(trailer, secret), np.uint8)
    return image, checksum(trailer)


async def make_store(path: Path, shared_memory: Path) -> Store:
    path.mkdir()
    index = BlockIndex.open(path / "index", map_bytes=MIB)
    assert index.secret is not None
    store = Store(path, shared_memory, {})
    ssd = SsdTier.open([store.ssd_file], store_id=index.store_id, capacity_bytes=FILE_BYTES, io_threads=1)
    index.remember_ssd_files([store.ssd_file])
    arena = Arena.open(shared_memory, index.store_id, FILE_BYTES)
    index.open_volatile(arena.directory / "index", arena.arena_id, map_bytes=MIB)
    layout_id = await index.put_layout(LAYOUT)
    tiers: list[tuple[TierName, Tier, int]] = [(TierName.SSD, ssd, 4), (TierName.DRAM, DramTier(arena), 3)]
    for name, tier, count in tiers:
        records: Records = new_records(count)
        extents = []
        for block in range(count):
            image, trailer_checksum = image_of(block, index.secret.key)
            extent = tier.reserve(len(image))
            await tier.write(extent, 0, image)
            extents.append(extent)
            records[block]["trailer_checksum"] = trailer_checksum
        records["layout_id"], records["token_count"] = layout_id, 64
        for column, field in enumerate(("segment", "offset_bytes", "size_bytes")):
            records[field] = [extent[column] for extent in extents]
        await index.put(name, KEYS[:count], records)
        store.extents[name] = extents
    index.close()
    ssd.close()
    arena.close()
    return store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    shared_memory = Path(tempfile.mkdtemp(prefix="kvservice-test-", dir="/dev/shm"))
    yield asyncio.run(make_store(tmp_path / "store", shared_memory))
    shutil.rmtree(shared_memory)


def problems(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(problem["tier"], problem["key"], problem["what"]) for problem in report["problems"]]


def repaired(store: Store, *bad: tuple[TierName, int]) -> None:
    """Check, repair, and check again: the damage is gone, and nothing else is lost."""
    code, report = store.check("--repair")
    assert code == 1
    assert report["repaired"] == len(bad)

    code, report = store.check()
    assert (code, problems(report)) == (0, [])
    for tier in (TierName.DRAM, TierName.SSD):
        with opened_environment(store.index_of(tier)) as environment:
            expected = {KEYS[at] for at in range(len(store.extents[tier])) if (tier, at) not in bad}
            assert set(contents(environment, BLOCKS)) == expected


def test_a_sound_store_is_clean_and_counted(store: Store) -> None:
    code, report = store.check()

    assert code == 0
    assert (report["problems"], report["repaired"], report["layouts"]) == ([], 0, 1)
    size = store.extents[TierName.SSD][0].size_bytes
    for tier, count in ((TierName.SSD, 4), (TierName.DRAM, 3)):
        found = report["tiers"][tier]
        assert found["not_checked"] == ""
        assert (found["blocks"], found["bytes_checked"]) == (count, count * GEOMETRY.image_bytes)
        assert (found["used_bytes"], found["capacity_bytes"]) == (count * size, 4 * MIB)
        assert found["free_bytes"] == 4 * MIB - count * size


@pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
@pytest.mark.parametrize("layer", range(3))
def test_a_flipped_bit_in_a_layer_is_found_and_the_block_dropped(store: Store, tier: TierName, layer: int) -> None:
    start, end = GEOMETRY.slice_range(layer)
    store.flip(tier, 1, start if layer % 2 else end - 1, bit=layer)

    assert problems(store.check()[1]) == [(tier, KEYS[1].hex(), f"layer {layer} is damaged")]
    repaired(store, (tier, 1))


@pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
@pytest.mark.parametrize("offset", [0, 4, 6, 8, 40, 48, Trailer.size_bytes(3) - 1])
def test_a_flipped_bit_in_a_trailer_is_found_and_the_block_dropped(store: Store, tier: TierName, offset: int) -> None:
    store.flip(tier, 2, GEOMETRY.trailer_offset + offset)

    assert problems(store.check()[1]) == [(tier, KEYS[2].hex(), "the trailer is damaged")]
    repaired(store, (tier, 2))


@pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
def test_a_flipped_bit_in_a_record_is_found_and_the_record_dropped(store: Store, tier: TierName) -> None:
    def flip(items: dict[bytes, bytes]) -> None:
        items[KEYS[0]] = bytes([items[KEYS[0]][0], items[KEYS[0]][1] ^ 8]) + items[KEYS[0]][2:]

    store.change(tier, BLOCKS, flip)

    assert problems(store.check()[1]) == [(tier, KEYS[0].hex(), "its record does not match its crc")]
    repaired(store, (tier, 0))


@pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"offset_bytes": 4 * MIB}, "is outside the tier"),
        ({"segment": 7}, "is outside the tier"),
        ({"size_bytes": PAGE_BYTES}, "has 4096 bytes and needs"),
        ({"token_count": 65}, "does not fit its layout"),
        ({"token_count": 63}, "trailer is damaged"),
        ({"layout_id": 9}, "layout is unknown"),
        ({"trailer_checksum": 1}, "trailer is damaged"),
    ],
)
def test_a_record_that_contradicts_the_store_is_found_and_dropped(
    store: Store, tier: TierName, fields: dict[str, int], what: str
) -> None:
    if tier == TierName.DRAM and "trailer_checksum" in fields:
        what = "copy on SSD has other bytes"
    block = 2 if tier == TierName.DRAM else 3  # A block without a copy in the other tier.
    store.change_record(tier, block, **fields)

    [(found_tier, key, found)] = problems(store.check()[1])
    assert (found_tier, key) == (tier, KEYS[block].hex())
    assert what in found
    repaired(store, (tier, block))


def test_the_bytes_of_another_shard_are_not_taken_for_those_of_this_one(store: Store) -> None:
    other = object_key(CHAIN.keys[3], OTHER_SHARD)

    def move(items: dict[bytes, bytes]) -> None:
        [items[other]] = encode_records([other], np.frombuffer(items[KEYS[3]], RECORD))

    store.change(TierName.SSD, BLOCKS, move)
    with opened_environment(store.index_of(TierName.SSD)) as environment:
        asyncio.run(delete(environment, KEYS[3]))

    assert problems(store.check()[1]) == [("ssd", other.hex(), "the trailer is damaged")]


async def delete(environment: Environment, key: bytes) -> None:
    await environment.delete(BLOCKS, [key])


def test_of_two_blocks_in_one_place_neither_is_kept(store: Store) -> None:
    store.change_record(TierName.SSD, 1, offset_bytes=store.extents[TierName.SSD][0].offset_bytes)

    found = problems(store.check()[1])
    assert {key for _, key, _ in found} == {KEYS[0].hex(), KEYS[1].hex()}
    assert {what for _, _, what in found} == {"its extent overlaps another"}
    repaired(store, (TierName.SSD, 0), (TierName.SSD, 1))


def damage_layout(items: dict[bytes, bytes]) -> None:
    items[LAYOUT.fingerprint] = items[LAYOUT.fingerprint][:-1] + b"\0"


def test_a_damaged_layout_with_a_sound_copy_costs_no_block(store: Store) -> None:
    store.change(TierName.SSD, LAYOUTS, damage_layout)
    problem = (
        "index",
        LAYOUT.fingerprint.hex(),
        "its layout's entry is damaged, and its copy in the folder layouts is sound",
    )

    before = (store.path / "index" / "data.mdb").read_bytes()
    code, report = store.check()
    assert (code, problems(report), report["repaired"]) == (1, [problem], 0)
    assert (store.path / "index" / "data.mdb").read_bytes() == before, "looking writes nothing"

    code, report = store.check("--repair")
    assert (code, problems(report), report["repaired"]) == (1, [problem], 1)
    code, report = store.check()
    assert (code, report["tiers"]["ssd"]["blocks"], report["tiers"]["dram"]["blocks"]) == (0, 4, 3)


def test_looking_at_an_index_that_begins_with_zeros_never_makes_an_empty_one(store: Store, tmp_path: Path) -> None:
    """Without the identity file, and with the SSD files in another folder: nothing else identifies the store."""
    (store.path / "store_id").unlink()
    ssd_file = store.ssd_file.rename(tmp_path / "elsewhere.kv")
    path = store.path / "index" / "data.mdb"
    found = bytes(2 * PAGE_BYTES) + path.read_bytes()[2 * PAGE_BYTES :]
    for content in (found, bytes(len(found))):
        path.write_bytes(content)
        code, report = store.check()
        assert (code, report["repaired"]) == (1, 0)
        assert path.read_bytes() == content
    path.write_bytes(found)
    ssd_file.rename(store.ssd_file)
    assert store.check("--rebuild")[0] < 2
    code, report = store.check()
    assert (code, report["tiers"]["ssd"]["blocks"]) == (0, 4)


@pytest.mark.parametrize("where", ["store_id", "index"])
def test_repair_takes_the_id_that_most_of_the_store_names(store: Store, where: str) -> None:
    """One bit of the id flipped in one of its places: the store is usable afterwards, with all its blocks."""
    identity = store.path / "store_id"
    sound = identity.read_text()
    if where == "store_id":
        identity.write_text(("0" if sound[0] != "0" else "1") + sound[1:])
    else:
        found = bytes.fromhex(sound.strip())
        store.change(TierName.SSD, META, lambda items: items.update({b"store_id": bytes([found[0] ^ 1]) + found[1:]}))

    assert "another store's" in problems(store.check()[1])[0][2]
    assert store.check("--repair")[0] == 1

    code, report = store.check()
    assert (code, problems(report)) == (0, [])
    assert (report["store_id"], identity.read_text()) == (sound.strip(), sound)
    assert (report["tiers"]["ssd"]["blocks"], report["tiers"]["dram"]["blocks"]) == (4, 3)


def test_blocks_of_a_lost_layout_are_dropped_with_it(store: Store) -> None:
    store.change(TierName.SSD, LAYOUTS, damage_layout)
    shutil.rmtree(store.path / "layouts")

    code, report = store.check("--repair")
    assert (code, report["repaired"]) == (1, 1 + 4 + 3)
    assert ("index", LAYOUT.fingerprint.hex(), "its layout's entry is damaged") in problems(report)
    assert store.check()[0] == 0


def test_a_damaged_session_is_found_and_dropped(store: Store) -> None:
    name = session_name(1, "chat")
    store.change(TierName.SSD, SESSIONS, lambda items: items.update({name: b"damaged"}))

    code, report = store.check("--repair")
    assert (code, report["repaired"], report["sessions"]) == (1, 1, 0)
    assert ("index", name.hex(), "its session's record is damaged") in problems(report)
    assert store.check()[0] == 0


def test_looking_changes_nothing(store: Store) -> None:
    store.flip(TierName.SSD, 0, 0)
    store.flip(TierName.DRAM, 1, 0)

    assert store.check() == store.check()


@pytest.mark.parametrize("damage", ["truncated", "of another store"])
def test_ssd_files_that_cannot_be_used_are_a_problem_that_costs_no_record(
    store: Store, tmp_path: Path, damage: str
) -> None:
    kept = tmp_path / "kept"
    shutil.copy(store.ssd_file, kept)
    with store.ssd_file.open("r+b") as file:
        if damage == "truncated":
            file.truncate(MIB)
        else:
            file.seek(8)
            file.write(bytes(16))

    code, report = store.check("--repair")
    assert (code, report["repaired"]) == (1, 0)
    assert str(store.ssd_file) in report["tiers"]["ssd"]["not_checked"]

    kept.replace(store.ssd_file)
    assert store.check()[0] == 0


def test_a_missing_ssd_file_is_a_problem_that_looking_leaves_as_it_is(store: Store, tmp_path: Path) -> None:
    kept = store.ssd_file.rename(tmp_path / "kept")

    code, report = store.check()
    assert (code, report["repaired"]) == (1, 0)
    [(tier, _, what)] = problems(report)
    assert tier == "ssd"
    assert f"{store.ssd_file} is missing, and 4 blocks with it: mount its drive" in what
    assert not store.ssd_file.exists(), "no file is made"

    kept.rename(store.ssd_file)
    assert store.check()[0] == 0


def test_repair_gives_the_blocks_of_a_missing_ssd_file_up_and_says_so(store: Store) -> None:
    store.ssd_file.unlink()

    code, report = store.check("--repair")
    assert (code, report["repaired"]) == (1, 4)
    assert report["given_up"] == [
        f"{store.ssd_file} and the 4 blocks in it; the next start creates the file again, if ssd.paths still has its "
        "folder"
    ]

    assert not store.ssd_file.exists()
    with opened_environment(store.index_of(TierName.SSD)) as environment:
        assert contents(environment, BLOCKS) == {}
    index = BlockIndex.open(store.path / "index", map_bytes=MIB)
    assert index.ssd_files == []
    index.close()
    code, report = store.check()
    assert (code, report["tiers"]["dram"]["blocks"]) == (0, 3), "what is in DRAM stays"


def test_repair_keeps_the_blocks_of_ssd_files_that_are_there(store: Store, tmp_path: Path) -> None:
    """Two drives, one of them missing: the first three blocks are on the other one."""
    away = tmp_path / "away" / "ssd-001.kv"
    store.change_record(TierName.SSD, 3, segment=1)
    index = BlockIndex.open(store.path / "index", map_bytes=MIB)
    index.remember_ssd_files([store.ssd_file, away])
    index.close()

    code, report = store.check("--repair")

    assert (code, report["repaired"]) == (1, 1)
    assert [what.partition(";")[0] for what in report["given_up"]] == [f"{away} and the 1 blocks in it"]
    with opened_environment(store.index_of(TierName.SSD)) as environment:
        assert sorted(contents(environment, BLOCKS)) == sorted(KEYS[:3])
    index = BlockIndex.open(store.path / "index", map_bytes=MIB)
    assert index.ssd_files == [store.ssd_file, None]
    index.close()
    assert store.check()[0] == 0, "the daemon has not made the file yet"


def test_records_without_any_ssd_file_are_a_problem(store: Store) -> None:
    store.change(TierName.SSD, META, lambda items: items.update({b"ssd_files": b""}))
    store.ssd_file.unlink()

    code, report = store.check("--repair")

    assert (code, report["repaired"]) == (1, 0)
    assert problems(report) == [("ssd", "", "there are records, and no file is known")]


@pytest.mark.parametrize("damage", ["deleted", "truncated", "of another store", "index deleted", "index of another"])
def test_an_arena_that_is_not_the_stores_is_left_alone_and_no_problem(store: Store, damage: str) -> None:
    arena = store.arena_file
    if damage == "deleted":
        arena.unlink()
    elif damage == "truncated":
        with arena.open("r+b") as file:
            file.truncate(MIB)
    elif damage == "of another store":
        with arena.open("r+b") as file:
            file.seek(24)
            file.write(bytes(16))
    elif damage == "index deleted":
        shutil.rmtree(arena.parent / "index")
    else:
        store.change(TierName.DRAM, META, lambda items: items.update({b"arena_id": bytes(16)}))
    files = {path: path.stat().st_mtime_ns for path in store.shared_memory.rglob("*") if path.is_file()}

    code, report = store.check("--repair")

    assert (code, report["problems"]) == (0, [])
    assert report["tiers"]["dram"]["not_checked"]
    assert report["tiers"]["ssd"]["blocks"] == 4
    assert {path: path.stat().st_mtime_ns for path in store.shared_memory.rglob("*") if path.is_file()} == files


def test_a_store_whose_shrinking_was_killed_is_completed_by_the_next_start(store: Store) -> None:
    index = BlockIndex.open(store.path / "index", map_bytes=MIB)
    arena = Arena.open(store.shared_memory, index.store_id, FILE_BYTES // 2)
    smaller = arena.create_smaller()
    index.replace_volatile(arena.directory / "index", smaller.arena_id, [], new_records(0), map_bytes=MIB)
    for each in (smaller, arena, index):
        each.close()
    code, report = store.check()
    assert code == 0
    said = "a start that made the tier smaller was interrupted: the next start completes it"
    assert report["tiers"]["dram"]["not_checked"] == said


def test_a_store_that_moved_is_checked_where_it_is_now(store: Store, tmp_path: Path) -> None:
    moved = Store(tmp_path / "moved", store.shared_memory, store.extents)
    shutil.copytree(store.path, moved.path)
    moved.flip(TierName.SSD, 0, 0)

    assert store.check()[0] == 0
    assert problems(moved.check()[1]) == [("ssd", KEYS[0].hex(), "layer 0 is damaged")]


def test_a_store_in_use_is_not_checked(store: Store) -> None:
    lock = StoreLock(store.path / "lock")
    code, report = store.check()
    lock.release()

    assert code == 2
    assert "in use by process" in report["error"]
    assert store.check()[0] == 0


@pytest.mark.parametrize("option", ["--repair", "--rebuild"])
def test_a_store_of_a_newer_schema_is_left_alone(store: Store, option: str) -> None:
    store.change(TierName.SSD, META, lambda items: items.update({b"schema": b"99"}))

    code, report = store.check(option)

    assert code == 2
    assert "99" in report["error"]
    assert "run the KVService that wrote it" in report["error"]
    assert store.check()[0] == 2


def test_a_folder_without_a_store_stays_as_it_is(tmp_path: Path) -> None:
    code, report = Store(tmp_path, tmp_path, {}).check()

    assert code == 2
    assert "no store" in report["error"]
    assert not list(tmp_path.iterdir())


def test_an_index_that_is_no_index_is_a_problem_without_repair(store: Store) -> None:
    (store.path / "index" / "data.mdb").write_bytes(b"\xff" * 65536)

    code, report = store.check("--repair")

    assert (code, report["repaired"]) == (1, 0)
    assert "one of its first two pages is damaged" in report["problems"][0]["what"]
    assert "cannot be repaired: no record" in report["problems"][1]["what"]
    assert (store.path / "index" / "data.mdb").read_bytes() == b"\xff" * 65536, "it is left as it was"


@pytest.mark.parametrize(("seed", "count"), [(1, 16), pytest.param(2, 2000, marks=pytest.mark.slow)])
def test_with_any_bit_of_the_durable_index_flipped_a_check_ends_with_a_report_and_the_blocks_are_found(
    store: Store, tmp_path: Path, seed: int, count: int
) -> None:
    """Also for a file that is truncated at any place."""
    chooser = random.Random(seed)
    kept = shutil.copytree(store.path, tmp_path / "kept")
    whole = (kept / "index" / "data.mdb").read_bytes()
    in_use = sorted({0, 1, *pages.leaf_pages_in_use(kept / "index" / "data.mdb")})
    for number in range(count):
        shutil.rmtree(store.path)
        shutil.copytree(kept, store.path)
        data = bytearray(whole)
        if number % 8 == 7:
            cut = chooser.randrange(len(data))
            del data[cut:]
            doing = f"cut to {cut} bytes"
        else:
            offset = chooser.choice(in_use) * PAGE_BYTES + int(chooser.choice((16, 160, PAGE_BYTES)) * chooser.random())
            data[offset] ^= 1 << (bit := chooser.randrange(8))
            doing = f"bit {bit} of byte {offset}"
        (store.path / "index" / "data.mdb").write_bytes(data)
        code, report = store.check()
        assert code in (0, 1) or "index" in report["error"] or "schema" in report["error"], doing
        repairs = number % 2 == 0
        if repairs:
            store.check("--repair")
        code, report = store.check("--rebuild")
        assert code < 2, (doing, report)
        code, report = store.check()
        assert (code, report["tiers"]["ssd"]["blocks"]) == (0, 4), (doing, repairs, report)


def test_people_read_lines(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(store.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"store    {store.path}, id ")
    assert lines[2].startswith("ssd      4 blocks, ")
    assert lines[-1] == "clean"

    store.flip(TierName.DRAM, 0, 0)
    assert check.main([str(store.path), "--repair"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [f"problem  dram {KEYS[0].hex()}: layer 0 is damaged", "1 problems found, 1 repaired"]
