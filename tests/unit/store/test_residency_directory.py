"""The residency directory: its entries equal the daemon's block table, and clients read them in shared memory."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.blocks import BlockTable, TierName
from kvservice.store.directory import DirectoryTable
from kvservice.tiers.files import FileCalls
from kvservice_api.layout import Shard
from kvservice_api.residency_directory import (
    HEADER_BYTES,
    IN_DRAM,
    ON_SSD,
    SLOT_BYTES,
    DirectoryState,
    Header,
    layout_mark,
    tail_key,
)
from kvservice_client.local_directory import DirectoryMapping, LocalDirectory, LocalHit
from tests.directories import ARENA_ID, LAYOUTS, SHARDS, STORE_ID, DirectoryFixture
from tests.directory_reader import ALWAYS, NEVER, object_of
from tests.mounts import tmpfs
from tests.stores import until

# Home slots at both ends of the table, so that searches wrap around.
KEYS = [
    home.to_bytes(8, "little", signed=True) + hashlib.sha256(bytes([number])).digest()[8:]
    for number, home in enumerate([0, 0, 1, 2, 5, -1, -1, -1, -2, -3, 0, -1, 3, 1000, 5000, -400])
]
MARK = layout_mark(LAYOUTS[1].fingerprint)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvservice-test-", dir="/dev/shm") as path:
        yield Path(path)


async def kept(made: DirectoryFixture) -> asyncio.Task[None]:
    """Fill it, and run its background task until the caller cancels."""
    task = asyncio.create_task(made.directory.keep())
    await until(lambda: look_up(made, LocalDirectory(), KEYS[:1]) is not None)
    return task


def look_up(
    made: DirectoryFixture,
    client: LocalDirectory,
    keys: list[bytes],
    *,
    layout_id: int = 1,
    shard: Shard = SHARDS[0],
    store_id: bytes = STORE_ID,
    epoch: int | None = None,
) -> tuple[int, int, int] | None:
    """Leading blocks, those in DRAM, those on SSD."""
    path = str(made.folder / "directory")
    mark = LAYOUTS[layout_id].fingerprint
    hit = client.look_up(path, store_id, made.epoch if epoch is None else epoch, b"".join(keys), mark, shard)
    return hit and hit[:3]


# The table against a dict

steps = st.lists(
    st.tuples(
        st.sampled_from(["dram", "ssd", "dram", "evict dram", "evict ssd", "drop", "wait"]),
        st.integers(0, len(KEYS) - 1),
        st.sampled_from(SHARDS),
        st.sampled_from([1, 2]),
    ),
    max_size=70,
)


@given(steps=steps)
def test_the_directory_says_what_a_dict_would(steps: list[tuple[str, int, Shard, int]]) -> None:
    asyncio.run(_follow(steps))


async def _follow(steps: list[tuple[str, int, Shard, int]]) -> None:
    stored: dict[tuple[bytes, Shard], tuple[int, int]] = {}  # Layout and flags.
    with tempfile.TemporaryDirectory(prefix="kvservice-test-", dir="/dev/shm") as path:
        made = DirectoryFixture(Path(path))
        task = await kept(made)
        client = LocalDirectory()
        look_up(made, client, KEYS)
        for what, number, shard, layout_id in steps:
            name = KEYS[number], shard
            if what in ("dram", "ssd"):
                layout_id = stored.get(name, (layout_id, 0))[0]
                made.put(*name, layout_id, TierName(what))
                stored[name] = layout_id, stored.get(name, (0, 0))[1] | (IN_DRAM if what == "dram" else ON_SSD)
                await until(lambda: made.fill <= 0.7)  # Tables of this size are full before they are replaced.
            elif what.startswith("evict") and name in stored:
                made.blocks.set_extent(made.blocks.row_of(*name), TierName(what[6:]), None)
                stored[name] = stored[name][0], stored[name][1] & ~(IN_DRAM if what == "evict dram" else ON_SSD)
            elif what == "drop" and name in stored:
                made.drop(*name)
                del stored[name]
            elif what == "wait":
                await asyncio.sleep(0)
            with_mapping = _mapping(made)
            for wanted in SHARDS:
                _compare(with_mapping, stored, wanted)
        task.cancel()
        made.directory.close()


def _mapping(made: DirectoryFixture) -> DirectoryMapping:
    fd = os.open(made.directory.path, os.O_RDONLY)
    try:
        return DirectoryMapping(fd)
    finally:
        os.close(fd)


def _compare(mapping: DirectoryMapping, stored: dict[tuple[bytes, Shard], tuple[int, int]], wanted: Shard) -> None:
    """If several shards match, the first found one is enough: the flags are those of one of them."""
    flags, in_doubt = mapping.find(b"".join(KEYS), MARK, wanted)
    for key, found, doubted in zip(KEYS, flags.tolist(), in_doubt.tolist(), strict=True):
        expected = others = 0
        for (other, shard), (layout_id, resident) in stored.items():
            if other == key and layout_id == 1 and shard.covers(wanted):
                expected |= resident
            elif other == key:
                others |= resident
        assert bool(found) == bool(expected) and not found & ~expected
        assert doubted == (not expected and others != 0)


# Readers in other processes


async def test_readers_in_other_processes_never_find_what_is_not_stored(folder: Path) -> None:
    made = DirectoryFixture(folder, slots_min=64)
    for number in range(ALWAYS):
        made.put(*object_of(number))
    task = await kept(made)
    command = [sys.executable, "-m", "tests.directory_reader", made.directory.path, str(made.epoch), "1000"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    readers = [
        await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, env=environment) for _ in range(2)
    ]
    answering = asyncio.gather(*(reader.communicate() for reader in readers))
    chosen = random.Random(1)
    there: set[int] = set()
    while not answering.done():
        for _ in range(10):
            number = chosen.randrange(ALWAYS, NEVER)
            key, shard, layout_id = object_of(number)
            if number not in there:
                made.put(key, shard, layout_id, chosen.choice([TierName.DRAM, TierName.SSD]))
            else:
                made.drop(key, shard)
            there ^= {number}
        await asyncio.sleep(0)
        await until(lambda: made.fill <= 0.7)
    answers = [json.loads(printed) for printed, _ in await answering]
    task.cancel()
    made.directory.close()

    for answer in answers:
        assert answer.get("wrong", 0) == answer.get("lost", 0) == 0
        assert answer["hits"] > 20
        assert answer["misses"] > 100


async def _one_slot(folder: Path) -> tuple[DirectoryFixture, int]:
    """A directory with one block in it, and where in the file its slot is."""
    made = DirectoryFixture(folder)
    made.put(KEYS[4])
    (await kept(made)).cancel()
    assert look_up(made, LocalDirectory(), [KEYS[4]]) == (1, 1, 0)
    return made, HEADER_BYTES + 5 * SLOT_BYTES


def _flip(made: DirectoryFixture, at: int) -> None:
    fd = os.open(made.directory.path, os.O_RDWR)
    try:
        os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 1]), at)
    finally:
        os.close(fd)


async def test_a_slot_that_is_being_written_is_no_hit_and_the_answer_is_in_doubt(folder: Path) -> None:
    made, slot = await _one_slot(folder)
    _flip(made, slot)

    assert look_up(made, LocalDirectory(), [KEYS[4]]) is None
    made.put(KEYS[4], tier=TierName.SSD)
    assert look_up(made, LocalDirectory(), [KEYS[4]]) == (1, 1, 1), "the next writing ends well"


@pytest.mark.parametrize("byte", [4, 8, 12, 17, 24])
async def test_a_slot_whose_parts_do_not_belong_together_is_no_hit_and_the_answer_is_in_doubt(
    folder: Path, byte: int
) -> None:
    made, slot = await _one_slot(folder)
    _flip(made, slot + byte)
    if byte == 8:
        _flip(made, slot + 8)
        _flip(made, slot + 9)

    assert look_up(made, LocalDirectory(), [KEYS[4]]) is None


@pytest.mark.parametrize("order", [1, -1, 7, 11])
async def test_what_leaves_hides_nothing_that_stays_and_leaves_no_trace_in_the_end(folder: Path, order: int) -> None:
    made = DirectoryFixture(folder, slots_min=64)
    keys = [(60).to_bytes(8, "little") + bytes([number] * 24) for number in range(40)]  # All have the same home slot.
    for key in keys:
        made.put(key)
    task = await kept(made)
    left = set(keys)
    for number in range(len(keys)):
        leaving = keys[number * order % len(keys)]
        made.drop(leaving)
        left.remove(leaving)
        assert all(look_up(made, LocalDirectory(), [key]) == (1, 1, 0) for key in left)

    assert made.fill == 0
    task.cancel()


async def test_an_answer_ends_at_the_first_block_that_is_missing_however_long_the_question(folder: Path) -> None:
    made = DirectoryFixture(folder, slots_min=8192)
    keys = [hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(3000)]
    for key in keys:
        made.put(key)
        made.put(key, tier=TierName.SSD)
    task = await kept(made)
    client = LocalDirectory()

    assert look_up(made, client, keys) == (3000, 3000, 3000)
    made.drop(keys[1500])
    assert look_up(made, client, keys) == (1500, 1500, 1500)
    made.blocks.set_extent(made.blocks.row_of(keys[7], SHARDS[0]), TierName.DRAM, None)
    assert look_up(made, client, keys[:20]) == (20, 19, 20)
    assert look_up(made, client, []) == (0, 0, 0)
    task.cancel()


# Files


async def test_what_comes_and_goes_does_not_make_it_grow(folder: Path) -> None:
    made = DirectoryFixture(folder, slots_min=64)
    task = await kept(made)
    for number in range(3000):
        key = hashlib.sha256(number.to_bytes(4, "big")).digest()
        made.put(key)
        await until(lambda: made.fill <= 0.7)
        made.drop(key)
    task.cancel()

    assert _mapping(made).header.slot_count == 64


async def test_a_larger_file_takes_over_while_blocks_come_and_go(folder: Path) -> None:
    made = DirectoryFixture(folder, slots_min=1024)
    task = await kept(made)
    client = LocalDirectory()
    assert look_up(made, client, KEYS) == (0, 0, 0)
    first = _mapping(made)
    keys = [hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(5000)]
    for number, key in enumerate(keys):
        made.put(key)
        if number % 3 == 2:
            made.drop(keys[number - 1])
        if number % 16 == 0:
            await asyncio.sleep(0)
        await until(lambda: made.fill <= 0.9)  # The larger one is made from 0.7 on; none is made once this one is full.
    await until(lambda: made.fill <= 0.7)

    assert not first.is_good_for(STORE_ID, made.epoch)
    dropped = set(keys[1::3])
    for start in range(0, len(keys), 2):
        key = keys[start]
        assert look_up(made, client, [key]) == ((0, 0, 0) if key in dropped else (1, 1, 0))
    assert sorted(path.name for path in folder.iterdir()) == ["directory"]
    task.cancel()


class FullTmpfs(FileCalls):
    """Allocates space for the first `files` files only."""

    def __init__(self, files: int) -> None:
        self.files = files

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        self.files -= 1
        if self.files < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().posix_fallocate(fd, offset, length)


async def test_without_space_there_is_none_and_the_log_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = DirectoryFixture(folder, calls=FullTmpfs(0))
    made.put(KEYS[0])
    await made.directory.keep()

    assert made.directory.path == ""
    assert look_up(made, LocalDirectory(), KEYS) is None
    assert not list(folder.iterdir())
    assert "no residency directory" in caplog.text


@pytest.mark.parametrize("bytes_max", [1 << 24, HEADER_BYTES + 64 * SLOT_BYTES])
async def test_one_that_may_not_grow_is_closed(folder: Path, bytes_max: int) -> None:
    made = DirectoryFixture(folder, slots_min=64, bytes_max=bytes_max, calls=FullTmpfs(1))
    task = await kept(made)
    mapping = _mapping(made)
    for number in range(46):
        made.put(hashlib.sha256(bytes([number])).digest())
    await task

    assert made.directory.path == ""
    assert not mapping.is_good_for(STORE_ID, made.epoch)
    assert look_up(made, LocalDirectory(), KEYS) is None
    assert not list(folder.iterdir())


async def test_one_that_runs_full_before_it_can_be_replaced_is_closed(folder: Path) -> None:
    made = DirectoryFixture(folder, slots_min=64)
    task = await kept(made)
    for number in range(65):
        made.put(hashlib.sha256(bytes([number])).digest())

    await task
    assert made.directory.path == ""
    assert not list(folder.iterdir())


class SlowTmpfs(FileCalls):
    """Creates the first file at once, and others when the test allows it."""

    def __init__(self) -> None:
        self.files = 0
        self.go_on = threading.Event()

    def open(self, path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
        self.files += 1
        assert self.files == 1 or self.go_on.wait(60)
        return super().open(path, flags, mode)


async def test_one_that_runs_full_while_its_successor_is_made_leaves_nothing_behind(folder: Path) -> None:
    calls = SlowTmpfs()
    made = DirectoryFixture(folder, slots_min=64, calls=calls)
    task = await kept(made)
    for number in range(46):
        made.put(hashlib.sha256(bytes([number])).digest())
    await until(lambda: calls.files == 2)
    for number in range(46, 66):
        made.put(hashlib.sha256(bytes([number])).digest())
    calls.go_on.set()
    await task

    assert made.directory.path == ""
    assert not list(folder.iterdir())


async def test_a_daemon_that_stops_while_a_successor_is_made_leaves_nothing_behind(folder: Path) -> None:
    calls = SlowTmpfs()
    made = DirectoryFixture(folder, slots_min=64, calls=calls)
    task = await kept(made)
    for number in range(46):
        made.put(hashlib.sha256(bytes([number])).digest())
    await until(lambda: calls.files == 2)
    task.cancel()
    asyncio.get_running_loop().call_later(0.01, calls.go_on.set)
    await asyncio.wait([task])
    made.directory.close()
    await asyncio.get_running_loop().shutdown_default_executor()

    assert task.cancelled()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("bytes_max", [0, HEADER_BYTES + SLOT_BYTES])
def test_a_limit_below_what_it_needs_means_none(folder: Path, bytes_max: int) -> None:
    assert DirectoryFixture(folder, bytes_max=bytes_max).directory.path == ""
    assert not list(folder.iterdir())


def test_a_limit_makes_it_smaller_as_long_as_all_blocks_fit(folder: Path) -> None:
    made = DirectoryFixture(folder, blocks=BlockTable(1 << 16), bytes_max=HEADER_BYTES + 128 * SLOT_BYTES)

    assert _mapping(made).header.slot_count == 128


def test_of_a_small_tmpfs_it_takes_a_sixteenth_unless_blocks_need_more(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "shm", 8 << 20) as folder:
        made = DirectoryFixture(folder, blocks=BlockTable(1 << 16))
        assert _mapping(made).header.file_bytes <= (8 << 20) // 16
        assert _mapping(made).header.file_bytes > (8 << 20) // 64
        for number in range(9000):
            made.put(hashlib.sha256(number.to_bytes(4, "big")).digest())
            if number == 2000:
                made.directory.close()  # It would request its replacement, and this test runs no task that does it.
        again = DirectoryFixture(folder, blocks=made.blocks)
        assert _mapping(again).header.slot_count == 16384
        again.directory.close()


async def test_nothing_is_trusted_before_all_blocks_are_in_it(folder: Path) -> None:
    made = DirectoryFixture(folder)
    made.put(KEYS[0])
    assert made.directory.path
    assert look_up(made, LocalDirectory(), KEYS[:1]) is None

    task = await kept(made)
    assert look_up(made, LocalDirectory(), KEYS[:1]) == (1, 1, 0)
    task.cancel()


async def test_blocks_of_before_are_filled_in_and_none_twice(folder: Path) -> None:
    blocks = BlockTable(4)
    made = DirectoryFixture(folder, blocks=blocks)
    for key in KEYS[:5]:
        made.put(key)
    made.directory.close()
    again = DirectoryFixture(folder, blocks=blocks, epoch=8)
    again.put(KEYS[5])
    again.drop(KEYS[1])
    task = await kept(again)

    assert look_up(again, LocalDirectory(), [KEYS[0], *KEYS[2:6]]) == (5, 5, 0)
    assert look_up(again, LocalDirectory(), KEYS[1:2]) == (0, 0, 0)
    assert isinstance(table := again.directory._current, DirectoryTable)
    assert table.used_slots == 5
    task.cancel()


async def test_another_life_or_another_store_is_not_trusted(folder: Path) -> None:
    made = DirectoryFixture(folder)
    made.put(KEYS[0])
    task = await kept(made)
    client = LocalDirectory()

    assert look_up(made, client, KEYS[:1], epoch=8) is None
    assert look_up(made, client, KEYS[:1], store_id=bytes(16)) is None
    assert look_up(made, client, KEYS[:1]) == (1, 1, 0)
    task.cancel()


async def test_a_mapping_ends_with_its_daemon_and_the_next_one_takes_its_place(folder: Path) -> None:
    killed = DirectoryFixture(folder)
    killed.put(KEYS[0])
    task = await kept(killed)
    task.cancel()
    client = LocalDirectory()
    assert look_up(killed, client, KEYS[:1]) == (1, 1, 0)

    following = DirectoryFixture(folder, epoch=8)
    assert look_up(killed, client, KEYS[:1]) is None, "the file of the one that was killed says that it is over"
    task = await kept(following)
    assert look_up(following, client, KEYS[:1]) == (0, 0, 0)
    following.directory.close()
    assert look_up(following, client, KEYS[:1]) is None
    assert not list(folder.iterdir())
    task.cancel()


def _directory_file(folder: Path, data: bytes) -> Path:
    path = folder / "directory"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [0, 63, HEADER_BYTES, HEADER_BYTES + 64 * SLOT_BYTES - 1])
def test_a_cut_off_file_is_no_directory(folder: Path, size: int) -> None:
    whole = Header(STORE_ID, ARENA_ID, 7, 64, DirectoryState.LIVE).encode().ljust(HEADER_BYTES + 64 * SLOT_BYTES, b"\0")
    path = _directory_file(folder, whole[:size])

    assert LocalDirectory().look_up(str(path), STORE_ID, 7, KEYS[0], MARK, SHARDS[0]) is None
    path.write_bytes(whole)
    assert LocalDirectory().look_up(str(path), STORE_ID, 7, KEYS[0], MARK, SHARDS[0]) == LocalHit(0, 0, 0)


@pytest.mark.parametrize("slots", [1 << 40, 1 << 63])
def test_a_header_of_more_slots_than_can_be_is_no_directory(folder: Path, slots: int) -> None:
    path = _directory_file(
        folder, Header(STORE_ID, ARENA_ID, 7, slots, DirectoryState.LIVE).encode().ljust(HEADER_BYTES, b"\0")
    )
    assert LocalDirectory().look_up(str(path), STORE_ID, 7, KEYS[0], MARK, SHARDS[0]) is None


def test_a_path_that_is_not_a_regular_file_is_not_opened_and_does_not_block(folder: Path) -> None:
    os.mkfifo(folder / "directory")
    for path in (folder / "directory", folder, folder / "nothing", "", "/proc/self/mem"):
        assert LocalDirectory().look_up(str(path), STORE_ID, 7, KEYS[0], MARK, SHARDS[0]) is None


def test_a_search_that_finds_no_end_leaves_the_answer_in_doubt(folder: Path) -> None:
    slots = 2048
    other = bytes(range(1, SLOT_BYTES + 1))
    header = Header(STORE_ID, ARENA_ID, 7, slots, DirectoryState.LIVE).encode().ljust(HEADER_BYTES, b"\0")
    path = _directory_file(folder, header + (bytes([2]) + other[1:]) * slots)

    assert LocalDirectory().look_up(str(path), STORE_ID, 7, KEYS[0], MARK, SHARDS[0]) is None


# Tails


def tail_after(made: DirectoryFixture, parent: bytes) -> bool | None:
    """Whether a tail may continue the key."""
    path = str(made.folder / "directory")
    hit = LocalDirectory().look_up(path, STORE_ID, made.epoch, b"", MARK, SHARDS[0], parent)
    assert hit is not None
    return hit.may_have_tail


@pytest.mark.parametrize("is_first", [True, False], ids=["before it is filled", "after that"])
async def test_a_parent_has_a_tail_until_the_last_partial_block_of_it_is_deleted(folder: Path, is_first: bool) -> None:
    made = DirectoryFixture(folder)
    task = None if is_first else await kept(made)
    for key in KEYS[1:3]:
        made.put(key, parent=KEYS[0])
    task = task or await kept(made)

    assert (tail_after(made, KEYS[0]), tail_after(made, KEYS[1])) == (True, False)
    assert look_up(made, LocalDirectory(), KEYS[1:3]) == (2, 2, 0)
    made.drop(KEYS[1])
    assert tail_after(made, KEYS[0])
    made.drop(KEYS[2])
    assert tail_after(made, KEYS[0]) is False
    task.cancel()


async def test_slots_of_tails_are_no_hits_for_readers_of_blocks(folder: Path) -> None:
    made = DirectoryFixture(folder)
    task = await kept(made)
    made.put(KEYS[1], parent=KEYS[0])

    assert look_up(made, LocalDirectory(), [tail_key(KEYS[0])]) == (0, 0, 0)
    task.cancel()


async def test_a_directory_that_grows_keeps_its_tails(folder: Path) -> None:
    made = DirectoryFixture(folder)
    task = await kept(made)
    slots = _mapping(made).header.slot_count
    keys = [hashlib.sha256(bytes([number])).digest() for number in range(60)]
    for key in keys:
        made.put(key, parent=hashlib.sha256(key).digest())
        await until(lambda: made.fill <= 0.7)

    await until(lambda: _mapping(made).header.slot_count > slots)
    assert all(tail_after(made, hashlib.sha256(key).digest()) for key in keys)
    task.cancel()


async def test_it_has_room_for_the_tails_of_a_store_of_partial_blocks(folder: Path) -> None:
    blocks = BlockTable(1 << 10)
    before = DirectoryFixture(folder, blocks=blocks)
    before.directory.close()
    keys = [hashlib.sha256(number.to_bytes(2, "big")).digest() for number in range(700)]
    for key in keys:
        before.put(key, parent=hashlib.sha256(key).digest())
    made = DirectoryFixture(folder, blocks=blocks)
    task = await kept(made)

    assert all(tail_after(made, hashlib.sha256(key).digest()) for key in keys)
    task.cancel()


async def test_a_directory_of_a_daemon_that_publishes_no_tails_says_nothing_of_them(folder: Path) -> None:
    made = DirectoryFixture(folder)
    task = await kept(made)
    with (made.folder / "directory").open("r+b") as file:
        file.seek(64)
        file.write(bytes(4))  # As such a daemon writes it.

    assert tail_after(made, KEYS[0]) is None
    task.cancel()
