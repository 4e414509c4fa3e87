"""Daemons for tests that talk to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import DaemonProcess


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all tests of a file."""
    process = DaemonProcess(tmp_path_factory.mktemp("daemon")).start()
    yield process
    process.remove()


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
