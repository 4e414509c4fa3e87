"""A client is stopped while it reads or writes in place, and continues after its lease or upload has ended.

It returns no wrong byte, and overwrites no other client's bytes. A stopped daemon keeps no space of a save for ever.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from kvservice_api.errors import DeadlineExceeded
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import Client, Durability
from kvservice_client.transports import shm
from kvservice_client.transports.shm import ShmTransport
from tests.daemon import MIB, DaemonProcess, until
from tests.integration import stopped_client
from tests.integration.known_blocks import LARGE, new_chain, save, tiers_of, verify

_BLOCKS = 16


class Stopped:
    """A client process in the middle of something, stopped by SIGSTOP."""

    def __init__(
        self, daemon: DaemonProcess, what: str, salt: str, *, blocks: int = _BLOCKS, ttl_s: float = 30
    ) -> None:
        arguments = [daemon.address, what, salt, str(blocks), str(ttl_s)]
        command = [sys.executable, "-m", stopped_client.__name__, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def stop(self) -> None:
        """Once it is in the middle."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "in the middle\n"
        self.process.send_signal(signal.SIGSTOP)

    def continue_(self) -> str:
        """How it ended."""
        self.process.send_signal(signal.SIGCONT)
        return self.process.communicate("\n", timeout=30)[0].strip()


@pytest.fixture
def stop() -> Iterator[Callable[..., Stopped]]:
    made: list[Stopped] = []

    def make(*arguments: object, **options: object) -> Stopped:
        made.append(Stopped(*arguments, **options))  # type: ignore[arg-type]
        made[-1].stop()
        return made[-1]

    yield make
    for each in made:
        each.process.kill()
        each.process.communicate()


@pytest.fixture
def daemon(new_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    return new_daemon(dram__capacity_bytes=16 * MIB, index__volatile_map_bytes=4 * MIB)


def fill(client: Client, chains: int = 12) -> None:
    """Fill all DRAM that can be evicted with other blocks: 12 MiB and more, in chains of 1.5 MiB."""
    for _ in range(chains):
        chain = new_chain(LARGE, 8)
        save(client, LARGE, chain)
        verify(client, LARGE, chain[: client.open_layout(LARGE).contains(chain)])


@pytest.mark.parametrize("what", ["view", "load"])
def test_a_reader_stopped_past_its_lease_detects_that_when_it_continues(
    daemon: DaemonProcess, stop: Callable[..., Stopped], what: str
) -> None:
    with daemon.client() as client:
        chain = new_chain(LARGE, _BLOCKS, what)
        save(client, LARGE, chain, Durability.SSD)
        reader = stop(daemon, what, what, ttl_s=2)
        until(lambda: client.admin.status().leases == 0)
        if what == "view":  # A load's blocks are held by its open call too.
            client.evict(chain, "dram")
            fill(client)
        assert reader.continue_() == "LeaseExpired"


def test_a_reader_that_continues_in_time_is_right(daemon: DaemonProcess, stop: Callable[..., Stopped]) -> None:
    with daemon.client() as client:
        for what in ("view", "load"):
            save(client, LARGE, new_chain(LARGE, _BLOCKS, what), Durability.SSD)
            reader = stop(daemon, what, what)
            fill(client)
            assert reader.continue_() == "right"


@pytest.mark.parametrize("what", ["view", "load"])
def test_a_reader_whose_blocks_left_with_the_daemon_detects_that_although_its_lease_would_still_be_valid(
    daemon: DaemonProcess, stop: Callable[..., Stopped], what: str
) -> None:
    """The client's clock cannot show it; only the generations do."""
    with daemon.client() as client:
        chain = new_chain(LARGE, _BLOCKS, what)
        save(client, LARGE, chain, Durability.SSD)
        reader = stop(daemon, what, what, ttl_s=300)
        daemon.kill()
        daemon.start()
        assert tiers_of(client, LARGE, chain) == ["dram+ssd"] * _BLOCKS
        client.evict(chain, "dram")
        fill(client)
        assert reader.continue_() == "LeaseExpired"


def test_a_reader_over_a_restart_that_kept_its_blocks_is_right(
    daemon: DaemonProcess, stop: Callable[..., Stopped]
) -> None:
    with daemon.client() as client:
        save(client, LARGE, new_chain(LARGE, _BLOCKS, "kept"), Durability.SSD)
        reader = stop(daemon, "view", "kept", ttl_s=300)
        daemon.kill()
        daemon.start()
        assert reader.continue_() == "right"


def test_space_that_a_stopped_writer_reserved_is_not_reused_however_long_it_is_stopped(
    daemon: DaemonProcess, stop: Callable[..., Stopped]
) -> None:
    with daemon.client() as client:
        writer = stop(daemon, "write", "written")
        before = new_chain(LARGE, 4)
        save(client, LARGE, before)
        fill(client)
        verify(client, LARGE, before)

        assert writer.continue_() == "right"

        verify(client, LARGE, new_chain(LARGE, _BLOCKS, "written"))
        verify(client, LARGE, before)


def test_a_stopped_writer_of_an_earlier_daemon_overwrites_nothing(
    daemon: DaemonProcess, stop: Callable[..., Stopped]
) -> None:
    """The new daemon knows of it by the file that it locked, and takes the space back when it is gone."""
    with daemon.client() as client:
        empty_bytes = client.admin.status().dram.used_bytes
        writer = stop(daemon, "write", "written")
        daemon.kill()
        daemon.start()
        reserved_bytes = client.admin.status().dram.used_bytes
        assert reserved_bytes > empty_bytes
        chains = [new_chain(LARGE, 8) for _ in range(12)]
        for chain in chains:
            assert save(client, LARGE, chain, Durability.SSD).is_complete

        assert writer.continue_() in ("UnknownClient", "DaemonUnavailable")

        for chain in chains:
            verify(client, LARGE, chain)
        assert client.open_layout(LARGE).contains(new_chain(LARGE, _BLOCKS, "written")) == 0
        client.admin.discard_all()
        until(lambda: client.admin.status().dram.used_bytes == 0)


def test_a_stopped_writer_that_is_killed_leaves_nothing_visible_and_its_space_comes_back(
    daemon: DaemonProcess, stop: Callable[..., Stopped]
) -> None:
    with daemon.client() as client:
        for _ in range(3):
            writer = stop(daemon, "write", "doomed")
            assert client.admin.status().dram.used_bytes > 0
            writer.process.kill()
            until(lambda: client.admin.status().dram.used_bytes == 0)
            until(lambda: client.admin.status().uploads == 0)
            assert client.open_layout(LARGE).contains(new_chain(LARGE, _BLOCKS, "doomed")) == 0
        assert not list((daemon.arena_folder / "writers").iterdir())
        save(client, LARGE, new_chain(LARGE, _BLOCKS, "doomed"))
        verify(client, LARGE, new_chain(LARGE, _BLOCKS, "doomed"))


def test_blocks_whose_save_ended_while_the_daemon_was_stopped_can_be_saved_when_it_continues(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon received no commit and, while it was stopped, no notice that the client had abandoned the save."""
    write = ShmTransport._write

    def write_and_stop(*arguments: object) -> object:
        daemon.process.send_signal(signal.SIGSTOP)
        return write(*arguments)  # type: ignore[arg-type]

    chain = new_chain(LARGE, 4)
    said: list[bool] = []
    is_said = shm._AbandonQueue._send_abandon

    def tried(self: shm._AbandonQueue, request: pb.AbandonBlocksRequest) -> bool:
        said.append(is_said(self, request))
        return said[-1]

    monkeypatch.setattr(shm._AbandonQueue, "_send_abandon", tried)
    with daemon.client(timeout_s=0.5) as client, daemon.client() as other:
        save(client, LARGE, new_chain(LARGE, 1))
        with monkeypatch.context() as patched:
            patched.setattr(ShmTransport, "_write", write_and_stop)
            with pytest.raises(DeadlineExceeded):
                save(client, LARGE, chain)
        until(lambda: False in said)
        daemon.process.send_signal(signal.SIGCONT)
        until(lambda: other.admin.status().uploads == 0)
        assert save(other, LARGE, chain).is_complete
        verify(client, LARGE, chain)
