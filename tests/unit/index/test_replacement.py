"""An interrupted replacement of the durable index: its states, and how each is finished or undone."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvservice.index import replacement

OLD, NEW = b"old", b"new"


def folder(path: Path, content: bytes, marker: str = "") -> Path:
    path.mkdir()
    (path / "data.mdb").write_bytes(content)
    if marker:
        (path / marker).touch()
    return path


def contents(store: Path) -> dict[str, bytes]:
    """The indexes of the store afterwards; no marker remains."""
    assert all([file.name for file in path.iterdir()] == ["data.mdb"] for path in store.iterdir())
    return {path.name: (path / "data.mdb").read_bytes() for path in store.iterdir()}


@pytest.mark.parametrize("marker", ["unfinished", "complete"])
def test_a_new_index_beside_the_old_one_is_removed(tmp_path: Path, marker: str) -> None:
    folder(tmp_path / "index", OLD)
    folder(tmp_path / "index.new", NEW, marker)
    assert "is as it was" in replacement.interrupted(tmp_path)
    assert "is undone" in replacement.end_interrupted(tmp_path)
    assert contents(tmp_path) == {"index": OLD}
    assert replacement.interrupted(tmp_path) == replacement.end_interrupted(tmp_path) == ""


def test_a_new_index_that_is_not_complete_is_removed_where_there_was_none(tmp_path: Path) -> None:
    folder(tmp_path / "index.new", NEW, "unfinished")
    assert "is undone" in replacement.end_interrupted(tmp_path)
    assert contents(tmp_path) == {}


def test_a_complete_new_index_without_an_old_one_is_put_in_place(tmp_path: Path) -> None:
    folder(tmp_path / "index.new", NEW, "complete")
    folder(tmp_path / "index.damaged-1", OLD)
    assert f"there is no {tmp_path}/index" in replacement.interrupted(tmp_path)
    assert "is finished" in replacement.end_interrupted(tmp_path)
    assert contents(tmp_path) == {"index": NEW, "index.damaged-1": OLD}


def test_an_old_index_that_was_exchanged_gets_a_free_name(tmp_path: Path) -> None:
    folder(tmp_path / "index", NEW, "complete")
    folder(tmp_path / "index.new", OLD)
    folder(tmp_path / "index.damaged-1", b"older")
    assert f"the old one is {tmp_path}/index.new" in replacement.interrupted(tmp_path)
    assert f"the old index is {tmp_path}/index.damaged-2" in replacement.end_interrupted(tmp_path)
    assert contents(tmp_path) == {"index": NEW, "index.damaged-1": b"older", "index.damaged-2": OLD}


def test_an_old_index_that_is_a_file_is_kept_too(tmp_path: Path) -> None:
    (tmp_path / "index").write_bytes(b"no index")
    (replacement.begin(tmp_path) / "data.mdb").write_bytes(NEW)
    assert replacement.put_in_place(tmp_path) == tmp_path / "index.damaged-1"
    assert (tmp_path / "index.damaged-1").read_bytes() == b"no index"
    assert (tmp_path / "index" / "data.mdb").read_bytes() == NEW


@pytest.mark.parametrize("left", [["complete"], ["unfinished"], []])
def test_an_interrupted_removal_is_finished(tmp_path: Path, left: list[str]) -> None:
    """The step files of a new index are removed last."""
    folder(tmp_path / "index", OLD)
    (tmp_path / "index.new").mkdir()
    for name in left:
        (tmp_path / "index.new" / name).touch()
    assert "is undone" in replacement.end_interrupted(tmp_path)
    assert contents(tmp_path) == {"index": OLD}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_new_index_takes_the_old_ones_place_with_or_without_an_exchange_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(replacement, "_exchange", lambda one, other: False)
    folder(tmp_path / "index", OLD)
    (replacement.begin(tmp_path) / "data.mdb").write_bytes(NEW)
    assert replacement.put_in_place(tmp_path) == tmp_path / "index.damaged-1"
    assert contents(tmp_path) == {"index": NEW, "index.damaged-1": OLD}
