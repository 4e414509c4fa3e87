"""``kvservice arenas``: each arena with its store, and those of stores that are gone are deleted, and no other."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kvservice import arenas
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import SMALL, new_chain, save, verify

NewDaemon = Callable[..., DaemonProcess]
REMOVE = ("--remove-orphans", "--yes")


def listed(folder: Path, *flags: str, code: int = 0) -> list[dict[str, Any]]:
    done = DaemonProcess.command("arenas", "--json", *flags, str(folder))
    assert done.returncode == code, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["arenas"]
    return found


def stopped(new_daemon: NewDaemon, **settings: object) -> DaemonProcess:
    daemon = new_daemon(**settings)
    assert daemon.stop() == 0
    return daemon


@contextmanager
def another_user() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_only_the_arena_whose_store_is_gone_goes(new_daemon: NewDaemon) -> None:
    running = new_daemon()
    shared = running.shared_memory
    kept, gone = new_daemon(dram__path=shared), new_daemon(dram__path=shared)
    chain = new_chain(SMALL, 3)
    with kept.client() as client:
        save(client, SMALL, chain)
    assert kept.stop() == gone.stop() == 0
    shutil.rmtree(gone.folder)

    before = listed(shared)
    after = listed(shared, *REMOVE)

    states = {str(running.store): "in use", str(kept.store): "needed", str(gone.store): "orphan"}
    assert {each["store"]: each["state"] for each in before} == states
    assert [each["store"] for each in after if each["removed"]] == [str(gone.store)]
    assert [each["why"] for each in after if each["removed"]] == [f"its store {gone.store} is gone"]
    assert len(list(shared.iterdir())) == 2
    with kept.start().client() as client:
        verify(client, SMALL, chain)


def test_without_a_yes_nothing_goes(new_daemon: NewDaemon) -> None:
    daemon = stopped(new_daemon)
    shutil.rmtree(daemon.store)
    done = daemon.command("arenas", "--remove-orphans", str(daemon.shared_memory))
    assert (done.returncode, done.stdout) == (2, "")
    assert "add --yes" in done.stderr
    text = daemon.command("arenas", str(daemon.shared_memory)).stdout
    assert str(daemon.arena_folder) in text
    assert f"orphan: its store {daemon.store} is gone" in text
    assert daemon.command("arenas", str(daemon.folder / "none")).returncode == 2
    arena = daemon.arena_folder
    with mock.patch.object(sys.stdin, "isatty", return_value=True, create=True):
        for answer, code in (("", 1), ("n", 1), ("y", 0)):
            assert arena.is_dir()
            with mock.patch("builtins.input", return_value=answer):
                assert arenas.main(["--remove-orphans", str(daemon.shared_memory)]) == code
    assert not arena.exists()


def test_an_arena_of_an_earlier_setting_is_named_and_goes_with_its_store(new_daemon: NewDaemon, tmp_path: Path) -> None:
    daemon = stopped(new_daemon)
    earlier, store = daemon.arena_folder, daemon.store
    later = daemon.shared_memory / "later"
    later.mkdir()
    daemon.settings["dram.path"] = later
    daemon.start()
    assert str(earlier) in daemon.wait_for_log("an arena of an earlier dram.path takes memory")["event"]
    assert daemon.stop() == 0

    (found,) = listed(daemon.shared_memory)
    assert (found["state"], found["arena"]) == ("orphan", str(earlier))
    expected = f"of an earlier dram.path: its store {store} is there, and uses {later / earlier.name} now"
    assert found["why"] == expected
    (current,) = listed(later)
    assert current["state"] == "needed"
    shutil.copytree(store, tmp_path / "copy")
    daemon.command("remove", "--yes", str(tmp_path / "copy"))
    assert earlier.exists()
    assert (later / earlier.name).exists()

    assert daemon.command("remove", "--yes", str(store)).returncode == 0

    assert not earlier.exists()
    assert not (later / earlier.name).exists()


def test_a_store_that_may_still_exist_keeps_its_arena(new_daemon: NewDaemon, tmp_path: Path) -> None:
    daemon = stopped(new_daemon)
    store, arena = daemon.store, daemon.arena_folder

    def kept(state: str, why: str) -> None:
        (found,) = listed(daemon.shared_memory, *REMOVE)
        assert (found["state"], found["removed"]) == (state, False)
        assert why in found["why"]
        assert (arena / "arena").is_file()

    store.rename(daemon.folder / "renamed")
    kept("needed", f"its store was moved to {daemon.folder / 'renamed'}")
    (daemon.folder / "renamed").rename(tmp_path / "away")
    store.mkdir()  # As a mount point whose drive is away.
    kept("unknown", "perhaps a drive is away")
    daemon.folder.rename(tmp_path / "other")
    daemon.folder.mkdir()  # Another folder of the same name, as in another container.
    kept("unknown", "not visible here")
    (arena / "store.json").write_text("{}")
    kept("unknown", "no note of its store")
    (arena / "store.json").unlink()  # As of an older version.
    (arena / "arena").write_bytes(b"KVARENA1")
    kept("unknown", "no note of its store")


def test_another_store_in_the_same_folder_does_not_need_it(new_daemon: NewDaemon) -> None:
    daemon = stopped(new_daemon)
    first = daemon.arena_folder
    shutil.rmtree(daemon.store)
    daemon.start()
    found = {each["arena"]: each for each in listed(daemon.shared_memory, *REMOVE)}
    assert found[str(first)]["why"] == f"{daemon.store} has another store now"
    assert {each["removed"] for each in found.values()} == {True, False}
    with daemon.client() as client:
        assert client.admin.status().dram.capacity_bytes


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_an_arena_of_another_user_is_listed_and_kept(new_daemon: NewDaemon) -> None:
    daemon = stopped(new_daemon)
    daemon.shared_memory.chmod(0o755)
    shutil.rmtree(daemon.store)
    with another_user():
        found = arenas.examine(daemon.arena_folder)
        assert arenas.main([*REMOVE, str(daemon.shared_memory)]) == 0
    assert (found.state, found.why) == ("unknown", "only its user, root, may look into it")
    assert daemon.arena_folder.is_dir()
