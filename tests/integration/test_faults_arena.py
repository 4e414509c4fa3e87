"""A store whose arena was replaced starts with an empty DRAM tier and serves the blocks on SSD."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvservice.tiers.files import file_system_of
from kvservice_client import BlockChain, Durability, Tier
from tests.daemon import MIB, DaemonProcess
from tests.integration.known_blocks import LARGE, SMALL, new_chain, save, tiers_of, verify
from tests.integration.media import Medium

_LAYOUTS = (LARGE, SMALL)
_HEADER_BYTES = 48


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One store for all tests. It is clean after all of them."""
    process = new_daemon(tmp_path_factory.mktemp("arena"))
    try:
        yield process.start()
        process.kill()
        checked = process.check()
        assert checked.returncode == 0, checked.stdout + checked.stderr
    finally:
        process.remove()


def new_daemon(folder: Path) -> DaemonProcess:
    """With `lru`, which reads nothing ahead into an empty DRAM tier."""
    return DaemonProcess(folder, dram__capacity_bytes=16 * MIB, ssd__capacity_bytes=32 * MIB, mover__policy="lru")


def fill(daemon: DaemonProcess) -> tuple[list[BlockChain], list[BlockChain]]:
    """Chains on SSD, and chains that are only in DRAM; one per layout, and nothing else."""
    on_ssd, in_dram = ([new_chain(layout, 4) for layout in _LAYOUTS] for _ in range(2))
    with daemon.client() as client:
        client.admin.discard_all()
        for layout, safe, lost in zip(_LAYOUTS, on_ssd, in_dram, strict=True):
            for chain in (safe, lost):
                assert save(client, layout, chain, Durability.SSD).is_complete
            assert client.evict(lost, Tier.SSD).evicted == 4
    return on_ssd, in_dram


def expect_empty_dram(
    daemon: DaemonProcess, on_ssd: list[BlockChain], in_dram: list[BlockChain], why: str = ""
) -> None:
    """Of the running daemon."""
    assert why in daemon.wait_for_log("the DRAM tier starts empty")["event"]
    with daemon.client() as client:
        assert client.admin.status().dram.blocks == 0
        for layout, safe, lost in zip(_LAYOUTS, on_ssd, in_dram, strict=True):
            assert client.open_layout(layout).contains(lost) == 0
            assert tiers_of(client, layout, safe) == ["ssd"] * 4
            verify(client, layout, safe)
            assert save(client, layout, lost).stored == 4
            verify(client, layout, lost)
        assert client.admin.status().counters["quarantined_blocks"] == 0


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def delete_the_arena_alone(folder: Path) -> None:
    (folder / "arena").unlink()


def delete_its_index_alone(folder: Path) -> None:
    shutil.rmtree(folder / "index")


def truncate(folder: Path) -> None:
    with (folder / "arena").open("r+b") as file:
        file.truncate(5 * MIB + 123)


def truncate_to_nothing(folder: Path) -> None:
    (folder / "arena").write_bytes(b"")


def overwrite_with_noise(folder: Path) -> None:
    arena = folder / "arena"
    arena.write_bytes(random.Random(1).randbytes(arena.stat().st_size))


def damage_its_index(folder: Path) -> None:
    """All pages except the first two, which identify an LMDB file."""
    with (folder / "index" / "data.mdb").open("r+b") as file:
        file.seek(2 * 4096)
        file.write(random.Random(2).randbytes(256 * 1024))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (delete, "there is no arena"),
        (delete_the_arena_alone, "there is no arena"),
        (delete_its_index_alone, "its index: there is none"),
        (truncate, f"it has {5 * MIB + 123} bytes instead of"),
        (truncate_to_nothing, "its header is cut off"),
        (overwrite_with_noise, "it is not an arena"),
        (damage_its_index, "its index: "),
    ],
)
def test_without_its_arena_a_store_serves_its_ssd_blocks(
    daemon: DaemonProcess, change: Callable[[Path], None], why: str
) -> None:
    on_ssd, in_dram = fill(daemon)
    daemon.kill()
    change(daemon.arena_folder)
    daemon.start()
    expect_empty_dram(daemon, on_ssd, in_dram, why)


def test_an_arena_of_another_store_is_not_taken_for_its_own(daemon: DaemonProcess, tmp_path: Path) -> None:
    """The other store's arena, alone and together with its index."""
    on_ssd, in_dram = fill(daemon)
    daemon.kill()
    with new_daemon(tmp_path) as other:
        foreign, _ = fill(other)
        other.kill()
        shutil.copyfile(other.arena_folder / "arena", daemon.arena_folder / "arena")
        daemon.start()
        expect_empty_dram(daemon, on_ssd, in_dram, "another store")
        daemon.kill()
        mine = daemon.arena_folder
        shutil.rmtree(mine)
        shutil.copytree(other.arena_folder, mine)
        daemon.start()
        expect_empty_dram(daemon, on_ssd, [new_chain(layout, 4) for layout in _LAYOUTS])
    with daemon.client() as client:
        assert all(
            client.open_layout(layout).contains(chain) == 0 for layout, chain in zip(_LAYOUTS, foreign, strict=True)
        )


def test_an_older_arena_of_the_same_store_is_not_taken_for_the_present_one(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    on_ssd, in_dram = fill(daemon)
    daemon.kill()
    shutil.copyfile(daemon.arena_folder / "arena", tmp_path / "old")
    delete_the_arena_alone(daemon.arena_folder)
    daemon.start()
    with daemon.client() as client:
        assert save(client, SMALL, new_chain(SMALL, 8)).stored == 8
    daemon.kill()
    shutil.copyfile(tmp_path / "old", daemon.arena_folder / "arena")
    daemon.start()
    expect_empty_dram(daemon, on_ssd, in_dram)


def test_any_flipped_bit_in_the_arenas_header_empties_the_dram_tier(daemon: DaemonProcess) -> None:
    chooser = random.Random(3)
    for first in range(0, _HEADER_BYTES, 12):
        on_ssd, in_dram = fill(daemon)
        daemon.kill()
        Medium(daemon.arena_folder / "arena").flip(first + chooser.randrange(12), chooser.randrange(8))
        daemon.start()
        expect_empty_dram(daemon, on_ssd, in_dram)


def test_an_arena_on_a_disk_is_warned_of(tmp_path: Path) -> None:
    if file_system_of(tmp_path) in ("", "tmpfs"):
        pytest.skip("the temporary folder is in memory")
    on_disk = new_daemon(tmp_path)
    on_disk.settings["dram.path"] = tmp_path
    with on_disk:
        on_disk.wait_for_log("the arena is on a disk")
