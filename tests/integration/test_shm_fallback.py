"""If shared memory cannot be used, the client uses gRPC automatically, and reports why."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvservice_api.errors import InvalidRequest, NotShared
from kvservice_client import Client, Durability, Shard
from tests.daemon import MIB, DaemonProcess
from tests.integration.by_hand import InPlaceWriter
from tests.integration.known_blocks import LARGE, SMALL, compare, layers_of, new_chain, save, verify
from tests.integration.wire import Wire, refused
from tests.mounts import tmpfs

NewDaemon = Callable[..., DaemonProcess]


def ways(client: Client) -> tuple[set[str], set[str]]:
    """How bytes were loaded and saved."""
    stats = client.stats()
    return set(stats.loaded_bytes), set(stats.saved_bytes)


def move_some(client: Client) -> None:
    chain = new_chain(SMALL, 4)
    assert save(client, SMALL, chain, Durability.SSD).stored == 4
    verify(client, SMALL, chain)


def test_by_default_bytes_go_through_shared_memory(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        move_some(client)
        assert ways(client) == ({"shm"}, {"shm"})
        assert client.stats().shm_refused_because == ""


def test_a_daemon_that_does_not_share_is_used_by_grpc(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(dram__share="off")
    with daemon.client() as client, daemon.client(transport="shm") as insisting:
        assert list(client.capabilities().transports) == ["bulk", "grpc"]
        move_some(client)
        assert ways(client) == ({"grpc"}, {"grpc"})
        assert "dram.share is off" in client.stats().shm_refused_because
        with pytest.raises(NotShared, match=r"dram\.share is off"):
            save(insisting, SMALL, new_chain(SMALL))
    assert not (daemon.arena_folder / "generations").exists()


def test_a_daemon_that_shares_for_reading_is_written_by_grpc(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(dram__share="read-only")
    with daemon.client() as client, Wire(daemon.address) as wire:
        move_some(client)
        assert ways(client) == ({"shm"}, {"grpc"})
        wire.attach()
        wire.open_layout(SMALL)
        with refused(NotShared, "dram.share is not writable"):
            InPlaceWriter(wire).reserve(new_chain(SMALL))


@contextmanager
def moved_away(folder: Path) -> Iterator[None]:
    """The daemon has its files open; other processes no longer find them."""
    aside = folder.rename(folder.with_name("aside"))
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def test_an_arena_that_is_not_on_this_host_is_used_by_grpc(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    with moved_away(daemon.arena_folder), daemon.client() as client, daemon.client(transport="shm") as insisting:
        move_some(client)
        assert ways(client) == ({"grpc"}, {"grpc"})
        assert "cannot be mapped" in client.stats().shm_refused_because
        with pytest.raises(NotShared, match="cannot be mapped"):
            save(insisting, SMALL, new_chain(SMALL))


@pytest.mark.parametrize("taken", ["the folder", "the arena alone", "the generations alone"])
def test_another_daemons_arena_in_the_same_place_is_not_taken_for_the_right_one(
    new_daemon: NewDaemon, taken: str
) -> None:
    daemon, other = new_daemon(), new_daemon()
    with moved_away(folder := daemon.arena_folder):
        shutil.copytree(other.arena_folder, folder)
        mine = {"the arena alone": "generations", "the generations alone": "arena"}.get(taken)
        if mine:
            shutil.copyfile(folder.with_name("aside") / mine, folder / mine)
        with daemon.client() as client:
            move_some(client)
            assert ways(client) == ({"grpc"}, {"grpc"})
            why = "another arena than the daemon's" if mine == "generations" else "generations are another arena's"
            assert why in client.stats().shm_refused_because


def test_blocks_that_dram_has_no_room_for_are_streamed(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(dram__capacity_bytes=8 * MIB, index__volatile_map_bytes=4 * MIB)
    with daemon.client(transport="shm") as client:
        blocks, chain = client.open_layout(LARGE), new_chain(LARGE, 12)
        save(client, LARGE, chain, Durability.SSD)
        client.evict(chain, "dram")
        others = [new_chain(LARGE, 4) for _ in range(5)]
        for other in others:
            save(client, LARGE, other, Durability.SSD)
        leases = [blocks.lookup(other) for other in others]
        for lease in leases:
            list(lease.load())
        before = client.stats()
        with blocks.lookup(chain) as lease:
            compare(lease, LARGE, chain)
            with pytest.raises(NotShared, match="no space"):
                lease.view()
        after = client.stats()
        assert after.loaded_bytes["grpc"] > before.loaded_bytes.get("grpc", 0)
        assert "no space" in after.shm_refused_because


def test_blocks_that_several_ranks_saved_are_streamed(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        chain = new_chain(SMALL, 2)
        layers = layers_of(SMALL, chain)
        for shard in (Shard(0, 2, 0, 3), Shard(2, 5, 0, 3)):
            rank = client.open_layout(SMALL, shard)
            assert rank.save(chain, layers[shard.layer_begin : shard.layer_end]).stored == 2
        verify(client, SMALL, chain)
        assert ways(client) == ({"grpc"}, {"shm"})
        assert "several shards" in client.stats().shm_refused_because


def test_a_tmpfs_too_full_for_the_generations_is_served_without_shared_memory(tmp_path: Path) -> None:
    with (
        tmpfs(tmp_path / "shm", 12 * MIB) as shared_memory,
        DaemonProcess(
            tmp_path,
            dram__path=shared_memory,
            dram__capacity_bytes=16 << 30,
            index__volatile_map_bytes=MIB,
            ssd__capacity_bytes=64 * MIB,
        ) as daemon,
        daemon.client() as client,
    ):
        move_some(client)
        assert ways(client) == ({"grpc"}, {"grpc"})
        assert "No space left" in client.stats().shm_refused_because
        assert daemon.logged("clients cannot read in place")


def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="transport is 'rdma'; it must be 'auto', 'shm', 'bulk' or 'grpc'"):
        Client(transport="rdma")  # type: ignore[arg-type]
