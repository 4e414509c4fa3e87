"""The DRAM tier and its arena, on a real shared-memory file system."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from kvservice.blocks import Extent
from kvservice.tiers import arena as arena_module
from kvservice.tiers.arena import Arena
from kvservice.tiers.base import StoreMismatch
from kvservice.tiers.dram import DramTier
from kvservice_api.mapping import HUGE_PAGE_BYTES, Mapping
from tests.contracts.tier import KIB, MIB, PAGE, TierContract, columns, noise, stored
from tests.file_faults import FaultyCalls

STORE, OTHER_STORE = bytes(range(16)), bytes(range(16, 32))
CAPACITY = 8 * MIB


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvservice-test-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def open_arena(shm: Path) -> Iterator[Callable[..., Arena]]:
    """Opens arenas in `shm`, and closes them at the end."""
    opened: list[Arena] = []

    def open_arena(
        store_id: bytes = STORE, capacity_bytes: int = CAPACITY, calls: FaultyCalls | None = None, parent: Path = shm
    ) -> Arena:
        opened.append(Arena.open(parent, store_id, capacity_bytes, calls=calls))
        return opened[-1]

    yield open_arena
    for arena in opened:
        if hasattr(arena, "data"):
            arena.close()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare arenas in steps that a test can wait for."""
    monkeypatch.setattr(arena_module, "_STEP_BYTES", MIB)
    monkeypatch.setattr(arena_module, "_STEP_BYTES_MIN", 64 * KIB)


async def prepared(tier: DramTier, arena: Arena) -> DramTier:
    """The tier once its background thread is done."""
    tier.start()
    assert arena._thread is not None
    await asyncio.to_thread(arena._thread.join)
    await asyncio.sleep(0)  # The thread's last callback to the loop.
    return tier


def test_an_arena_that_gets_no_thread_can_be_closed(
    open_arena: Callable[..., Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the error of the close hides the one of the start."""
    arena = open_arena()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError):
            arena.prepare(lambda ready: None)
    arena.close()


class TestDramTier(TierContract):
    @pytest.fixture
    def tier(self, open_arena: Callable[..., Arena]) -> DramTier:
        return DramTier(open_arena())

    async def test_a_view_is_the_extent_itself(self, tier: DramTier) -> None:
        data = noise(2 * PAGE)
        extent = await stored(tier, data)

        view = tier.view(extent)
        view[0] ^= 0xFF

        assert len(view) == extent.size_bytes
        assert not view.readonly
        assert bytes(tier.view(extent)[1:]) == data[1:]
        assert tier.view(extent)[0] == data[0] ^ 0xFF

    async def test_views_begin_on_pages(self, tier: DramTier) -> None:
        tier.reserve(1)
        view = tier.view(tier.reserve(PAGE))
        assert np.frombuffer(view, np.uint8).ctypes.data % PAGE == 0


# Contents of an arena


async def test_bytes_survive_a_restart_of_the_daemon(open_arena: Callable[..., Arena]) -> None:
    first = open_arena()
    tier, data = await prepared(DramTier(first), first), noise(MIB)
    extent = await stored(tier, data)
    first.close()

    second = open_arena()

    assert (second.arena_id, second.why_new) == (first.arena_id, "")
    again = DramTier(second)
    again.adopt(*columns([extent]))
    assert again.view(extent) == data
    assert (await prepared(again, second)).view(extent) == data  # Faulting in did not change the bytes.


def test_a_complete_arena_is_ready_at_once(open_arena: Callable[..., Arena]) -> None:
    first = open_arena()
    DramTier(first)
    first.close()
    calls = FaultyCalls()

    second = open_arena(calls=calls)

    assert second.ready_bytes == second.capacity_bytes == CAPACITY - PAGE
    DramTier(second)
    assert "posix_fallocate" not in calls.names()


async def test_an_arena_that_was_cut_off_while_it_grew_keeps_what_it_had(
    open_arena: Callable[..., Arena], small_steps: None
) -> None:
    first = open_arena()
    tier, data = DramTier(first), noise(MIB)
    extent = await stored(tier, data)
    first.close()

    second = open_arena()

    assert second.ready_bytes == MIB
    again = DramTier(second)
    assert again.holds(*columns([extent, Extent(0, 2 * MIB, PAGE)])).tolist() == [True, False]
    again.adopt(*columns([extent]))
    assert (await prepared(again, second)).capacity_bytes == CAPACITY - PAGE
    assert again.view(extent) == data


def replace_by_noise(path: Path) -> None:
    path.write_bytes(os.urandom(CAPACITY))


def cut(path: Path) -> None:
    os.truncate(path, CAPACITY // 2)


def cut_inside_the_header(path: Path) -> None:
    os.truncate(path, 20)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (Path.unlink, "there is no arena"),
        (replace_by_noise, "not an arena of this version"),
        (cut, f"it has {CAPACITY // 2} bytes"),
        (cut_inside_the_header, "its header is cut off"),
    ],
)
async def test_a_damaged_arena_is_replaced_by_an_empty_one(
    open_arena: Callable[..., Arena], damage: Callable[[Path], None], why: str
) -> None:
    first = open_arena()
    await stored(DramTier(first), noise(MIB))
    first.close()
    damage(first.directory / "arena")

    second = open_arena()

    assert why in second.why_new
    assert second.arena_id != first.arena_id
    tier = DramTier(second)
    assert not any(tier.view(tier.reserve(2 * MIB)))


def test_an_arena_of_another_store_is_replaced(open_arena: Callable[..., Arena], shm: Path) -> None:
    other = open_arena(OTHER_STORE)
    other.close()
    own = shm / f"kvservice-{STORE.hex()[:16]}"
    (shm / f"kvservice-{OTHER_STORE.hex()[:16]}").rename(own)

    arena = open_arena(STORE)

    assert arena.directory == own
    assert arena.why_new == "it belongs to another store"
    assert arena.arena_id != other.arena_id


async def test_an_arena_grows_and_keeps_its_bytes(open_arena: Callable[..., Arena]) -> None:
    first = open_arena()
    first.share()
    data = noise(PAGE)
    extent = await stored(DramTier(first), data)
    first.close()

    second = open_arena(capacity_bytes=2 * CAPACITY)

    assert (second.arena_id, second.why_new) == (first.arena_id, "")
    assert second.capacity_bytes == 2 * CAPACITY - PAGE
    assert second.generations is not None
    assert DramTier(second).view(extent) == data


def test_an_arena_that_cannot_grow_says_so(open_arena: Callable[..., Arena]) -> None:
    first = open_arena()
    first.share()
    first.close()
    calls = FaultyCalls()
    calls.failing_once["posix_fallocate"] = errno.ENOSPC

    tier = DramTier(open_arena(capacity_bytes=2 * CAPACITY, calls=calls))

    assert tier.capacity_bytes == CAPACITY - PAGE
    assert tier.configured_bytes == 2 * CAPACITY - PAGE
    assert tier.short_because.startswith("No space left on device: the arena in ")


def test_only_the_allocated_start_of_an_arena_is_ready_if_a_client_wrote_beyond_it(
    open_arena: Callable[..., Arena], small_steps: None
) -> None:
    first = open_arena()
    DramTier(first)  # Allocates a part of it.
    first.close()
    mapped = np.memmap(first.directory / "arena", np.uint8, "r+")
    mapped[4 * MIB : 6 * MIB] = 1

    second = open_arena()

    path = second.directory / "arena"
    assert second.ready_bytes < 5 * MIB
    allocated = path.stat().st_blocks
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, PAGE + second.ready_bytes)
    assert path.stat().st_blocks == allocated


async def test_a_smaller_arena_leaves_the_old_one_to_those_who_have_it_mapped(open_arena: Callable[..., Arena]) -> None:
    first = open_arena(capacity_bytes=2 * CAPACITY)
    first.share()
    DramTier(first)
    mapped = np.memmap(first.directory / "arena", np.uint8, "r+", PAGE)  # As a client that has all of it mapped.
    mapped[-PAGE:] = 1
    first.close()

    second = open_arena()
    assert second.is_too_large
    smaller = second.create_smaller()
    smaller.allocate(MIB)
    smaller.data[:PAGE] = data = noise(PAGE)
    with pytest.raises(StoreMismatch, match="another daemon"):
        open_arena()
    smaller.replace_old()
    second.close()
    with pytest.raises(StoreMismatch, match="another daemon"):
        open_arena()
    smaller.close()

    third = open_arena()
    assert (third.arena_id, third.why_new) == (smaller.arena_id, "")
    assert (third.capacity_bytes, third.ready_bytes) == (CAPACITY - PAGE, MIB)
    assert third.data[:PAGE] == data
    third.share()
    mapped[:PAGE] = 2
    assert mapped[-1] == 1
    assert third.data[:PAGE] == data


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_replacement_that_was_interrupted_is_undone_or_finished_as_the_index_says(
    open_arena: Callable[..., Arena], shm: Path, is_committed: bool
) -> None:
    first = open_arena(capacity_bytes=2 * CAPACITY)
    first.close()
    second = open_arena()
    smaller = second.create_smaller()
    smaller.close()
    second.close()
    asked: list[bytes] = []

    def has_index(arena_id: bytes) -> bool:
        asked.append(arena_id)
        return is_committed

    third = Arena.open(shm, STORE, CAPACITY, has_index=has_index)

    assert asked == [smaller.arena_id]
    assert third.arena_id == (smaller if is_committed else first).arena_id
    assert third.is_too_large is not is_committed
    assert not (third.directory / "arena.new").exists()
    third.close()


def test_two_daemons_do_not_share_an_arena(open_arena: Callable[..., Arena]) -> None:
    open_arena()
    with pytest.raises(StoreMismatch, match="another daemon"):
        open_arena()
    open_arena(OTHER_STORE)


def test_an_arena_is_closed_to_other_users(open_arena: Callable[..., Arena]) -> None:
    arena = open_arena()
    assert arena.directory.stat().st_mode & 0o077 == 0
    assert (arena.directory / "arena").stat().st_mode & 0o077 == 0


# Space


async def test_the_tier_grows_while_the_arena_is_prepared(open_arena: Callable[..., Arena], small_steps: None) -> None:
    calls = FaultyCalls()
    arena = open_arena(calls=calls)
    tier = DramTier(arena)
    assert tier.capacity_bytes == MIB

    with calls.held("posix_fallocate") as waiting:
        tier.start()
        await asyncio.to_thread(waiting.acquire)
        data = noise(MIB // 2)
        extent = await stored(tier, data)  # Saves continue meanwhile.
        assert tier.capacity_bytes == MIB
    assert arena._thread is not None
    await asyncio.to_thread(arena._thread.join)
    await asyncio.sleep(0)

    assert tier.capacity_bytes == CAPACITY - PAGE
    assert tier.short_because == tier.refusing_because == ""
    assert tier.view(extent)[: len(data)] == data


@pytest.mark.parametrize("step_bytes", [MIB, 3 * MIB, 8 * MIB])
async def test_each_huge_page_of_an_arena_is_collapsed_once(
    open_arena: Callable[..., Arena], monkeypatch: pytest.MonkeyPatch, step_bytes: int
) -> None:
    """Also one that begins in the bytes of one step of the preparation and ends in those of the next."""
    monkeypatch.setattr(arena_module, "_STEP_BYTES", step_bytes)
    collapsed: list[int] = []

    def collapse(_: Mapping, offset: int) -> bool:
        collapsed.append(offset)
        return True

    monkeypatch.setattr(Mapping, "collapse", collapse)
    arena = open_arena()
    await prepared(DramTier(arena), arena)
    assert collapsed == list(range(0, CAPACITY, HUGE_PAGE_BYTES))


def test_the_file_stays_within_the_capacity(open_arena: Callable[..., Arena]) -> None:
    arena = open_arena(capacity_bytes=CAPACITY + 100)
    DramTier(arena)
    found = (arena.directory / "arena").stat()
    assert found.st_size == CAPACITY
    assert found.st_blocks * 512 <= CAPACITY


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
async def test_a_file_system_that_runs_full_means_a_smaller_tier(
    open_arena: Callable[..., Arena], small_steps: None, number: int
) -> None:
    calls = FaultyCalls()
    arena = open_arena(calls=calls)
    tier = DramTier(arena)
    calls.failing["posix_fallocate"] = number

    await prepared(tier, arena)

    assert tier.capacity_bytes == MIB
    assert os.strerror(number) in tier.short_because
    assert f"had space for {MIB} of {CAPACITY - PAGE} bytes" in tier.short_because
    assert tier.refusing_because == ""
    await stored(tier, noise(MIB // 2))


async def test_a_tier_without_any_space_refuses_and_says_why(open_arena: Callable[..., Arena]) -> None:
    calls = FaultyCalls()
    arena = open_arena(calls=calls)
    calls.failing["posix_fallocate"] = errno.ENOSPC

    tier = await prepared(DramTier(arena), arena)

    assert tier.capacity_bytes == 0
    assert "No space left" in tier.refusing_because


async def test_closing_ends_the_preparation(open_arena: Callable[..., Arena], small_steps: None) -> None:
    calls = FaultyCalls()
    arena = open_arena(calls=calls)
    tier = DramTier(arena)
    with calls.held("posix_fallocate") as waiting:
        tier.start()
        await asyncio.to_thread(waiting.acquire)
        closing = asyncio.ensure_future(asyncio.to_thread(arena.close))
        await asyncio.to_thread(arena._stopping.wait)
    await closing

    assert calls.names().count("posix_fallocate") == 3  # Header, first step, and the one that ran.


@pytest.fixture
def small_shm(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MiB of its own."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a tmpfs takes more rights than this user has")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)  # A traceback may still have the arena mapped.


async def test_a_really_full_tmpfs_means_a_smaller_tier_and_no_signal(
    open_arena: Callable[..., Arena], small_shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "_STEP_BYTES_MIN", 64 * KIB)
    arena = open_arena(parent=small_shm, capacity_bytes=16 * MIB)
    tier = DramTier(arena)
    half = tier.capacity_bytes
    assert MIB <= half <= 2 * MIB  # The index needs some of the space.
    (arena.directory / "index").write_bytes(bytes(MIB))

    await prepared(tier, arena)

    assert half < tier.capacity_bytes < 3 * MIB
    assert "No space left" in tier.short_because
    whole = tier.reserve(tier.capacity_bytes // MIB * MIB)
    tier.view(whole)[:] = noise(whole.size_bytes)  # Every page is allocated, so there is no SIGBUS.
    view = bytes(tier.view(whole))
    arena.close()

    again = open_arena(parent=small_shm, capacity_bytes=16 * MIB)
    assert again.why_new == ""
    tier = DramTier(again)
    tier.adopt(*columns([whole]))
    assert tier.view(whole) == view
    await prepared(tier, again)
    assert tier.view(whole) == view


def test_a_tmpfs_without_a_single_page_is_an_error_of_the_start(
    open_arena: Callable[..., Arena], small_shm: Path
) -> None:
    (small_shm / "others").write_bytes(bytes(4 * MIB))
    with pytest.raises(OSError, match="No space left"):
        open_arena(parent=small_shm)
    (small_shm / "others").unlink()

    assert open_arena(parent=small_shm).why_new
