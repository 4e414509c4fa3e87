"""The check of an LMDB file's pages: LMDB can use every accepted file without ending the process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest

from kvservice.index import pages
from kvservice.index.environment import BLOCKS, DATA_NAME, Environment
from kvservice.index.errors import StoreDamaged
from kvservice_api.errors import StorageFailed
from tests.unit import index_damage

_NAMES = (b"meta", b"layouts", b"blocks", b"sessions")


def damage_in_a_process_of_its_own(folder: Path, seed: int, count: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.unit.index_damage", str(folder), str(seed), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    doing = (folder / "doing").read_text() if (folder / "doing").exists() else "nothing yet"
    ended = signal.Signals(-done.returncode).name if done.returncode < 0 else done.returncode
    assert done.returncode == 0, f"seed {seed}, {doing}: {ended}\n{done.stderr}"
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_what_is_let_pass_can_be_read_written_and_deleted(tmp_path: Path) -> None:
    """One flipped bit in every page, and files truncated at any place."""
    found = damage_in_a_process_of_its_own(tmp_path, 1, 100)
    assert found["sound"] and found["damaged"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_what_is_let_pass_can_be_read_written_and_deleted_many_times(tmp_path: Path, seed: int) -> None:
    damage_in_a_process_of_its_own(tmp_path, seed, 5000)


@pytest.mark.parametrize(("seed", "transactions"), [(1, 60), pytest.param(2, 3000, marks=pytest.mark.slow)])
def test_every_file_that_lmdb_wrote_is_sound(tmp_path: Path, seed: int, transactions: int) -> None:
    """Puts, deletes, large values, transactions that end without a commit, and a map that is full."""
    chooser = random.Random(seed)
    path = tmp_path / DATA_NAME

    def opened() -> lmdb.Environment:
        return lmdb.open(str(tmp_path), map_size=8 << 20, max_dbs=4, lock=False, sync=False, metasync=False)

    env = opened()
    assert pages.examine(path) == "", "as it is made, before its first transaction"
    handles = []
    for name in _NAMES:
        handles.append(env.open_db(name))
        assert pages.examine(path) == ""
    for number in range(transactions):
        before = path.read_bytes()[:8192]
        keys = [chooser.randbytes(3) + bytes(37) for _ in range(chooser.choice((1, 20, 2000)))]
        names = [b"%d" % chooser.randrange(100) * chooser.randrange(1, 50) for _ in range(chooser.choice((0, 1, 10)))]
        puts = chooser.random() < 0.6
        try:
            with env.begin(write=True) as txn:
                if not puts:
                    cursor = txn.cursor(handles[2])
                    keys = [key for key in cursor.iternext(values=False) if chooser.random() < 0.7]
                for key in keys:
                    _ = txn.put(key, bytes(120), db=handles[2]) if puts else txn.delete(key, db=handles[2])
                for name in names:
                    size = chooser.choice((10, 3000, 90_000))
                    _ = txn.put(name, bytes(size), db=handles[3]) if puts else txn.delete(name, db=handles[3])
                if chooser.random() < 0.1:
                    txn.abort()
        except lmdb.MapFullError:
            with env.begin(write=True) as txn:
                txn.drop(handles[3], delete=False)
        assert pages.examine(path) == "", number
        # A crash before the commit has written its meta page leaves the earlier one valid.
        (tmp_path / "cut off").write_bytes(before + path.read_bytes()[8192:])
        assert pages.examine(tmp_path / "cut off") == "", number
        if number % 20 == 19:
            env.close()
            env = opened()
            handles = [env.open_db(name) for name in _NAMES]
    env.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    index_damage.make(folder / "index")
    return (folder / "index" / DATA_NAME).read_bytes()


def test_every_bit_of_a_page_header_that_lmdb_reads_is_noticed(tmp_path: Path, whole: bytes) -> None:
    """The number, the kind and the node offsets of a leaf in use."""
    path = tmp_path / DATA_NAME
    path.write_bytes(whole)
    in_use = pages.leaf_pages_in_use(path)
    page = sorted(in_use)[len(in_use) // 2]
    for offset in (*range(8), *range(10, 16)):
        for bit in range(8):
            data = bytearray(whole)
            data[page * index_damage.PAGE_BYTES + offset] ^= 1 << bit
            path.write_bytes(data)
            assert pages.examine(path), f"bit {bit} of byte {offset}"


@pytest.mark.parametrize(
    ("size", "why"), [(1, "first two pages"), (4096, "first two pages"), (8192, "cut short"), (100_000, "cut short")]
)
def test_a_file_that_is_shorter_than_its_pages_is_refused(tmp_path: Path, whole: bytes, size: int, why: str) -> None:
    (tmp_path / DATA_NAME).write_bytes(whole[:size])
    with pytest.raises(StoreDamaged, match=why):
        Environment(tmp_path, map_bytes=index_damage.MAP_BYTES, durable=True)
    assert (tmp_path / DATA_NAME).stat().st_size == size, "nothing was written"


@pytest.mark.parametrize("first", [0, 1])
def test_a_file_with_one_page_of_an_older_copy_is_refused(tmp_path: Path, whole: bytes, first: int) -> None:
    """The page that says where the trees are; the other pages are newer."""
    (tmp_path / "old").mkdir()
    index_damage.make(tmp_path / "old" / "index")
    path = tmp_path / "old" / "index" / DATA_NAME
    for _ in range(3):
        with index_damage.opened(path.parent) as env, env.begin(write=True) as txn:
            txn.put(b"one", b"more", db=env.open_db(b"sessions", txn))
    data = bytearray(path.read_bytes())
    data[first * 4096 : (first + 1) * 4096] = whole[first * 4096 : (first + 1) * 4096]
    path.write_bytes(data)
    assert pages.examine(path)


def every_bit_of_a_transactions_number_is_noticed(path: Path) -> None:
    """On each of the first two pages of a sound file."""
    whole = path.read_bytes()
    assert pages.examine(path) == ""
    for page in range(2):
        for bit in range(64):
            data = bytearray(whole)
            data[page * index_damage.PAGE_BYTES + 144 + bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            assert pages.examine(path), f"bit {bit} of page {page}"


@pytest.mark.parametrize("more", range(4))
def test_no_bit_of_a_transactions_number_undoes_a_durable_commit(tmp_path: Path, more: int) -> None:
    folder = tmp_path / "index"
    index_damage.make(folder)
    with lmdb.open(str(folder), map_size=index_damage.MAP_BYTES, max_dbs=4, lock=False) as env:
        handle = env.open_db(b"sessions")
        for number in range(more):
            with env.begin(write=True) as txn:
                txn.put(b"one", b"%d" % number, db=handle)
        with env.begin(write=True):
            pass  # LMDB does not write a transaction that changed nothing.
    every_bit_of_a_transactions_number_is_noticed(folder / DATA_NAME)


@pytest.mark.parametrize("count", range(1, 6))
def test_no_bit_of_a_transactions_number_undoes_one_of_the_first_commits(tmp_path: Path, count: int) -> None:
    folder = tmp_path / "index"
    with lmdb.open(str(folder), map_size=index_damage.MAP_BYTES, max_dbs=count, lock=False) as env:
        for number in range(count):
            env.open_db(b"%d" % number)
    every_bit_of_a_transactions_number_is_noticed(folder / DATA_NAME)


def test_what_is_no_file_is_refused_with_words(tmp_path: Path) -> None:
    (tmp_path / "folder" / DATA_NAME).mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / DATA_NAME)
    (tmp_path / "file").write_bytes(b"")
    for name, words in (("folder", "no regular file"), ("pipe", "no regular file"), ("file", "no folder")):
        with pytest.raises(StorageFailed, match=words):
            Environment(tmp_path / name, map_bytes=index_damage.MAP_BYTES, durable=True)


def test_what_pages_still_have_is_found_without_their_tree(tmp_path: Path, whole: bytes) -> None:
    """The page that leads to all others is lost: every record is still found."""
    (tmp_path / "same").mkdir()
    expected = index_damage.make(tmp_path / "same" / "index")
    data = bytearray(whole)
    data[:8192] = bytes(8192)
    path = tmp_path / DATA_NAME
    path.write_bytes(data)
    found = {(key, value) for in_use, key, value in pages.salvage(path) if len(key) == 40}
    assert found >= set(expected.items())
    assert not any(in_use for in_use, _, _ in pages.salvage(path))


def test_an_index_of_blocks_is_what_the_tests_take_it_for(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / DATA_NAME).write_bytes(whole)
    with index_damage.opened(tmp_path) as env, env.begin() as txn:
        stat = txn.stat(env.open_db(BLOCKS, txn, create=False))
        assert stat["depth"] >= 2
        assert txn.stat(env.open_db(b"sessions", txn, create=False))["overflow_pages"]
        assert env.stat()["entries"] == 4
