"""A drive that fails costs the blocks on it: the other drives take new blocks, and the index takes what is in none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvservice_client import Client, Durability
from tests.daemon import MIB, DaemonProcess
from tests.integration.known_blocks import LARGE, SMALL, new_chain, save, verify
from tests.integration.test_faults_disk import Faults

_MAP_BYTES = 4 * MIB


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    return Faults(tmp_path / "faults")


@pytest.fixture
def client(tmp_path: Path, faults: Faults) -> Iterator[Client]:
    """A client of a daemon with two drives of 8 MiB, and a DRAM tier for twice as much."""
    drives = [tmp_path / "drive-0", tmp_path / "drive-1"]
    for drive in drives:
        drive.mkdir()
    daemon = DaemonProcess(
        tmp_path / "daemon",
        program=("-m", "tests.faulty_daemon"),
        dram__capacity_bytes=40 * MIB,
        ssd__capacity_bytes=_MAP_BYTES + 16 * MIB,
        ssd__paths=":".join(map(str, drives)),
    )
    try:
        daemon.start(environment={"TEST_FAULTS": str(faults.folder)})
        with daemon.client() as made:
            yield made
    finally:
        daemon.remove()


def break_drive(faults: Faults, name: str) -> None:
    """From now on no read, write or flush of this file succeeds."""
    for call in ("preadv", "pwritev", "fdatasync"):
        faults.set(call, f"EIO {name}")


@pytest.mark.parametrize("broken", ["ssd-000.kv", "ssd-001.kv"])
def test_while_one_drive_fails_saves_to_ssd_go_to_the_other(client: Client, faults: Faults, broken: str) -> None:
    break_drive(faults, broken)

    for _ in range(5):
        chain = new_chain(LARGE, 2)
        result = save(client, LARGE, chain, Durability.SSD)
        assert result.is_complete, result.refused
        verify(client, LARGE, chain)

    status = client.admin.status()
    assert status.counters["storage_errors"] and not status.ssd.refusing_because


def test_where_only_the_flushes_of_one_drive_fail_the_blocks_on_it_are_refused_and_no_others(
    client: Client, faults: Faults
) -> None:
    faults.set("fdatasync", "EIO ssd-000.kv")
    results = [save(client, LARGE, new_chain(LARGE), Durability.SSD) for _ in range(10)]

    refused = [error for result in results for _, error in result.refused]
    assert len(refused) == 1, "a block that is on the other drive is stored"
    assert "could not flush" in str(refused[0]) and "ssd-000.kv" in str(refused[0])


def test_where_only_the_flushes_of_one_drive_fail_the_other_blocks_of_a_save_are_stored(
    client: Client, faults: Faults
) -> None:
    faults.set("fdatasync", "EIO ssd-000.kv")
    first = save(client, SMALL, new_chain(SMALL, 20), Durability.SSD)
    assert 0 < len(first.refused) < 20, "those on the other drive are stored"

    for _ in range(3):  # One block of 64 is written to the drive that fails.
        assert len(save(client, SMALL, new_chain(SMALL, 128), Durability.SSD).refused) <= 3


def test_where_the_drive_that_works_is_full_old_blocks_make_room_for_new_ones(client: Client, faults: Faults) -> None:
    break_drive(faults, "ssd-000.kv")

    chains = [new_chain(LARGE, 8) for _ in range(20)]  # 31 MiB; the drive has 8.
    results = [save(client, LARGE, chain, Durability.SSD) for chain in chains]

    assert [result.refused for result in results] == [[]] * len(chains)
    verify(client, LARGE, chains[-1])


def test_a_drive_that_works_again_takes_blocks_again(client: Client, faults: Faults) -> None:
    break_drive(faults, "ssd-000.kv")
    assert save(client, LARGE, new_chain(LARGE, 4), Durability.SSD).is_complete
    faults.clear()

    chains = [new_chain(LARGE, 8) for _ in range(20)]
    for chain in chains:
        assert save(client, LARGE, chain, Durability.SSD).is_complete

    assert client.admin.status().ssd.used_bytes > 8 * MIB, "more than the other drive has"


def test_sessions_and_layouts_do_not_depend_on_the_drives_of_blocks(client: Client, faults: Faults) -> None:
    faults.set("pwritev", "EIO")
    faults.set("fdatasync", "EIO")
    assert save(client, LARGE, new_chain(LARGE, 3), Durability.SSD).refused

    chain = new_chain(SMALL, 3)
    assert save(client, SMALL, chain).stored == 3  # Its layout is new.
    assert client.session(SMALL, "talk").append(chain, stored_position=0).revision == 1
    assert client.session(SMALL, "talk").get().token_count == 3 * SMALL.block_tokens
