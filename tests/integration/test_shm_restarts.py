"""Reads and writes in place across a restart of the daemon, with the same arena or with a new one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvservice_api.arena import WRITER_NOTE
from kvservice_api.errors import DaemonUnavailable, LeaseExpired, NotShared, UnknownClient
from kvservice_client import Client, Durability
from kvservice_client.arena_map import ArenaMap
from kvservice_client.retry import Deadline
from kvservice_client.transports.shm import ShmTransport
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.by_hand import InPlaceWriter
from tests.integration.known_blocks import LARGE, layers_of, new_chain, save, verify
from tests.integration.wire import Wire, refused


@pytest.fixture
def daemon(new_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    return new_daemon(dram__capacity_bytes=16 * MIB, index__volatile_map_bytes=4 * MIB)


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client(transport="shm") as client:
        yield client


def replace_the_arena(daemon: DaemonProcess) -> None:
    daemon.kill()
    shutil.rmtree(daemon.arena_folder)
    daemon.start()


def test_a_view_of_a_replaced_arena_keeps_its_bytes(daemon: DaemonProcess, client: Client) -> None:
    chain = new_chain(LARGE, 8)
    save(client, LARGE, chain, Durability.SSD)
    with client.open_layout(LARGE).lookup(chain, lease_ttl_s=300) as lease, lease.view() as view:
        replace_the_arena(daemon)
        with daemon.client() as other:
            for _ in range(10):
                save(other, LARGE, new_chain(LARGE, 8))
        found = [[each.copy() for (each,) in view.slices(layer)] for layer in range(LARGE.layers)]
        view.check()
    assert np.array_equal(found, layers_of(LARGE, chain))


def test_a_client_maps_the_arena_that_replaced_its_own(daemon: DaemonProcess, client: Client) -> None:
    chain = new_chain(LARGE, 4)
    save(client, LARGE, chain, Durability.SSD)
    verify(client, LARGE, chain)
    replace_the_arena(daemon)
    verify(client, LARGE, chain)
    after = new_chain(LARGE, 4)
    assert save(client, LARGE, after).stored == 4
    verify(client, LARGE, after)
    stats = client.stats()
    assert (set(stats.loaded_bytes), set(stats.saved_bytes)) == ({"shm"}, {"shm"})


def test_a_replaced_arena_cannot_be_mapped_by_its_old_name(daemon: DaemonProcess) -> None:
    with Wire(daemon.address) as wire:
        wire.attach()
        old = wire.capabilities()
    replace_the_arena(daemon)
    with pytest.raises(NotShared, match="cannot be mapped"):
        ArenaMap(daemon.arena_folder, old.arena_id, old.arena_capacity_bytes)


def test_places_in_another_arena_than_the_mapped_one_are_neither_read_nor_written(
    daemon: DaemonProcess, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the client had mapped the old arena and then called the new daemon."""
    save(client, LARGE, new_chain(LARGE, 4))
    arenas = client._transports._transports[0]._arenas  # type: ignore[attr-defined]
    mapped = arenas.get(client.capabilities())
    replace_the_arena(daemon)
    monkeypatch.setattr(arenas, "get", lambda limits: mapped)
    chain = new_chain(LARGE, 4)
    assert save(client, LARGE, chain).stored == 4
    verify(client, LARGE, chain)
    assert "replaced its arena" in client.stats().shm_refused_because
    with client.open_layout(LARGE).lookup(chain) as lease, pytest.raises(NotShared, match="replaced its arena"):
        lease.view()


def test_a_load_continues_without_its_daemon_as_long_as_its_bytes_are_in_place(
    daemon: DaemonProcess, client: Client
) -> None:
    chain = new_chain(LARGE, 8)
    save(client, LARGE, chain)
    layers = client.open_layout(LARGE).lookup(chain).load()
    loaded = [next(layers).data]
    daemon.kill()
    loaded += [layer.data for layer in layers]
    expected = [np.concatenate(slices).tobytes() for slices in layers_of(LARGE, chain)]
    assert [layer.tobytes() for layer in loaded] == expected


def test_a_view_ends_when_its_blocks_were_discarded_before_the_daemon_died(
    daemon: DaemonProcess, client: Client
) -> None:
    """Their records were deleted, but their space was not free yet; for the next daemon it is free."""
    chain = new_chain(LARGE, 8)
    save(client, LARGE, chain)
    with client.open_layout(LARGE).lookup(chain, lease_ttl_s=300) as lease:
        view = lease.view()
        assert client.admin.discard(chain).discarded == 8
        view.check()
        daemon.kill()
        daemon.start()
        with pytest.raises(LeaseExpired):
            view.slices(0)


def test_a_writer_over_a_replaced_arena_writes_into_nothing(daemon: DaemonProcess) -> None:
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(LARGE)
        reserved = InPlaceWriter(wire, LARGE).reserve(new_chain(LARGE, 8))
        reserved.write(range(1))
        replace_the_arena(daemon)
        with daemon.client() as client:
            chains = [new_chain(LARGE, 8) for _ in range(6)]
            for chain in chains:
                save(client, LARGE, chain, Durability.SSD)
            reserved.scribble()
            with refused(UnknownClient, "attach"):
                until(lambda: bool(reserved.commit()))
            for chain in chains:
                verify(client, LARGE, chain)


def test_space_of_a_living_writer_stays_aside_over_several_restarts(daemon: DaemonProcess, client: Client) -> None:
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(LARGE)
        writer = InPlaceWriter(wire, LARGE)
        kept, given_back = writer.reserve(new_chain(LARGE, 4)), writer.reserve(new_chain(LARGE, 4))
        given_back.abandon()
        for _ in range(3):
            daemon.kill()
            daemon.start()
            until(lambda: client.admin.status().dram.used_bytes == 4 * 200_704)
            status = client.admin.status()
            assert (status.set_aside_extents, status.set_aside_bytes) == (4, 4 * 200_704)
        kvctl = [str(Path(sys.executable).with_name("kvctl")), "status", "--address", daemon.address]
        shown = subprocess.run(kvctl, capture_output=True, text=True, check=True).stdout.split()
        assert " ".join(shown).count("of DRAM in 4 extents are set aside") == 1
        chains = [new_chain(LARGE, 8) for _ in range(10)]
        for chain in chains:
            save(client, LARGE, chain, Durability.SSD)
        kept.scribble()
        for chain in chains:
            verify(client, LARGE, chain)
        assert writer.lock is not None
        writer.lock.release()
        client.admin.discard_all()
        until(lambda: client.admin.status().dram.used_bytes == 0)
        assert client.admin.status().set_aside_extents == 0


@pytest.mark.parametrize("moment", ["before the write", "after the write"])
def test_a_save_that_the_daemons_death_cut_off_gives_its_space_back_without_another_save(
    daemon: DaemonProcess, client: Client, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write = ShmTransport._write

    def die_and_write(*arguments: Any) -> Any:
        if moment == "before the write":
            daemon.kill()
        sums = write(*arguments)
        if moment == "after the write":
            daemon.kill()
        return sums

    with daemon.client(transport="shm", timeout_s=20, reconnect_wait_s=0) as saving:
        save(saving, LARGE, new_chain(LARGE, 1))
        monkeypatch.setattr(ShmTransport, "_write", die_and_write)
        with pytest.raises(DaemonUnavailable):
            save(saving, LARGE, new_chain(LARGE, 4))
        monkeypatch.undo()
        daemon.start()
        until(lambda: client.admin.status().set_aside_extents == 0)
        until(lambda: client.admin.status().dram.used_bytes == 200_704)


def test_space_stays_aside_while_a_save_still_writes_there_though_its_daemon_is_another(
    daemon: DaemonProcess, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShmTransport._write
    seen: list[int] = []

    def restart_and_write(transport: ShmTransport, *arguments: Any) -> Any:
        monkeypatch.undo()
        before = transport._connection.attach_stream.current(Deadline(5.0))
        daemon.kill()
        daemon.start()
        until(lambda: transport._connection.attach_stream._attachment not in (None, before))
        seen.append(client.admin.status().set_aside_extents)
        return write(transport, *arguments)

    with daemon.client(transport="shm", timeout_s=20, reconnect_wait_s=20) as saving:
        save(saving, LARGE, new_chain(LARGE, 1))
        monkeypatch.setattr(ShmTransport, "_write", restart_and_write)
        chain = new_chain(LARGE, 4)
        assert save(saving, LARGE, chain).stored == 4
        verify(saving, LARGE, chain)
        assert seen == [4]
        until(lambda: client.admin.status().set_aside_extents == 0)


def test_a_save_over_a_restart_leaves_nothing_set_aside(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client locks another file for the new attachment, and releases the old one."""
    write = ShmTransport._write

    def restart_and_write(*arguments: Any) -> Any:
        monkeypatch.undo()
        daemon.kill()
        daemon.start()
        return write(*arguments)

    with daemon.client(transport="shm", timeout_s=20, reconnect_wait_s=20) as client:
        save(client, LARGE, new_chain(LARGE, 1))
        writers = daemon.arena_folder / "writers"
        monkeypatch.setattr(ShmTransport, "_write", restart_and_write)
        chain = new_chain(LARGE, 4)
        assert save(client, LARGE, chain).stored == 4
        verify(client, LARGE, chain)
        until(lambda: client.admin.status().dram.used_bytes == 5 * 200_704)
        assert len(list(writers.iterdir())) == 1
    until(lambda: not list(writers.iterdir()))


def test_a_record_wins_over_a_note_of_the_same_space(daemon: DaemonProcess, client: Client) -> None:
    """As if the daemon had died between the record and the end of the note."""
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(LARGE)
        writer, chain = InPlaceWriter(wire, LARGE), new_chain(LARGE, 4)
        reserved = writer.reserve(chain)
        notes = writer.directory / "writers" / wire.client_id.hex()
        before = notes.read_bytes()
        reserved.write()
        assert reserved.commit().stored == 4
        daemon.kill()
        notes.write_bytes(before)
        assert {offset for offset, size in WRITER_NOTE.iter_unpack(before[32:]) if size} == set(reserved.answer.offsets)
        daemon.start()
        verify(client, LARGE, chain)
        used_bytes = client.admin.status().dram.used_bytes
        assert writer.lock is not None
        writer.lock.release()
        until(lambda: not list((writer.directory / "writers").glob(wire.client_id.hex())))
        assert client.admin.status().dram.used_bytes == used_bytes
        for _ in range(10):
            save(client, LARGE, new_chain(LARGE, 8), Durability.SSD)
        verify(client, LARGE, chain)
