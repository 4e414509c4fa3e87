"""A damaged, truncated, missing or foreign index: a volatile one costs DRAM's blocks, a durable one needs a repair."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvservice.index import pages
from kvservice.index.environment import LAYOUTS, Environment
from kvservice_api.layout import Shard
from kvservice_client import Client, Durability
from tests.daemon import MIB, DaemonProcess
from tests.integration.known_blocks import LARGE, compare, new_chain, save, verify

PAGE_BYTES = 4096
Damage = Callable[[Path], None]


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def flip_kind_of_leaf(index: Path) -> None:
    for page in pages.leaf_pages_in_use(index / "data.mdb"):
        flip(index / "data.mdb", page * PAGE_BYTES + 10, 1)


def flip_first_page(index: Path) -> None:
    flip(index / "data.mdb", 16, 3)


def flip_root(index: Path) -> None:
    for page in (0, 1):
        flip(index / "data.mdb", page * PAGE_BYTES + 16 + 24 + 48 + 40, 5)


def cut_short(size: int) -> Damage:
    return lambda index: os.truncate(index / "data.mdb", size)


def garbage(index: Path) -> None:
    (index / "data.mdb").write_bytes(random.Random(1).randbytes(1 << 20))


def zeros(index: Path) -> None:
    (index / "data.mdb").write_bytes(bytes(1 << 20))


def be_a_file(index: Path) -> None:
    shutil.rmtree(index)
    index.write_bytes(b"an index?")


def be_a_folder(index: Path) -> None:
    (index / "data.mdb").unlink()
    (index / "data.mdb").mkdir()


DAMAGE: dict[str, Damage] = {
    "a flipped bit in every leaf": flip_kind_of_leaf,
    "a flipped bit in the first page": flip_first_page,
    "a flipped bit in where the trees are": flip_root,
    "empty": cut_short(0),
    "one byte": cut_short(1),
    "cut to its first pages": cut_short(2 * PAGE_BYTES),
    "cut within a page": cut_short(4 * PAGE_BYTES + 17),
    "garbage": garbage,
    "zeros": zeros,
    "data.mdb gone": lambda index: (index / "data.mdb").unlink(),
    "gone": lambda index: shutil.rmtree(index),
    "a file": be_a_file,
    "a folder instead of data.mdb": be_a_folder,
}
# The fast tests have one case of each kind: a missing file, a truncated one, and wrong bytes.
_FAST = {"gone", "cut within a page", "a flipped bit in every leaf"}
KINDS = [
    pytest.param(damage, id=name, marks=() if name in _FAST else pytest.mark.slow) for name, damage in DAMAGE.items()
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """With `lru`, which reads nothing ahead into an empty DRAM tier."""
    folder = tmp_path_factory.mktemp("damage")
    with DaemonProcess(
        folder, dram__capacity_bytes=24 * MIB, ssd__capacity_bytes=64 * MIB, mover__policy="lru"
    ) as process:
        yield process


@pytest.mark.parametrize("damage", KINDS)
def test_with_every_damage_of_the_volatile_index_dram_starts_empty_and_ssd_is_whole(
    daemon: DaemonProcess, damage: Damage
) -> None:
    chain = new_chain(LARGE, 4)
    with daemon.client() as client:
        client.admin.discard_all()
        assert save(client, LARGE, chain, Durability.SSD).is_complete
    daemon.kill()
    damage(daemon.arena_folder / "index")
    checked = daemon.check("--repair")
    assert (checked.returncode, "4 blocks" in checked.stdout) == (0, True), checked.stdout + checked.stderr
    assert "the arena is not this store's any more" in checked.stdout
    daemon.start()
    assert daemon.wait_for_log("the DRAM tier starts empty")["why"].startswith("its index: ")
    with daemon.client() as client:
        assert client.admin.status().dram.used_bytes == 0
        verify(client, LARGE, chain)


def test_an_older_copy_of_the_volatile_index_is_not_taken_for_the_newest(daemon: DaemonProcess, tmp_path: Path) -> None:
    old, new = new_chain(LARGE, 4), new_chain(LARGE, 4)
    with daemon.client() as client:
        client.admin.discard_all()
        assert save(client, LARGE, old).is_complete
    daemon.kill()
    shutil.copytree(daemon.arena_folder / "index", tmp_path / "old")
    daemon.start()
    with daemon.client() as client:
        client.admin.discard_all()
        assert save(client, LARGE, new, Durability.SSD).is_complete
    daemon.kill()
    shutil.rmtree(daemon.arena_folder / "index")
    shutil.copytree(tmp_path / "old", daemon.arena_folder / "index")
    daemon.start()
    assert daemon.wait_for_log("the DRAM tier starts empty")["why"] == "its index: it is an older copy"
    with daemon.client() as client:
        assert client.open_layout(LARGE).contains(old) == 0
        verify(client, LARGE, new)


@pytest.mark.parametrize("what", ["killed", "stopped"])
def test_the_newest_volatile_index_is_kept(daemon: DaemonProcess, what: str) -> None:
    chain = new_chain(LARGE, 4)
    with daemon.client() as client:
        assert save(client, LARGE, chain).is_complete
    if what == "killed":
        daemon.kill()
    else:
        daemon.stop()
    daemon.start()
    assert not daemon.logged("the DRAM tier starts empty")
    with daemon.client() as client:
        verify(client, LARGE, chain)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A stopped daemon with four blocks."""
    folder = tmp_path_factory.mktemp("durable")
    with DaemonProcess(folder, dram__capacity_bytes=16 * MIB, ssd__capacity_bytes=32 * MIB) as daemon:
        with daemon.client() as client:
            assert save(client, LARGE, new_chain(LARGE, 4), Durability.SSD).is_complete
        daemon.kill()
        yield daemon


def files_of(store: Path) -> dict[Path, tuple[int, bytes]]:
    names = [path for path in store.rglob("*") if path.is_file() and path.name not in ("lock", "ssd-000.kv")]
    return {path: (path.stat().st_size, path.read_bytes()) for path in names}


@pytest.mark.parametrize("damage", KINDS)
def test_a_damaged_durable_index_is_left_as_it_is_and_the_message_says_what_helps(
    stopped: DaemonProcess, tmp_path: Path, damage: Damage
) -> None:
    index = stopped.store / "index"
    kept = shutil.copytree(index, tmp_path / "kept")
    damage(index)
    found = files_of(stopped.store)

    stopped.launch()
    assert stopped.wait_for_end() == 1
    said = "".join(stopped.lines)
    assert said.count("\n") == 1, said
    assert str(index) in said
    checked = stopped.check()
    assert checked.returncode in (1, 2)
    assert str(index) in checked.stdout + checked.stderr
    assert files_of(stopped.store) == found, "nothing was written"

    if index.is_dir():
        shutil.rmtree(index)
    else:
        index.unlink(missing_ok=True)
    shutil.copytree(kept, index)
    assert stopped.check().returncode == 0, "a copy that is brought back is good"


def nodes_of(data: bytes, page: int) -> bytes:
    """The nodes of a leaf page. Its free space, before `upper`, may have copies of nodes that moved to other pages."""
    upper = int.from_bytes(data[page * PAGE_BYTES + 14 :][:2], "little")
    return data[page * PAGE_BYTES + upper : (page + 1) * PAGE_BYTES]


@pytest.mark.parametrize("name", ["a flipped bit in every leaf", "a flipped bit in where the trees are"])
def test_repair_saves_what_a_damaged_durable_index_still_has(tmp_path: Path, name: str) -> None:
    chain, other, removed = new_chain(LARGE, 4), new_chain(LARGE, 4), new_chain(LARGE, 2)
    with DaemonProcess(tmp_path, dram__capacity_bytes=16 * MIB, ssd__capacity_bytes=32 * MIB) as daemon:
        with daemon.client() as client:
            for each in (chain, other, removed):
                assert save(client, LARGE, each, Durability.SSD).is_complete
            for key in removed.keys:
                client.admin.discard([key])
            newer = new_chain(LARGE, 2)
            assert save(client, LARGE, newer, Durability.SSD).is_complete  # They use the space of `removed`.
        daemon.stop()
        shutil.rmtree(daemon.shared_memory, ignore_errors=True)
        daemon.shared_memory.mkdir()
        index = daemon.store / "index"
        if name == "a flipped bit in every leaf":  # One of them: the others are what can be saved.
            leaves = pages.leaf_pages_in_use(index / "data.mdb")
            data = (index / "data.mdb").read_bytes()
            # With the shard, because the next record has the key too, as its parent.
            name_of_first = chain.keys[0] + Shard.whole(LARGE).encode()
            [leaf] = [page for page in leaves if name_of_first in nodes_of(data, page)]
            flip(index / "data.mdb", leaf * PAGE_BYTES + 13, 4)  # `lower`: no node of the page can be found.
        else:
            DAMAGE[name](index)
        checked = daemon.check("--repair")
        assert checked.returncode == 1
        assert f"the old one is {daemon.store}/index.damaged-1" in checked.stdout, checked.stdout + checked.stderr
        assert pages.examine(daemon.store / "index.damaged-1" / "data.mdb")
        assert daemon.check().returncode == 0, daemon.check().stdout
        daemon.start()
        with daemon.client() as client:
            for each in (chain, other):
                hit = found(client, each)
                assert hit == 4 or name == "a flipped bit in every leaf"


def found(client: Client, chain: object) -> int:
    """How many of a chain's blocks are stored; compares their bytes."""
    with client.open_layout(LARGE).lookup(chain) as lease:  # type: ignore[arg-type]
        if lease.hit_blocks:
            compare(lease, LARGE, chain[: lease.hit_blocks])  # type: ignore[index]
        return lease.hit_blocks


def test_an_index_of_another_store_is_recognized(tmp_path: Path) -> None:
    with (
        DaemonProcess(tmp_path / "one", dram__capacity_bytes=16 * MIB, ssd__capacity_bytes=32 * MIB) as one,
        DaemonProcess(tmp_path / "other", dram__capacity_bytes=16 * MIB, ssd__capacity_bytes=32 * MIB) as other,
    ):
        one.stop()
        other.stop()
        shutil.rmtree(one.store / "index")
        shutil.copytree(other.store / "index", one.store / "index")
        one.launch()
        assert one.wait_for_end() == 1
        assert "another store's" in "".join(one.lines)


def test_a_damaged_layout_costs_no_block_and_without_its_copy_the_daemon_removes_none(
    stopped: DaemonProcess, tmp_path: Path
) -> None:
    daemon, chain = stopped, new_chain(LARGE, 4)  # Eight blocks with those that it has.
    daemon.start()
    with daemon.client() as client:
        assert save(client, LARGE, chain, Durability.SSD).is_complete
    assert daemon.stop() == 0

    def damage() -> None:
        index = Environment(daemon.store / "index", map_bytes=4 * MIB, durable=True)
        [value] = dict(pair for chunk in index.read(LAYOUTS) for pair in zip(*chunk, strict=True)).values()
        index.write_now(LAYOUTS, {LARGE.fingerprint: value[:20] + bytes([value[20] ^ 16]) + value[21:]})
        index.close()

    damage()
    daemon.start()
    with daemon.client() as client:
        assert found(client, chain) == 4
    assert daemon.stop() == 0

    damage()
    layouts = (daemon.store / "layouts").rename(tmp_path / "kept")
    daemon.launch()
    assert daemon.wait_for_end() == 1
    said = "".join(daemon.lines)
    assert f"{daemon.store}/layouts has no sound copy of them, and 8 blocks of the tier ssd" in said
    assert "Traceback" not in said and "Nothing was removed" in said

    layouts.rename(daemon.store / "layouts")
    daemon.start()
    with daemon.client() as client:
        assert found(client, chain) == 4
