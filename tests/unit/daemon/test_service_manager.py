"""Messages to a service manager, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvservice.service_manager import ServiceManager
from tests.clock import FakeClock, HandClock
from tests.service_manager import NotifySocket, notify_socket


@pytest.fixture
def manager_socket(tmp_path: Path) -> Iterator[NotifySocket]:
    with notify_socket(tmp_path) as made:
        yield made


@pytest.mark.parametrize("abstract", [False, True])
async def test_a_message_comes_as_one_datagram(tmp_path: Path, abstract: bool) -> None:
    with notify_socket(tmp_path, abstract=abstract) as there:
        await ServiceManager(FakeClock(), {"NOTIFY_SOCKET": there.name}).notify("READY=1", "STATUS=serving: 2=2")

        assert there.wait_for("READY").fields == {"READY": "1", "STATUS": "serving: 2=2"}
        assert there.is_empty()


async def test_without_a_service_manager_nothing_is_sent_and_nothing_is_watched() -> None:
    manager = ServiceManager(FakeClock(), {"WATCHDOG_USEC": "1000"})

    await manager.notify("READY=1")
    await manager.keep_watchdog()


async def test_the_watchdog_gets_three_messages_per_interval(manager_socket: NotifySocket) -> None:
    clock = HandClock()
    manager = ServiceManager(clock, {"NOTIFY_SOCKET": manager_socket.name, "WATCHDOG_USEC": "30000000"})
    assert manager.watchdog_s == 30

    watching = asyncio.create_task(manager.keep_watchdog())
    await _idle()
    for _ in range(3):
        assert manager_socket.wait_for("WATCHDOG").fields == {"WATCHDOG": "1"}
        clock.advance(seconds=9.9)
        await _idle()
        assert manager_socket.is_empty()
        clock.advance(seconds=0.1)
        await _idle()
    watching.cancel()


@pytest.mark.parametrize("variables", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_PID": "1"}])
async def test_no_watchdog_is_kept_that_is_not_for_this_process(
    manager_socket: NotifySocket, variables: dict[str, str]
) -> None:
    given = {"NOTIFY_SOCKET": manager_socket.name, "WATCHDOG_PID": str(os.getpid()), **variables}
    if "WATCHDOG_PID" in variables:
        given["WATCHDOG_USEC"] = "1000000"

    await ServiceManager(FakeClock(), given).keep_watchdog()

    assert manager_socket.is_empty()


async def test_a_socket_that_is_gone_is_logged_and_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await ServiceManager(FakeClock(), {"NOTIFY_SOCKET": str(tmp_path / "gone")}).notify("READY=1")

    assert caplog.messages == ["the service manager does not get READY=1: No such file or directory"]


async def test_a_service_manager_that_reads_nothing_holds_up_nothing(
    manager_socket: NotifySocket, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
        filler.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # The queue is full then.
            while filler.sendto(b"X=1", manager_socket.name):
                pass
    clock = HandClock()
    sending = asyncio.create_task(ServiceManager(clock, {"NOTIFY_SOCKET": manager_socket.name}).notify("STOPPING=1"))
    await _idle()
    assert not sending.done()

    clock.advance(seconds=1)
    await sending

    assert caplog.messages == ["the service manager does not get STOPPING=1: it reads nothing"]


async def _idle() -> None:
    """Until the tasks of the loop wait for time or for a socket."""
    for _ in range(10):
        await asyncio.sleep(0)
