"""``kvservice remove``: what belongs to a store goes, and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvservice_client import Durability
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import SMALL, new_chain, save, verify

NewDaemon = Callable[..., DaemonProcess]


def used(new_daemon: NewDaemon, **settings: object) -> DaemonProcess:
    daemon = new_daemon(**settings)
    with daemon.client() as client:
        save(client, SMALL, new_chain(SMALL, 3), Durability.SSD)
    return daemon


def removed(store: Path, code: int = 0) -> dict[str, Any]:
    """The answer of a removal that is not asked for."""
    done = DaemonProcess.command("remove", "--yes", "--json", str(store))
    assert done.returncode == code, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def files_of(folder: Path) -> list[str]:
    return sorted(str(each) for each in folder.rglob("*"))


def test_a_store_goes_with_its_folder_its_drives_and_its_shared_memory(new_daemon: NewDaemon, tmp_path: Path) -> None:
    drives = [tmp_path / "a", tmp_path / "b"]
    for drive in drives:
        drive.mkdir()
    daemon = used(new_daemon, ssd__paths=":".join(map(str, drives)))
    arena = daemon.arena_folder
    assert daemon.stop() == 0

    assert removed(daemon.store)["not_deleted"] == []

    assert not daemon.store.exists()
    assert not arena.exists()
    assert not [file for drive in drives for file in drive.iterdir()]
    daemon.start()
    with daemon.client() as client:
        assert client.admin.status().ssd.used_bytes == 0


def test_what_a_store_does_not_make_stays(new_daemon: NewDaemon, tmp_path: Path) -> None:
    daemon = used(new_daemon)
    assert daemon.stop() == 0
    theirs = [daemon.store / name for name in ("index-backup", "index.html", "notes.txt")]
    for each in theirs:
        each.write_text("an operator's")
    (tmp_path / "elsewhere").mkdir()
    (daemon.store / "index.new").symlink_to(tmp_path / "elsewhere")
    (daemon.store / "ssd-001.kv.partial").write_text("of a start that was killed")

    answer = removed(daemon.store)

    assert sorted(daemon.store.iterdir()) == theirs
    assert (tmp_path / "elsewhere").is_dir()
    assert {f"{each}: a store makes no such file" for each in theirs} <= set(answer["not_deleted"])
    assert [line for line in answer["not_deleted"] if "only the link is deleted" in line]


def test_nothing_goes_while_a_daemon_runs_or_without_a_yes(new_daemon: NewDaemon) -> None:
    daemon = used(new_daemon)
    running = daemon.command("remove", "--yes", str(daemon.store))
    assert running.returncode == 2
    assert "in use by process" in running.stderr
    assert "stop it first" in running.stderr
    assert daemon.stop() == 0
    before = files_of(daemon.store)

    unasked = daemon.command("remove", str(daemon.store))
    assert unasked.returncode == 2
    assert "add --yes" in unasked.stderr
    for answer in (b"n\n", b"\n", b"\x04"):  # The last one is Ctrl-D.
        main, terminal = pty.openpty()
        os.write(main, answer)
        asked = subprocess.run(
            [sys.executable, "-m", "kvservice", "remove", str(daemon.store)],
            stdin=terminal, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        os.close(terminal)
        os.close(main)
        assert (asked.returncode, "nothing was deleted" in asked.stdout, "Traceback" in asked.stderr) == (
            1,
            True,
            False,
        )

    assert files_of(daemon.store) == before
    assert daemon.check().returncode == 0


def test_a_copy_of_a_store_takes_nothing_of_the_original(new_daemon: NewDaemon, tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir()
    daemon = used(new_daemon, ssd__paths=tmp_path / "drive")
    arena = daemon.arena_folder
    assert daemon.stop() == 0
    shutil.copytree(daemon.store, tmp_path / "copy")

    answer = removed(tmp_path / "copy")

    assert not (tmp_path / "copy").exists()
    assert arena.is_dir()
    assert any(line.startswith(str(tmp_path / "drive" / "ssd-000.kv")) for line in answer["not_deleted"])
    assert daemon.check().returncode == 0


def test_shared_memory_in_use_keeps_the_whole_store(new_daemon: NewDaemon) -> None:
    daemon = used(new_daemon)
    lock = daemon.arena_folder / "lock"
    assert daemon.stop() == 0
    before = files_of(daemon.store)
    with lock.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = daemon.command("remove", "--yes", str(daemon.store))

    assert (done.returncode, done.stdout) == (2, "")
    assert "stop it first" in done.stderr
    assert files_of(daemon.store) == before


def test_a_damaged_store_goes_too_and_the_answer_says_what_its_index_may_have_named(new_daemon: NewDaemon) -> None:
    daemon, other = used(new_daemon), used(new_daemon)
    chain = new_chain(SMALL, 2)
    with other.client() as client:
        save(client, SMALL, chain, Durability.SSD)
    assert daemon.stop() == other.stop() == 0
    (daemon.store / "index" / "data.mdb").write_bytes(b"")
    theirs = daemon.store / "ssd-009.kv"
    (other.store / "ssd-000.kv").rename(theirs)

    answer = removed(daemon.store)

    assert list(daemon.store.iterdir()) == [theirs]
    assert f"{theirs}: it is not a file of this store" in answer["not_deleted"]
    assert [line for line in answer["not_deleted"] if line.startswith("SSD files outside")]
    theirs.rename(other.store / "ssd-000.kv")
    other.start()
    with other.client() as client:
        verify(client, SMALL, chain)


def test_a_drive_that_is_away_is_named(new_daemon: NewDaemon, tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir()
    daemon = used(new_daemon, ssd__paths=tmp_path / "drive")
    assert daemon.stop() == 0
    (tmp_path / "drive").rename(tmp_path / "away")

    (line,) = removed(daemon.store)["not_deleted"]

    assert line.startswith(f"{tmp_path}/drive/ssd-000.kv: No such file or directory; if its drive is away")


@pytest.mark.parametrize("drives", [[], ["a", "b"]], ids=["in the store", "on drives"])
def test_a_removal_that_was_killed_is_continued_without_a_word_of_what_it_has_deleted(
    new_daemon: NewDaemon, tmp_path: Path, drives: list[str]
) -> None:
    for drive in drives:
        (tmp_path / drive).mkdir()
    daemon = used(new_daemon, **({"ssd__paths": ":".join(f"{tmp_path / drive}" for drive in drives)} if drives else {}))
    assert daemon.stop() == 0
    killed = (
        "import os, shutil, sys; rmtree = shutil.rmtree; "
        "shutil.rmtree = lambda path: os._exit(9) if path.name == 'index' else rmtree(path); "
        "from kvservice.__main__ import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", killed, "remove", "--yes", str(daemon.store)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, capture_output=True, timeout=60, check=False, env=environment).returncode == 9
    assert (daemon.store / "index").exists()
    assert not list(tmp_path.rglob("ssd-*.kv"))

    assert removed(daemon.store)["not_deleted"] == []

    assert not daemon.store.exists()


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    for name in ("index/data.mdb", "lock", "store_id", "ssd-000.kv"):
        (tmp_path / name).write_text("another program's")

    for yes in (["--yes"], []):  # The user is not told to confirm what cannot be done.
        done = DaemonProcess.command("remove", *yes, str(tmp_path))

        assert done.returncode == 2
        assert f"there is no store in {tmp_path}: give the folder that is the daemon's store.path" in done.stderr
    assert (tmp_path / "lock").read_text() == "another program's"
