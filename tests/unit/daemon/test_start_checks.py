"""What a start refuses before it has made a file."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kvservice.config import ConfigError
from kvservice.config_sources import load_settings
from kvservice.rpc.addresses import AddressUnusable
from kvservice.start_checks import NotThere, check_start


def check(folder: Path, *flags: str) -> None:
    """As `kvservice serve` with these flags after ones that can be used."""
    usable = {
        "store.path": folder / "store",
        "dram.path": folder,
        "ssd.capacity_bytes": "64MiB",
        "server.address": "127.0.0.1:0",
        "server.metrics_address": "127.0.0.1:0",
    }
    check_start(load_settings([*(f"--{name}={value}" for name, value in usable.items()), *flags], {}))


def test_what_can_be_used_passes_and_nothing_is_made(tmp_path: Path) -> None:
    check(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--dram.path=FOLDER/dram", "dram.path: there is no folder FOLDER/dram"),
        ("--dram.path=FOLDER/file", "dram.path: FOLDER/file is not a folder"),
        ("--ssd.paths=FOLDER:FOLDER/nvme0", "ssd.paths: there is no folder FOLDER/nvme0"),
        ("--store.path=FOLDER/file", "store.path: FOLDER/file is not a folder"),
        ("--store.path=FOLDER/a/b", "store.path: FOLDER/a/b cannot be created: there is no folder FOLDER/a"),
        ("--ssd.capacity_bytes=512PiB", "ssd.capacity_bytes: the SSD tier needs 536870911.0 GiB more in FOLDER, and "),
        ("--dram.capacity_bytes=1PiB", "dram.capacity_bytes: 1048576.0 GiB cannot be mapped"),
    ],
)
def test_a_path_or_a_size_that_the_machine_has_not_is_refused(tmp_path: Path, flag: str, why: str) -> None:
    (tmp_path / "file").touch()

    with pytest.raises((ConfigError, NotThere)) as refused:
        check(tmp_path, flag.replace("FOLDER", str(tmp_path)))

    assert str(refused.value).startswith(why.replace("FOLDER", str(tmp_path)))
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shm").mkdir(mode=0o500)
    with pytest.raises(NotThere, match="may not write in"):
        check(tmp_path, f"--dram.path={tmp_path / 'shm'}")


@pytest.mark.parametrize("setting", ["server.address", "server.metrics_address"])
def test_an_address_in_use_is_refused_before_a_store_is_made(tmp_path: Path, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(AddressUnusable, match=f"{setting} 127.0.0.1:{port}: something else listens there"):
            check(tmp_path, f"--{setting}=127.0.0.1:{port}")
    assert not list(tmp_path.iterdir())


def test_one_address_for_both_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(AddressUnusable, match=r"server\.address is the same"):
        check(tmp_path, f"--server.address={address}", f"--server.metrics_address={address}")


def test_a_new_store_is_not_made_in_a_folder_that_was_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--dram.path", str(tmp_path), "--server.address=127.0.0.1:0", "--server.metrics_address="]
    with pytest.raises(
        ConfigError, match=r"store\.path is not set: .* A new store takes 10\.0 GiB of its disk at once"
    ):
        check_start(load_settings(flags, {}))
    assert not list(tmp_path.iterdir())

    (tmp_path / "kvservice-data" / "index").mkdir(parents=True)
    (tmp_path / "kvservice-data" / "store_id").touch()
    check_start(load_settings(flags, {}))  # One that an earlier version has made there.


@pytest.mark.parametrize(
    ("socket_path", "why"),
    [("FOLDER/nowhere/kv.sock", "there is no folder FOLDER/nowhere"), ("FOLDER/file", "a file that is not a socket")],
)
def test_a_socket_that_cannot_be_made_is_refused_before_a_store_is_made(
    tmp_path: Path, socket_path: str, why: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        (NotThere, AddressUnusable), match=f"server.unix_socket.*{why.replace('FOLDER', str(tmp_path))}"
    ):
        check(tmp_path, f"--server.unix_socket={socket_path.replace('FOLDER', str(tmp_path))}")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_memory_is_made_again_after_the_hosts_restart(tmp_path: Path) -> None:
    check(tmp_path, "--dram.path=/dev/shm/kvservice-test-that-is-not-there")


def test_of_a_lost_index_nothing_is_said_here(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store_id").touch()
    check(tmp_path, "--ssd.capacity_bytes=512PiB")


def test_a_store_that_is_there_needs_no_free_space(tmp_path: Path) -> None:
    (tmp_path / "store" / "index").mkdir(parents=True)
    (tmp_path / "store" / "index" / "data.mdb").touch()
    check(tmp_path, "--ssd.capacity_bytes=512PiB")
