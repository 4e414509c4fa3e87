"""A failing disk costs only the blocks on it: saves are refused, loads fail, and the daemon runs.

The faults are injected at the daemon's file calls, below the SSD tier.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvservice_api.errors import StorageFailed
from kvservice_client import Client, Durability, Tier
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, compare, new_chain, save, tiers_of, verify
from tests.integration.media import arena, flip_data


class Faults:
    """Controls the faults of a running ``tests.faulty_daemon``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def set(self, call: str, fault: str) -> None:
        partial = self.folder / "partial"
        partial.write_text(fault)
        partial.rename(self.folder / call)

    def clear(self) -> None:
        for file in self.folder.iterdir():
            file.unlink()


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults") / "faults")


@pytest.fixture(scope="module")
def daemon(faults: Faults) -> Iterator[DaemonProcess]:
    """One store for all tests. It is clean after all of them."""
    process = faulty_daemon(faults.folder.parent)
    try:
        yield process.start(environment={"TEST_FAULTS": str(faults.folder)})
        assert process.stop() == 0
        checked = process.check()
        assert checked.returncode == 0, checked.stdout + checked.stderr
    finally:
        process.remove()


@pytest.fixture
def client(daemon: DaemonProcess, faults: Faults) -> Iterator[Client]:
    """A client of an empty store, whose disk works at the start and at the end of a test."""
    with daemon.client() as made:
        made.admin.discard_all()
        yield made
        faults.clear()


def faulty_daemon(folder: Path) -> DaemonProcess:
    sizes = {"dram__capacity_bytes": 32 * MIB, "ssd__capacity_bytes": 64 * MIB}
    return DaemonProcess(folder, program=("-m", "tests.faulty_daemon"), **sizes)


def counted(client: Client, name: str) -> int:
    return int(client.admin.status().counters[name])


@pytest.mark.parametrize(
    ("call", "fault", "message"),
    [
        ("pwritev", "ENOSPC", "No space left on device"),
        ("pwritev", "EROFS", "Read-only file system"),
        ("pwritev", "EIO", "Input/output error"),
        ("fdatasync", "EIO", "Input/output error"),
        ("fdatasync", "ENOSPC", "No space left on device"),
    ],
)
def test_a_disk_that_takes_no_writes_refuses_saves_to_ssd_until_it_does(
    client: Client, faults: Faults, call: str, fault: str, message: str
) -> None:
    before, refused, dram_only = (new_chain(LARGE, 3) for _ in range(3))
    errors = counted(client, "storage_errors")
    assert save(client, LARGE, before, Durability.SSD).is_complete
    faults.set(call, fault)

    result = save(client, LARGE, refused, Durability.SSD)
    assert [position for position, _ in result.refused] == [0, 1, 2]
    assert {type(error) for _, error in result.refused} == {StorageFailed}
    assert all(message in str(error) and "ssd-000.kv" in str(error) for _, error in result.refused)
    assert save(client, LARGE, dram_only).stored == 3
    for chain in (before, refused, dram_only):
        verify(client, LARGE, chain)
    assert tiers_of(client, LARGE, refused) == ["dram"] * 3
    status = client.admin.status()
    assert message in status.ssd.refusing_because
    assert status.counters["storage_errors"] > errors

    faults.clear()
    until(lambda: tiers_of(client, LARGE, dram_only) == ["dram+ssd"] * 3)
    until(lambda: tiers_of(client, LARGE, refused) == ["dram+ssd"] * 3)
    assert save(client, LARGE, new_chain(LARGE, 3), Durability.SSD).is_complete
    assert client.admin.status().ssd.refusing_because == ""
    for chain in (before, refused, dram_only):
        client.evict(chain, Tier.DRAM)
        verify(client, LARGE, chain)


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_blocks_that_the_disk_did_not_take_have_no_record_after_a_crash(
    daemon: DaemonProcess, client: Client, faults: Faults, call: str
) -> None:
    """With the arena all blocks are stored; without it, only those on SSD."""
    on_ssd, refused = new_chain(SMALL, 4), new_chain(SMALL, 4)
    assert save(client, SMALL, on_ssd, Durability.SSD).is_complete
    faults.set(call, "EIO")
    assert len(save(client, SMALL, refused, Durability.SSD).refused) == 4
    daemon.kill()
    faults.clear()
    faults.set("fdatasync", "EIO")  # So that write-behind adds no block.
    daemon.start(environment={"TEST_FAULTS": str(faults.folder)})
    assert tiers_of(client, SMALL, on_ssd) == ["dram+ssd"] * 4
    assert tiers_of(client, SMALL, refused) == ["dram"] * 4
    verify(client, SMALL, refused)


def test_more_saves_than_dram_holds_are_refused_while_the_disk_takes_none(client: Client, faults: Faults) -> None:
    """Blocks in DRAM stay readable or are evicted by policy; the daemon answers all the time."""
    faults.set("pwritev", "ENOSPC")
    chains = [new_chain(LARGE, 8) for _ in range(30)]  # 47 MiB; DRAM has 28.
    for chain in chains:
        result = save(client, LARGE, chain)
        assert result.stored + len(result.refused) == 8
        with client.open_layout(LARGE).lookup(chain) as lease:
            assert lease.hit_blocks >= min({p for p, _ in result.refused}, default=8)
            if lease.hit_blocks:
                compare(lease, LARGE, chain)
    faults.clear()
    last = new_chain(LARGE, 8)
    until(lambda: save(client, LARGE, last, Durability.SSD).is_complete)
    verify(client, LARGE, last)


def test_a_disk_that_cannot_be_read_fails_loads_and_loses_nothing(client: Client, faults: Faults) -> None:
    on_ssd, in_dram = new_chain(LARGE, 4), new_chain(LARGE, 4)
    for chain in (on_ssd, in_dram):
        assert save(client, LARGE, chain, Durability.SSD).is_complete
    client.evict(on_ssd, Tier.DRAM)
    before = {name: counted(client, name) for name in ("storage_errors", "loads_failed", "quarantined_blocks")}
    faults.set("preadv", "EIO")

    for _ in range(3):
        with client.open_layout(LARGE).lookup(on_ssd) as lease, pytest.raises(StorageFailed) as failure:
            compare(lease, LARGE, on_ssd)
        assert "ssd-000.kv: Input/output error" in str(failure.value)
    assert client.prefetch(on_ssd, wait=True).failed == 4
    verify(client, LARGE, in_dram)
    assert save(client, LARGE, new_chain(LARGE), Durability.SSD).is_complete
    assert counted(client, "storage_errors") > before["storage_errors"]
    assert counted(client, "loads_failed") == before["loads_failed"] + 3
    assert counted(client, "quarantined_blocks") == before["quarantined_blocks"]

    faults.clear()
    verify(client, LARGE, on_ssd)


def test_a_disk_that_transfers_less_than_asked_is_asked_again(client: Client, faults: Faults) -> None:
    faults.set("preadv", "SHORT")
    faults.set("pwritev", "SHORT")
    for layout in (LARGE, SMALL):
        chain = new_chain(layout, 3)
        assert save(client, layout, chain, Durability.SSD).is_complete
        client.evict(chain, Tier.DRAM)
        assert save(client, layout, new_chain(layout, 3)).stored == 3  # In the space of the evicted blocks.
        verify(client, layout, chain)


def test_a_block_damaged_in_dram_does_not_reach_the_ssd(daemon: DaemonProcess, client: Client, faults: Faults) -> None:
    good, damaged = new_chain(LARGE), new_chain(LARGE)
    before = counted(client, "quarantined_blocks")
    faults.set("pwritev", "ENOSPC")
    for chain in (damaged, good):
        assert save(client, LARGE, chain).stored == 1
    flip_data(arena(daemon), LARGE, damaged.keys[0], random.Random(8))
    faults.clear()
    until(lambda: counted(client, "quarantined_blocks") == before + 1)
    assert client.open_layout(LARGE).contains(damaged) == 0
    until(lambda: tiers_of(client, LARGE, good) == ["dram+ssd"])
    verify(client, LARGE, good)


def test_a_store_that_finds_no_space_for_its_ssd_files_says_so_and_starts_once_there_is(tmp_path: Path) -> None:
    faults = Faults(tmp_path / "faults")
    faults.set("posix_fallocate", "ENOSPC")
    process = faulty_daemon(tmp_path)
    try:
        process.launch(environment={"TEST_FAULTS": str(faults.folder)})
        assert process.wait_for_end() == 1
        assert "No space left on device" in process.lines[-1]
        assert "ssd-000.kv" in process.lines[-1]
        assert "Traceback" not in "".join(process.lines)
        assert not list(process.store.glob("ssd-000.kv*"))
        faults.clear()
        process.start(environment={"TEST_FAULTS": str(faults.folder)})
        with process.client() as client:
            assert save(client, SMALL, new_chain(SMALL), Durability.SSD).is_complete
    finally:
        process.remove()
