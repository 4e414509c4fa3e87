"""``kvctl trace record``: what happens to the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvservice_api.errors import DaemonUnavailable
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_client.cli import trace as cli

STEP = pb.RecordTraceResponse(
    layout=pb.RecordedLayout(block_tokens=16, kv_bytes_per_token=100),
    turns=[pb.RecordedTurn(prompt_tokens=20, answer_tokens=5, hash_ids=[7])],
    done=True,
)


def record(monkeypatch: pytest.MonkeyPatch, file: Path, steps: list[pb.RecordTraceResponse]) -> None:
    """Without steps there is no daemon."""

    @contextmanager
    def connect(address: str, timeout: float) -> Iterator[Any]:
        if not steps:
            raise DaemonUnavailable("no daemon")
        yield SimpleNamespace(admin=SimpleNamespace(record_trace=lambda fingerprint, duration_s: iter(steps)))

    monkeypatch.setattr(cli, "connect", connect)
    cli.trace("record", file)


def test_a_recording_replaces_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "turns.jsonl"
    record(monkeypatch, file, [STEP])
    once = file.read_text()
    assert len(once.splitlines()) == 2
    record(monkeypatch, file, [STEP])
    assert file.read_text() == once


def test_a_recording_that_does_not_begin_leaves_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "turns.jsonl"
    file.write_text("an earlier recording")
    with pytest.raises(DaemonUnavailable):
        record(monkeypatch, file, [])
    assert file.read_text() == "an earlier recording"
