"""``kvctl export`` and ``kvctl import``: what they refuse, and what they print."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kvservice_client.cli import transfer
from kvservice_client.exports.export_file import DamagedFile, ExportReader, UnusableFile
from kvservice_client.exports.exporter import Exporter
from kvservice_client.retry import Clock
from tests.daemon import DaemonProcess
from tests.integration.test_export import exported, kvctl, talk


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is not a file of `kvctl export`. Name another file."),
        (b"another program's", "it is not a file of `kvctl export`. Name another file."),
        (b"KVEXPORT", "the record at byte 0 is damaged or cut off"),
    ],
)
def test_a_file_of_another_kind_is_refused_and_kept(kvctl_here: Any, tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)

    done = kvctl_here("import", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr
    if len(content) > 8:
        done = kvctl_here("export", str(file), "--everything", "--resume")
        assert done.returncode == 1
        assert "Name another file." in done.stderr
        assert file.read_bytes() == content


def test_wrong_usage_is_refused_before_a_file_is_made(kvctl_here: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "file")
    for arguments in (
        ("export", file),
        ("export", file, "chat", "--everything"),
        ("export", file, "--layout", "123456", "--everything"),
        ("export", file, "--chain", "123456", "--layout", "123456"),
        ("export", file, "--chain", "12"),
        ("export", "-", "chat", "--resume"),
        ("export", "-", "chat", "--json"),
        ("export", str(tmp_path / "no" / "file"), "--everything"),
        ("import", file),
        ("import", str(tmp_path)),
    ):
        assert kvctl_here(*arguments).returncode == 2, arguments
    for what, says in (
        (("no-such",), "there is no session 'no-such'. See which there are with `kvctl sessions`."),
        (("--layout", "ab" * 32), f"there is no layout {'ab' * 32}. See which there are with `kvctl layouts`."),
        (("--chain", "ab" * 32), "See what is stored with `kvctl ls`."),
    ):
        done = kvctl_here("export", file, *what)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("kvctl: ")
        assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_newer_file_is_refused(tmp_path: Path, daemon: DaemonProcess) -> None:
    from kvservice_api.image import checksum

    head = b"KVEXPORT" + (2).to_bytes(4, "little") + bytes(4)
    with pytest.raises(UnusableFile, match="version 2 of the format, and this kvctl knows 1"):
        ExportReader(io.BytesIO(head + checksum(head).to_bytes(8, "little")))
    with pytest.raises(DamagedFile):
        ExportReader(io.BytesIO(head + bytes(8)))
    assert os.listdir(tmp_path) == []


def test_an_interrupt_says_how_to_continue(daemon: DaemonProcess, tmp_path: Path) -> None:
    with daemon.client() as client:
        talk(client, "interrupted", 40)
    with mock.patch.object(Exporter, "session", side_effect=KeyboardInterrupt):
        done = kvctl("export", tmp_path / "file", "interrupted", "--address", daemon.address, code=130)
    assert done.stderr == "kvctl: interrupted. Continue with --resume.\n"
    assert exported(daemon, tmp_path / "file", "interrupted", "--resume")["sessions"] == 1


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    class Seconds(Clock):
        now = 0.0

        def now_s(self) -> float:
            return self.now

    clock = Seconds()
    with transfer.progress("exporting", 200, clock) as show:
        for done in range(0, 100, 10):
            clock.now += 3
            show(done, f"{done} blocks")
    lines = [f"kvctl: exporting: {share} %, {done} blocks" for share, done in ((15, 30), (35, 70))]
    assert capsys.readouterr().err.splitlines() == lines
