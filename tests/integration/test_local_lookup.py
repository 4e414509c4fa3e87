"""Lookups in shared memory of a real daemon: right while it runs, and never trusted for another daemon."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvservice_api.residency_directory import STATE_WORD, DirectoryState
from kvservice_client import BlockCache, BlockChain, Durability, LocalHit, Shard, Tier
from tests.daemon import NEVER_S, DaemonProcess, until
from tests.integration.conversations import layers_of, new_chain, small_layout
from tests.mounts import fill, tmpfs

LAYOUT = small_layout("local lookups")
BLOCKS = 20


def filled(blocks: BlockCache) -> None:
    """Wait until the daemon has filled its directory after a start, or has closed it."""
    until(lambda: blocks.lookup_local(new_chain(LAYOUT, 8)) is not None)


def saved(blocks: BlockCache, durability: Durability = Durability.DRAM) -> BlockChain:
    chain = new_chain(LAYOUT, 8 * BLOCKS)
    assert blocks.save(chain, layers_of(blocks, chain), durability).is_complete
    return chain


def lookups_asked(daemon: DaemonProcess) -> float:
    """How many blocks were looked up by calls."""
    with daemon.client() as client:
        return float(client.admin.status().counters["lookup_blocks_asked"])


def test_blocks_are_found_without_a_call_from_the_save_on_until_they_leave(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        blocks = client.open_layout(LAYOUT)
        filled(blocks)
        asked = lookups_asked(daemon)
        chain = saved(blocks)
        hit = blocks.lookup_local(chain)
        assert hit is not None
        assert (hit.blocks, hit.in_dram) == (BLOCKS, BLOCKS), "from the moment on that the save has returned"
        until(lambda: blocks.lookup_local(chain) == LocalHit(BLOCKS, BLOCKS, BLOCKS))

        client.evict(chain.keys[5:], Tier.DRAM)
        assert blocks.lookup_local(chain) == LocalHit(BLOCKS, 5, BLOCKS)
        client.evict(chain.keys[15:], Tier.SSD)
        assert blocks.lookup_local(chain) == LocalHit(15, 5, 15)
        assert blocks.contains(chain) == 15
        client.admin.discard(chain.keys[2:3])
        assert blocks.lookup_local(chain) == LocalHit(2, 2, 2)
        assert blocks.contains(chain) == 2
        assert blocks.contains(chain[3:]) == 12
        assert lookups_asked(daemon) == asked


def test_a_lookup_in_shared_memory_says_what_a_call_says(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        blocks = client.open_layout(LAYOUT)
        filled(blocks)
        chain = saved(blocks)
        client.admin.discard(chain.keys[11:12])
        for first in range(BLOCKS):
            with blocks.lookup(chain[first:]) as lease:
                assert blocks.contains(chain[first:]) == lease.hit_blocks


def test_a_shard_is_found_in_the_whole_and_parts_are_left_to_the_daemon(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        whole = client.open_layout(LAYOUT)
        left, right = (client.open_layout(LAYOUT, Shard(0, 4, head, head + 1)) for head in (0, 1))
        filled(whole)
        chain = saved(whole)
        assert left.lookup_local(chain) is not None
        assert left.contains(chain) == BLOCKS

        parts = new_chain(LAYOUT, 8 * BLOCKS)
        for blocks in (left, right):
            assert blocks.save(parts, layers_of(blocks, parts)).is_complete
            assert blocks.lookup_local(parts) is not None
        assert whole.lookup_local(parts) is None
        assert whole.contains(parts) == BLOCKS


@pytest.mark.parametrize("kills", [True, False], ids=["SIGKILL", "SIGTERM"])
def test_right_after_a_restart_the_answer_is_right(new_daemon: Callable[..., DaemonProcess], kills: bool) -> None:
    daemon = new_daemon()
    with daemon.client() as client:
        blocks = client.open_layout(LAYOUT)
        filled(blocks)
        kept, dropped = saved(blocks), saved(blocks)
        assert blocks.contains(dropped) == BLOCKS
        file = daemon.arena_folder / "directory"
        if kills:
            daemon.kill()
            assert file.exists()
        else:
            daemon.stop()
            assert not file.exists()
        daemon.start()
        with daemon.client() as other:
            other.admin.discard(dropped)
        assert blocks.contains(dropped) == 0
        assert blocks.contains(kept) == BLOCKS
        filled(blocks)
        assert blocks.contains(dropped) == 0
        hit = blocks.lookup_local(kept)
        assert hit is not None
        assert hit.blocks == BLOCKS


def test_a_dead_daemons_directory_answers_no_lookup(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon()
    with daemon.client(reconnect_wait_s=0.0) as client:
        blocks = client.open_layout(LAYOUT)
        filled(blocks)
        chain = saved(blocks)
        old = (daemon.arena_folder / "directory").read_bytes()
        daemon.kill()
        daemon.start()
        with daemon.client() as other:
            other.admin.discard(chain)
            fresh = other.open_layout(LAYOUT)
            filled(fresh)
            (daemon.arena_folder / "directory").unlink()
            (daemon.arena_folder / "directory").write_bytes(old)  # In the state LIVE, but of another boot epoch.
            with daemon.client() as late:
                assert late.open_layout(LAYOUT).lookup_local(chain) is None
                assert late.open_layout(LAYOUT).contains(chain) == 0


def remove(file: Path) -> None:
    file.unlink()


def cut_off(file: Path) -> None:
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: len(data) // 2])


def give_to_another_store(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[16] ^= 1
    file.unlink()
    file.write_bytes(data)


def forbid(file: Path) -> None:
    if os.geteuid() == 0:
        file.unlink()
        file.mkdir()  # Root reads everything but this.
    else:
        file.chmod(0)


def say_it_is_building(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(4 * STATE_WORD)
        opened.write(DirectoryState.BUILDING.to_bytes(4, "little"))


@pytest.mark.parametrize("damage", [remove, cut_off, give_to_another_store, forbid, say_it_is_building])
def test_without_a_directory_of_its_own_a_client_asks_the_daemon(
    new_daemon: Callable[..., DaemonProcess], damage: Callable[[Path], None]
) -> None:
    daemon = new_daemon()
    with daemon.client() as client:
        blocks = client.open_layout(LAYOUT)
        filled(blocks)
        chain = saved(blocks)
    damage(daemon.arena_folder / "directory")
    with daemon.client() as client:
        blocks = client.open_layout(LAYOUT)
        asked = lookups_asked(daemon)
        assert blocks.lookup_local(chain) is None
        assert blocks.contains(chain) == BLOCKS
        assert lookups_asked(daemon) == asked + BLOCKS
    assert daemon.stop() == 0
    assert "Traceback" not in "".join(daemon.lines)


def test_a_daemon_that_may_not_have_a_directory_names_none(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(dram__directory_bytes_max=0)
    with daemon.client() as client:
        blocks = client.open_layout(LAYOUT)
        chain = saved(blocks)
        assert client.capabilities().residency_directory == ""
        assert blocks.lookup_local(chain) is None
        assert blocks.contains(chain) == BLOCKS


def test_a_full_tmpfs_means_no_directory_and_a_line_in_the_log(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "shm", 64 << 20) as shared_memory:
        daemon = DaemonProcess(tmp_path, dram__path=shared_memory, dram__capacity_bytes=24 << 20)
        try:
            daemon.start()
            daemon.stop()
            fill(shared_memory, leave_bytes=64 << 10)
            daemon.start()
            daemon.wait_for_log("no residency directory")
            with daemon.client() as client:
                blocks = client.open_layout(LAYOUT)
                chain = saved(blocks)
                assert blocks.lookup_local(chain) is None
                assert blocks.contains(chain) == BLOCKS
            assert daemon.stop() == 0
        finally:
            daemon.remove()


class TestAPeek:
    def test_answers_as_a_lookup_in_shared_memory_without_a_call(self, daemon: DaemonProcess) -> None:
        with daemon.client() as client:
            blocks = client.open_layout(LAYOUT)
            filled(blocks)
            chain = saved(blocks)
            until(lambda: (found := blocks.peek(chain)) is not None and found.on_ssd == BLOCKS)  # None is copied later.
            asked = lookups_asked(daemon)
            assert blocks.peek(new_chain(LAYOUT, 8)) == LocalHit(0, 0, 0)
            client.admin.discard(chain.keys[11:12])
            for first in range(BLOCKS):
                assert blocks.peek(chain[first:]) == blocks.lookup_local(chain[first:])
            assert lookups_asked(daemon) == asked

    def test_begins_to_attach_and_to_open_the_layout(self, daemon: DaemonProcess) -> None:
        with daemon.client() as client:
            chain = saved(client.open_layout(LAYOUT))
        with daemon.client() as new:
            blocks, unknown = new.open_layout(LAYOUT), small_layout("never opened")
            until(lambda: blocks.peek(chain) is not None)
            assert blocks.peek(chain) == blocks.lookup_local(chain)
            other = new.open_layout(unknown)
            until(lambda: other.peek(new_chain(unknown, 8)) == LocalHit(0, 0, 0))

    def test_has_no_answer_without_a_directory(self, new_daemon: Callable[..., DaemonProcess]) -> None:
        with new_daemon(dram__directory_bytes_max=0).client() as client:
            blocks = client.open_layout(LAYOUT)
            assert blocks.peek(saved(blocks)) is None

    def test_never_waits_for_a_daemon_that_is_stopped(self, new_daemon: Callable[..., DaemonProcess]) -> None:
        daemon = new_daemon()
        with daemon.client() as attached, daemon.client(timeout_s=NEVER_S) as new:
            filled(attached.open_layout(LAYOUT))
            chain = saved(attached.open_layout(LAYOUT))
            blocks = new.open_layout(LAYOUT)
            threads = threading.active_count()
            daemon.process.send_signal(signal.SIGSTOP)
            try:
                for _ in range(100):
                    assert blocks.peek(chain) is None
                assert threading.active_count() <= threads + 3, "one that attaches, the attach stream, and one of gRPC"
                hit = attached.open_layout(LAYOUT).peek(chain)
                assert hit is not None
                assert hit.blocks == BLOCKS, "the directory stays readable"
            finally:
                daemon.process.send_signal(signal.SIGCONT)
            until(lambda: blocks.peek(chain) is not None)

    def test_has_an_answer_again_after_a_restart(self, new_daemon: Callable[..., DaemonProcess]) -> None:
        daemon = new_daemon()
        with daemon.client(reconnect_wait_s=0.0) as client:
            blocks = client.open_layout(LAYOUT)
            filled(blocks)
            kept, dropped = saved(blocks), saved(blocks)
            daemon.kill()
            until(lambda: blocks.peek(kept) is None)
            daemon.start()
            with daemon.client() as other:
                other.admin.discard(dropped)
            until(lambda: blocks.peek(kept) is not None)
            hit = blocks.peek(kept)
            assert hit is not None
            assert hit.blocks == BLOCKS
            assert blocks.peek(dropped) == LocalHit(0, 0, 0)

    def test_of_a_closed_client_has_no_answer(self, daemon: DaemonProcess) -> None:
        client = daemon.client()
        blocks = client.open_layout(LAYOUT)
        filled(blocks)
        client.close()
        until(lambda: blocks.peek(new_chain(LAYOUT, 8)) is None)
