"""The daemon as a service of systemd: its messages, and its unit."""

from __future__ import annotations

import configparser
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from kvservice.config_sources import ENVIRONMENT_PREFIX, load_settings
from tests.daemon import DaemonProcess
from tests.dockerfile import ROOT
from tests.service_manager import NotifySocket, notify_socket

FOLDER = ROOT / "ops" / "systemd"
WATCHDOG_S = 0.6


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[NotifySocket]:
    with notify_socket(tmp_path) as made:
        yield made


@pytest.fixture
def daemon(tmp_path: Path, manager: NotifySocket) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path)
    process.launch(environment={"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))})
    try:
        yield process
    finally:
        process.remove()


def test_the_daemon_is_ready_once_it_answers_feeds_the_watchdog_and_says_when_it_stops(
    daemon: DaemonProcess, manager: NotifySocket
) -> None:
    assert manager.wait_for("READY").fields["READY"] == "1"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(daemon.socket_path))  # No second attempt: it must listen now.
    assert daemon.serves()
    with daemon.client() as client:
        assert client.admin.status().state == "serving"

    times_s = [manager.wait_for("WATCHDOG").at_s for _ in range(6)]
    assert median(later - earlier for earlier, later in pairwise(times_s)) < WATCHDOG_S / 2

    daemon.terminate()
    assert manager.wait_for("STOPPING").fields["STOPPING"] == "1"
    assert daemon.wait_for_end() == 0


def test_a_daemon_whose_event_loop_stands_still_feeds_no_watchdog(daemon: DaemonProcess, manager: NotifySocket) -> None:
    manager.wait_for("WATCHDOG")
    with daemon.stopped():
        assert manager.is_silent("WATCHDOG", WATCHDOG_S)
    manager.wait_for("WATCHDOG")


def test_a_daemon_that_cannot_start_is_never_ready(tmp_path: Path, manager: NotifySocket) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = DaemonProcess(tmp_path, port=taken.getsockname()[1])
        process.launch(environment={"NOTIFY_SOCKET": manager.name})
        try:
            assert process.wait_for_end() == 1
            assert manager.is_empty()
        finally:
            process.remove()


def unit() -> dict[str, list[str]]:
    """The values of the section [Service] by their names."""
    values: dict[str, list[str]] = {}
    for line in (FOLDER / "kvservice.service").read_text().partition("[Service]")[2].splitlines():
        name, is_assigned, value = line.partition("=")
        if is_assigned and not line.startswith("#"):
            values.setdefault(name, []).append(value)
    return values


def seconds(text: str) -> float:
    number = text.removesuffix("min")
    return float(number) * (60 if text.endswith("min") else 1)


def test_the_units_settings_exist_and_fit_its_folders_and_times() -> None:
    service = unit()
    lines = [line.removeprefix("#") for line in (FOLDER / "kvservice.env").read_text().splitlines()]
    example = dict(line.split("=", 1) for line in lines if line.startswith(ENVIRONMENT_PREFIX))
    given = dict(line.split("=", 1) for line in service["Environment"])

    for settings in (load_settings([], {**given, **example}), load_settings([], given)):
        assert settings.store.path == Path("/var/lib") / service["StateDirectory"][0]
        assert settings.unix_socket_path is not None
        assert settings.unix_socket_path.parent == Path("/run") / service["RuntimeDirectory"][0]
        server = settings.server
        assert server.drain_timeout_s + server.write_timeout_s < seconds(service["TimeoutStopSec"][0])


def test_the_example_of_settings_is_read_as_it_is() -> None:
    """systemd reads the file by rules of its own, so it has nothing but names, values and comments."""
    parser = configparser.RawConfigParser(delimiters="=", comment_prefixes="#")
    parser.read_string("[env]\n" + (FOLDER / "kvservice.env").read_text())

    assert all(name.upper().startswith(ENVIRONMENT_PREFIX) for name in parser["env"])


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / "kvservice.service"
    text = (FOLDER / "kvservice.service").read_text()
    copy.write_text(text.replace("/opt/kvservice/bin/kvservice", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_makes_the_daemons_user(tmp_path: Path) -> None:
    if shutil.which("systemd-sysusers") is None or os.geteuid() != 0:
        pytest.skip("systemd-sysusers is not installed, or this user may not write user databases")
    (tmp_path / "etc").mkdir()
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", FOLDER / "kvservice.sysusers.conf"], check=True)

    (line,) = (tmp_path / "etc/passwd").read_text().splitlines()
    name, _, number, _, _, home, _ = line.split(":")
    assert [name] == unit()["User"] == unit()["Group"]
    assert 0 < int(number) < 1000
    assert home == "/var/lib/kvservice"
