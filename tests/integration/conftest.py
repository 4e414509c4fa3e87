"""Daemons for tests that talk to one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvservice_client.cli import main
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import SMALL
from tests.integration.wire import Wire


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all tests of a file."""
    process = DaemonProcess(tmp_path_factory.mktemp("daemon")).start()
    yield process
    process.remove()


@pytest.fixture
def wire(daemon: DaemonProcess, request: pytest.FixtureRequest) -> Iterator[Wire]:
    """A client of the file's daemon, without the library. In a file with a `SERVICE` each test calls the RPC in its
    name.
    """
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        wire.called.clear()
        yield wire
    if service := getattr(request.module, "SERVICE", None):
        method = request.function.__name__.split("_")[1]
        assert f"/kvservice_api.v1.{service}/{method}" in wire.called, "the test does not call what it is named after"


@pytest.fixture
def new_daemon(tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Starts a daemon of the test's own, with the settings given."""
    made: list[DaemonProcess] = []

    def start(**settings: Any) -> DaemonProcess:
        folder = tmp_path / f"daemon-{len(made)}"
        folder.mkdir()
        made.append(DaemonProcess(folder, **settings))
        return made[-1].start()

    yield start
    for process in made:
        process.remove()


@pytest.fixture
def kvctl_here(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a verb in this process: it prints and ends as in a process of its own, and starts faster."""
    monkeypatch.setenv("KVCTL_ADDRESS", daemon.address)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # Otherwise the usage message would name pytest.

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["kvctl", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(arguments, ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def ask(kvctl_here: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., Any]:
    """Runs a verb with ``--json`` in this process; the document it prints."""

    def run(*arguments: str, code: int = 0) -> Any:
        done = kvctl_here(*arguments, "--json")
        assert (done.returncode, done.stderr) == (code, "")
        return json.loads(done.stdout)

    return run
