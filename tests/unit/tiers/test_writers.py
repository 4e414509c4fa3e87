"""Writers' files: they list the pages that a client may be writing, for as long as it holds the lock."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvservice.blocks import Extent
from kvservice.tiers.writers import Writer
from kvservice_api.arena import WRITERS_NAME
from kvservice_api.errors import NoWriterLock
from kvservice_client.arena_map import WriterLock

CLIENT, ARENA = bytes(range(16)), bytes(range(16, 32))
EXTENTS = [Extent(0, 4096 * number, 8192) for number in (2, 7, 11, 400)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / WRITERS_NAME).mkdir()
    return tmp_path / WRITERS_NAME


def left_behind(folder: Path, arena_id: bytes = ARENA) -> list[list[Extent]]:
    found = []
    for writer in Writer.left_behind(folder, arena_id):
        found.append(sorted(writer.extents))
        writer.close()
    return found


def test_who_holds_no_lock_may_not_write(folder: Path) -> None:
    with pytest.raises(NoWriterLock, match="cannot be opened"):
        Writer.open(folder, CLIENT, ARENA)
    (folder / CLIENT.hex()).touch()
    with pytest.raises(NoWriterLock, match="no client holds"):
        Writer.open(folder, CLIENT, ARENA)
    lock = WriterLock(folder.parent, CLIENT)
    writer = Writer.open(folder, CLIENT, ARENA)
    writer.check_locked()
    lock.release()
    with pytest.raises(NoWriterLock, match="no client holds"):
        writer.check_locked()
    writer.close()


def test_a_forked_child_that_ends_leaves_the_lock_to_its_parent(folder: Path) -> None:
    lock = WriterLock(folder.parent, CLIENT)
    writer = Writer.open(folder, CLIENT, ARENA)
    child = os.fork()
    if not child:
        try:
            lock.release()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    writer.check_locked()
    assert left_behind(folder) == [[]], "the file is there, and locked"
    writer.close()
    lock.release()
    assert left_behind(folder) == []


def test_what_is_noted_and_not_forgotten_is_known_to_the_next_daemon(folder: Path) -> None:
    lock = WriterLock(folder.parent, CLIENT)
    writer = Writer.open(folder, CLIENT, ARENA)
    for extent in EXTENTS:
        writer.note(extent)
    writer.forget(EXTENTS[1])
    writer.forget(EXTENTS[1])
    writer.note(EXTENTS[1])
    writer.forget(EXTENTS[0])
    assert left_behind(folder) == [sorted(EXTENTS[1:])]
    assert left_behind(folder, bytes(16)) == [[]], "of another arena"
    writer.close()
    lock.release()


def test_the_file_goes_with_the_lock(folder: Path) -> None:
    lock = WriterLock(folder.parent, CLIENT)
    writer = Writer.open(folder, CLIENT, ARENA)
    writer.note(EXTENTS[0])
    assert not writer.remove_if_unlocked()
    lock.release()
    assert writer.remove_if_unlocked()
    assert writer.extents == EXTENTS[:1]
    assert left_behind(folder) == []


def test_files_without_a_lock_are_removed_at_start(folder: Path) -> None:
    (folder / CLIENT.hex()).write_bytes(b"anything")
    (folder / "odd").touch()
    assert left_behind(folder) == []
    assert not list(folder.iterdir())
