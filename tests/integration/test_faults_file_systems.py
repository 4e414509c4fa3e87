"""File systems that are really full, read-only or dead: fewer blocks, clear errors, and a daemon that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvservice_api.errors import StorageFailed
from kvservice_client import BlockChain, Durability, KVError, Tier
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, new_chain, save, tiers_of, verify
from tests.mounts import disk, fill, tmpfs

KIB = 1024


def test_shared_memory_smaller_than_asked_for_means_a_smaller_tier(tmp_path: Path) -> None:
    with (
        tmpfs(tmp_path / "shm", 24 * MIB) as shared_memory,
        DaemonProcess(tmp_path, dram__path=shared_memory, dram__capacity_bytes=256 * MIB) as daemon,
        daemon.client() as client,
    ):
        daemon.wait_for_log("the DRAM tier stays smaller than configured")
        status = client.admin.status()
        assert 12 * MIB < status.dram.capacity_bytes < 24 * MIB
        chains = [new_chain(LARGE, 4) for _ in range(60)]  # 46 MiB.
        for chain in chains:
            assert save(client, LARGE, chain).stored == 4
        for chain in chains:
            verify(client, LARGE, chain)
        daemon.kill()
        daemon.start()
        for chain in chains:
            verify(client, LARGE, chain)


@pytest.mark.parametrize(
    "free_bytes",
    [0, 64 * KIB, 3 * MIB, *(pytest.param(pages * 4 * KIB, marks=pytest.mark.slow) for pages in range(1, 30))],
    ids=lambda size: f"{size // KIB} KiB",
)
def test_however_little_shared_memory_is_left_the_daemon_serves_or_says_why_not(
    tmp_path: Path, free_bytes: int
) -> None:
    """SIGBUS would be exit code -7."""
    with tmpfs(tmp_path / "shm", 16 * MIB) as shared_memory:
        filler = fill(shared_memory, leave_bytes=free_bytes)
        daemon = DaemonProcess(tmp_path, dram__path=shared_memory, dram__capacity_bytes=64 * MIB)
        try:
            daemon.launch()
            if not daemon.serves():
                assert daemon.wait_for_end() == 1, "".join(daemon.lines)
                assert "no space left" in daemon.lines[-1].lower()
                assert "Traceback" not in "".join(daemon.lines)
            else:
                with daemon.client() as client:
                    for layout in (SMALL, LARGE) * 10:
                        chain = new_chain(layout, 2)
                        result = save(client, layout, chain)
                        assert all(isinstance(error, KVError) for _, error in result.refused)
                        if result.is_complete:
                            verify(client, layout, chain)
                assert daemon.stop() == 0
            filler.unlink()
            daemon.start()
            with daemon.client() as client:
                chain = new_chain(LARGE, 4)
                assert save(client, LARGE, chain).stored == 4
                verify(client, LARGE, chain)
        finally:
            daemon.remove()


def test_shared_memory_that_others_fill_while_the_daemon_runs_costs_it_nothing(tmp_path: Path) -> None:
    with (
        tmpfs(tmp_path / "shm", 48 * MIB) as shared_memory,
        DaemonProcess(tmp_path, dram__path=shared_memory, dram__capacity_bytes=32 * MIB) as daemon,
        daemon.client() as client,
    ):
        until(lambda: client.admin.status().dram.capacity_bytes > 27 * MIB)
        fill(shared_memory)
        chains = [new_chain(LARGE, 4) for _ in range(60)]
        for chain in chains:
            assert save(client, LARGE, chain).stored == 4
            verify(client, LARGE, chain)


def test_a_full_disk_refuses_what_must_be_recorded_on_it_until_there_is_space(tmp_path: Path) -> None:
    """The disk was full before the durable index could take the space of its map. The SSD files are on another one."""
    with disk(tmp_path, 32 * MIB) as drive:
        filler = fill(drive.path, leave_bytes=256 * KIB)
        daemon = DaemonProcess(drive.path, ssd__paths=tmp_path / "ssd", ssd__capacity_bytes=128 * MIB)
        (tmp_path / "ssd").mkdir()
        try:
            daemon.start()
            with daemon.client() as client:
                saved: list[BlockChain] = []
                refused: list[tuple[int, KVError]] = []
                while not refused and len(saved) < 300:
                    saved.append(new_chain(SMALL, 16))
                    refused = save(client, SMALL, saved[-1], Durability.SSD).refused
                assert {type(error) for _, error in refused} == {StorageFailed}
                assert all("index" in str(error) and "no space left" in str(error).lower() for _, error in refused)
                assert client.admin.status().counters["storage_errors"] > 0
                in_dram = new_chain(SMALL, 16)
                assert save(client, SMALL, in_dram).stored == 16
                for chain in (saved[0], saved[-1], in_dram):
                    verify(client, SMALL, chain)
                filler.unlink()
                for chain in (saved[-1], in_dram):
                    until(lambda chain=chain: tiers_of(client, SMALL, chain) == ["dram+ssd"] * 16)  # type: ignore[misc]
                    client.evict(chain, Tier.DRAM)
                    verify(client, SMALL, chain)
            assert daemon.stop() == 0
            assert daemon.check().returncode == 0
        finally:
            daemon.remove()


def test_a_disk_that_dies_under_the_daemon_costs_what_is_on_it_until_it_is_back(tmp_path: Path) -> None:
    with disk(tmp_path, 96 * MIB) as drive:
        daemon = DaemonProcess(drive.path, ssd__capacity_bytes=48 * MIB)
        try:
            daemon.start()
            both, on_ssd, late = (new_chain(LARGE, 4) for _ in range(3))
            with daemon.client() as client:
                for chain in (both, on_ssd):
                    assert save(client, LARGE, chain, Durability.SSD).is_complete
                client.evict(on_ssd, Tier.DRAM)
                drive.cut_off()
                assert len(save(client, LARGE, late, Durability.SSD).refused) == 4
                for chain in (both, late):
                    verify(client, LARGE, chain)
                with pytest.raises(KVError):
                    verify(client, LARGE, on_ssd)
                assert client.admin.status().ssd.refusing_because
            daemon.kill()
            drive.unmount()
            drive.mount()
            assert daemon.check().returncode == 0
            daemon.start()
            with daemon.client() as client:
                for chain in (both, on_ssd, late):
                    verify(client, LARGE, chain)
        finally:
            daemon.remove()


def test_a_store_on_a_read_only_disk_says_so_and_starts_once_it_can_write(tmp_path: Path) -> None:
    with disk(tmp_path, 64 * MIB) as drive:
        daemon = DaemonProcess(drive.path, ssd__capacity_bytes=32 * MIB)
        try:
            daemon.start()
            chain = new_chain(LARGE, 4)
            with daemon.client() as client:
                assert save(client, LARGE, chain, Durability.SSD).is_complete
            assert daemon.stop() == 0
            drive.unmount()
            drive.mount(read_only=True)
            daemon.launch()
            assert daemon.wait_for_end() == 1
            assert "Read-only file system" in daemon.lines[-1]
            assert "Traceback" not in "".join(daemon.lines)
            drive.unmount()
            drive.mount()
            daemon.start()
            with daemon.client() as client:
                verify(client, LARGE, chain)
        finally:
            daemon.remove()
