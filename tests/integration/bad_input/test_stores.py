"""A daemon that cannot use its store or its configuration says why, changes nothing, and exits."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from kvservice.index.environment import META, Environment
from kvservice.index.identity import SCHEMA
from kvservice_client import Client, Durability
from tests.daemon import MIB, DaemonProcess
from tests.integration.known_blocks import SMALL, new_chain, save, verify


def refuses(daemon: DaemonProcess, *, code: int = 1) -> str:
    """The daemon ends by itself, with this exit code. Returns its log."""
    daemon.launch()
    assert daemon.wait_for_end() == code
    assert "Traceback" not in "".join(daemon.lines)
    return "".join(daemon.lines)


def fingerprints(folder: Path) -> dict[str, str]:
    """The content of all files below the folder, by name."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "lock.mdb")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def set_schema(store: Path, version: bytes) -> None:
    index = Environment(store / "index", map_bytes=4 * MIB, durable=True)
    index.write_now(META, {b"schema": version})
    index.close()


def test_a_store_of_a_newer_schema_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    chain = new_chain(SMALL, 3)
    with DaemonProcess(tmp_path, ssd__capacity_bytes=16 * MIB, dram__capacity_bytes=16 * MIB) as daemon:
        with daemon.client() as client:
            save(client, SMALL, chain, Durability.SSD)
        assert daemon.stop() == 0
        set_schema(daemon.store, b"%d" % (SCHEMA + 1))
        before = fingerprints(daemon.store), fingerprints(daemon.shared_memory)

        why = f"the store's schema is version {SCHEMA + 1}; this program knows versions up to {SCHEMA}"
        assert why in refuses(daemon)
        assert (fingerprints(daemon.store), fingerprints(daemon.shared_memory)) == before

        set_schema(daemon.store, b"%d" % SCHEMA)
        daemon.start()
        with daemon.client() as client:
            verify(client, SMALL, chain)
            assert client.admin.status().dram.blocks == 3


def test_a_second_daemon_on_one_store_is_refused_and_the_first_serves(tmp_path: Path) -> None:
    chain, more = new_chain(SMALL, 3), new_chain(SMALL, 3)
    with DaemonProcess(tmp_path) as first, first.client() as client:
        save(client, SMALL, chain, Durability.SSD)
        second = DaemonProcess(tmp_path)
        try:
            message = refuses(second)
            assert f"{second.store} is in use by process {first.process.pid}" in message
            verify(client, SMALL, chain)
            save(client, SMALL, more, Durability.SSD)
            with Client(str(first.socket_path)) as by_socket:
                verify(by_socket, SMALL, more)

            first.kill()  # The kernel releases the lock with its holder.
            second.start()
            with second.client() as client_of_second:
                verify(client_of_second, SMALL, chain)
                verify(client_of_second, SMALL, more)
        finally:
            second.remove()


@pytest.mark.parametrize("setting", ["server.address", "server.metrics_address"])
def test_a_second_daemon_on_one_address_is_refused_and_the_first_serves(tmp_path: Path, setting: str) -> None:
    chain = new_chain(SMALL)
    with DaemonProcess(tmp_path / "first") as first, first.client() as client:
        save(client, SMALL, chain)
        settings: dict[str, Any] = {setting: first.address}
        second = DaemonProcess(tmp_path / "second", **settings)
        try:
            said = refuses(second)
            assert f"{setting} {first.address}: something else listens there; stop it, or name another" in said
            assert "GRPC_VERBOSITY" not in said
        finally:
            second.remove()
        verify(client, SMALL, chain)


@pytest.mark.parametrize("setting", ["server.address", "server.metrics_address"])
def test_an_address_of_another_host_is_named_with_its_setting(tmp_path: Path, setting: str) -> None:
    settings: dict[str, Any] = {setting: "192.0.2.1:7070", "server.insecure": True}
    daemon = DaemonProcess(tmp_path, **settings)
    try:
        assert f"{setting} 192.0.2.1:7070: Cannot assign requested address" in refuses(daemon)
    finally:
        daemon.remove()


def test_a_second_daemon_on_one_unix_socket_is_refused_and_the_first_keeps_it(tmp_path: Path) -> None:
    chain = new_chain(SMALL)
    path = tmp_path / "shared.sock"
    with DaemonProcess(tmp_path / "first", server__unix_socket=path) as first, Client(str(path)) as client:
        save(client, SMALL, chain)
        second = DaemonProcess(tmp_path / "second", server__unix_socket=path)
        try:
            assert f"server.unix_socket {path}: another daemon" in refuses(second)
            with Client(str(path)) as another:
                verify(another, SMALL, chain)

            first.kill()  # Its socket stays, and no process listens on it.
            assert path.is_socket()
            second.start()
            with Client(str(path)) as client_of_second:
                save(client_of_second, SMALL, chain)
            assert second.stop() == 0
            assert not path.exists()
            first.start()
            with Client(str(path)) as another:
                assert another.admin.status().state == "serving"
        finally:
            second.remove()


@pytest.mark.parametrize("in_the_way", ["a program without our lock", "a file", "no folder"])
def test_a_unix_socket_that_cannot_be_made_is_named_with_the_reason(tmp_path: Path, in_the_way: str) -> None:
    path = tmp_path / "folder" / "some.sock"
    daemon = DaemonProcess(tmp_path / "daemon", server__unix_socket=path)
    try:
        if in_the_way != "no folder":
            path.parent.mkdir()
        if in_the_way == "a file":
            path.write_bytes(b"precious")
        with socket.socket(socket.AF_UNIX) as other:
            if in_the_way == "a program without our lock":
                other.bind(str(path))
                other.listen()
            said = refuses(daemon)
        assert "server.unix_socket" in said
        assert {
            "a program without our lock": "another program listens there",
            "a file": "not a socket has this path",
            "no folder": f"there is no folder {path.parent}",
        }[in_the_way] in said
        assert path.exists() == (in_the_way != "no folder")
    finally:
        daemon.remove()


def test_a_file_of_another_store_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    chain = new_chain(SMALL)
    disk = tmp_path / "disk"
    disk.mkdir()
    with DaemonProcess(tmp_path / "first", ssd__paths=disk, ssd__capacity_bytes=16 * MIB) as first:
        with first.client() as client:
            save(client, SMALL, chain, Durability.SSD)
        first.stop()
        before = fingerprints(disk)
        second = DaemonProcess(tmp_path / "second", ssd__paths=disk, ssd__capacity_bytes=16 * MIB)
        try:
            assert str(disk / "ssd-000.kv") in refuses(second)
        finally:
            second.remove()
        assert fingerprints(disk) == before
        first.start()
        with first.client() as client:
            verify(client, SMALL, chain)


def test_a_drive_that_is_away_keeps_the_daemon_from_starting_and_costs_no_block(tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    drive.mkdir()
    chain = new_chain(SMALL, 3)
    with DaemonProcess(tmp_path, ssd__paths=drive, ssd__capacity_bytes=16 * MIB) as daemon:
        with daemon.client() as client:
            save(client, SMALL, chain, Durability.SSD)
        daemon.stop()
        for folder in daemon.shared_memory.iterdir():  # As after a reboot of the host.
            shutil.rmtree(folder)
        drive.rename(tmp_path / "unmounted")
        drive.mkdir()

        message = refuses(daemon)
        assert f"{drive / 'ssd-000.kv'} is missing" in message
        assert "kvservice check --repair" in message
        assert not os.listdir(drive)
        assert daemon.check().returncode == 1

        drive.rmdir()
        (tmp_path / "unmounted").rename(drive)
        daemon.start()
        with daemon.client() as client:
            verify(client, SMALL, chain)


def test_a_drive_that_stays_away_is_given_up_by_repair_and_the_daemon_starts(tmp_path: Path) -> None:
    drives = [tmp_path / "one", tmp_path / "two"]
    for drive in drives:
        drive.mkdir()
    settings: dict[str, Any] = {"ssd__paths": os.pathsep.join(map(str, drives)), "ssd__capacity_bytes": 16 * MIB}
    chain = new_chain(SMALL, 8)
    with DaemonProcess(tmp_path, **settings) as daemon:
        with daemon.client() as client:
            save(client, SMALL, chain, Durability.SSD)
        daemon.stop()
        for folder in daemon.shared_memory.iterdir():
            shutil.rmtree(folder)
        shutil.rmtree(drives[1])

        refuses(daemon)
        repaired = daemon.check("--repair")
        assert repaired.returncode == 1
        assert f"given up {drives[1] / 'ssd-001.kv'} and the 4 blocks in it" in repaired.stdout

        assert f"ssd.paths: there is no folder {drives[1]}" in refuses(daemon)
        drives[1].mkdir()  # Another drive is mounted there.
        daemon.start()
        with daemon.client() as client:
            assert client.admin.status().ssd.blocks == 4
            again = save(client, SMALL, chain, Durability.SSD)
            assert again.is_complete
            verify(client, SMALL, chain)
        daemon.stop()
        assert daemon.check().returncode == 0


@pytest.mark.parametrize(
    ("environment", "toml", "flags", "message"),
    [
        ({}, "", {"dram__capasity_bytes": 1}, "--dram.capasity_bytes among the flags is no setting; the nearest one is "
                                              "--dram.capacity_bytes"),
        ({"KVSERVICE_SERVER__ADRESS": "x"}, "", {}, "KVSERVICE_SERVER__ADRESS in the environment is no setting; the "
                                                    "nearest one is KVSERVICE_SERVER__ADDRESS"),
        ({}, "[mover]\npolitics = 'lru'\n", {}, "is no setting; the nearest one is mover.policy"),
        ({}, "[ssds]\npaths = []\n", {}, "is no setting; the nearest one is ssd.paths"),
        ({}, "", {"mover__policy": "lrü"}, "mover.policy among the flags: input should be 'lru'"),
        ({}, "", {"ssd__capacity_bytes": "ten"}, "ssd.capacity_bytes among the flags: "),
        ({}, "", {"server__address": "0.0.0.0:0"}, "can be reached from other hosts"),
    ],
    ids=["a flag", "a variable", "a line of the file", "a section of the file", "a value", "a size", "an open door"],
)  # fmt: skip
def test_a_mistyped_configuration_is_named_with_the_nearest_valid_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    toml: str,
    flags: dict[str, Any],
    message: str,
) -> None:
    file = tmp_path / "kvservice.toml"
    file.write_text(toml)
    for name, value in {"KVSERVICE_CONFIG": str(file), **environment}.items():
        monkeypatch.setenv(name, value)
    daemon = DaemonProcess(tmp_path, **flags)
    try:
        assert message in refuses(daemon, code=2)
        assert not daemon.store.exists()
        assert not os.listdir(daemon.shared_memory)
    finally:
        daemon.remove()
