"""``kvservice remove``: what belongs to a store goes, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kvservice_client import Durability
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import SMALL, new_chain, save


def used(new_daemon: Callable[..., DaemonProcess], **settings: object) -> DaemonProcess:
    daemon = new_daemon(**settings)
    with daemon.client() as client:
        save(client, SMALL, new_chain(SMALL, 3), Durability.SSD)
    return daemon


def test_a_store_goes_with_its_drives_and_its_shared_memory(
    new_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    drives = [tmp_path / "a", tmp_path / "b"]
    for drive in drives:
        drive.mkdir()
    daemon = used(new_daemon, ssd__paths=":".join(map(str, drives)))
    arena = daemon.arena_folder
    assert daemon.stop() == 0
    ours = daemon.store / "notes.txt"
    ours.write_text("an operator's")
    page = daemon.store / "index.html"
    page.write_text("an operator's too")
    (tmp_path / "elsewhere").mkdir()
    (daemon.store / "index.new").symlink_to(tmp_path / "elsewhere")

    done = daemon.command("remove", "--yes", "--json", str(daemon.store))

    assert done.returncode == 0, done.stderr
    assert sorted(daemon.store.iterdir()) == [page, ours]
    assert (tmp_path / "elsewhere").is_dir()
    assert not arena.exists()
    assert not [file for drive in drives for file in drive.iterdir()]
    stays = json.loads(done.stdout)["stays"]
    assert f"{ours}: a store makes no such file" in stays
    assert [line for line in stays if "only the link is deleted" in line]

    daemon.start()
    with daemon.client() as client:
        assert client.admin.status().ssd.used_bytes == 0


def test_nothing_goes_while_a_daemon_runs_or_without_a_yes(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = used(new_daemon)
    running = daemon.command("remove", "--yes", str(daemon.store))
    assert running.returncode == 2
    assert "in use by process" in running.stderr
    assert daemon.stop() == 0
    before = sorted(daemon.store.rglob("*"))

    unasked = daemon.command("remove", str(daemon.store))

    assert unasked.returncode == 2
    assert "add --yes" in unasked.stderr
    assert sorted(daemon.store.rglob("*")) == before
    assert daemon.check().returncode == 0


def test_a_damaged_store_goes_too_and_a_file_of_another_store_stays(
    new_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    daemon, other = used(new_daemon), used(new_daemon)
    assert daemon.stop() == other.stop() == 0
    arena = daemon.arena_folder
    (daemon.store / "index" / "data.mdb").write_bytes(b"")
    theirs = daemon.store / "ssd-009.kv"
    (other.store / "ssd-000.kv").rename(theirs)

    done = daemon.command("remove", "--yes", str(daemon.store))

    assert done.returncode == 0, done.stderr
    assert list(daemon.store.iterdir()) == [theirs]
    assert f"{theirs}: it is not a file of this store" in done.stdout
    assert "SSD files outside" in done.stdout, "the index names them, and it is damaged"
    assert arena.exists(), "it is not in /dev/shm itself"


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not ours")

    done = DaemonProcess.command("remove", "--yes", str(tmp_path))

    assert done.returncode == 2
    assert f"there is no store in {tmp_path}" in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["data"]
