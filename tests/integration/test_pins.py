"""Pins of a real daemon: they survive SIGKILL, end by the clock, and keep their blocks until then."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvservice_api.errors import InvalidRequest, PinsFull
from kvservice_client import BlockChain, Client, Tier
from tests.daemon import MIB, DaemonProcess, until
from tests.integration import jumping_clock
from tests.integration.known_blocks import LARGE, SMALL, new_chain, save, verify

DAY_S = 86_400


def pressure(client: Client, count: int = 60) -> None:
    """More blocks than there is space for."""
    for _ in range(count):
        save(client, LARGE, new_chain(LARGE))


def pinned_until_s(client: Client, chain: BlockChain) -> int:
    """0 if the first block is not pinned."""
    block = client.admin.inspect(chain.keys[0]).shards[0]
    return block.pinned_until.seconds if block.HasField("pinned_until") else 0


@pytest.fixture
def daemon(new_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """Space for 20 large blocks in DRAM, and for 20 on SSD."""
    return new_daemon(dram__capacity_bytes=8 * MIB, ssd__capacity_bytes=8 * MIB)


@pytest.mark.parametrize("on_ssd", [False, True])
def test_pins_survive_sigkill_and_keep_their_blocks_through_pressure(
    new_daemon: Callable[..., DaemonProcess], on_ssd: bool
) -> None:
    daemon = new_daemon(dram__capacity_bytes=8 * MIB, ssd__capacity_bytes=8 * MIB if on_ssd else 0)
    with daemon.client() as client:
        pinned = new_chain(LARGE, 4)
        save(client, LARGE, pinned)
        answer = client.admin.pin(pinned, DAY_S)
        assert (answer.pinned, answer.missing) == (4, 0)
        daemon.kill()
        daemon.start()
        assert pinned_until_s(client, pinned) == answer.pinned_until.seconds
        pressure(client)
        verify(client, LARGE, pinned)
        assert client.admin.status().counters["evicted_ssd_blocks" if on_ssd else "evicted_dram_blocks"] > 20
        daemon.kill()
        assert daemon.check().returncode == 0


def test_an_unpinned_block_is_unpinned_after_sigkill_too(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        chain = new_chain(LARGE)
        save(client, LARGE, chain)
        client.admin.pin(chain, DAY_S)
        assert client.admin.unpin(chain).unpinned == 1
        daemon.kill()
        daemon.start()
        assert pinned_until_s(client, chain) == 0

        def leaves() -> bool:
            for tier in Tier:
                client.evict(chain, tier)
            return client.open_layout(LARGE).contains(chain) == 0

        until(leaves)  # At first the daemon may be busy with it.


def test_an_operators_discard_wins_over_a_pin(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        chain = new_chain(LARGE)
        save(client, LARGE, chain)
        client.admin.pin(chain, DAY_S)
        assert client.admin.discard(chain).discarded == 1
        assert client.open_layout(LARGE).contains(chain) == 0


def test_pins_past_their_share_are_refused_and_nothing_is_lost(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        chain = new_chain(LARGE, 15)
        assert save(client, LARGE, chain).is_complete
        with pytest.raises(PinsFull, match=r"pinned blocks would take \d+ bytes of the \w+ tier, and may take \d+"):
            client.admin.pin(chain, DAY_S)
        verify(client, LARGE, chain)
        assert pinned_until_s(client, chain) == 0
        assert client.admin.pin(chain.keys[:5], DAY_S).pinned == 5


@pytest.mark.parametrize("ttl_s", [0, 31 * DAY_S])
def test_a_pin_of_no_time_or_of_too_long_a_time_is_refused(daemon: DaemonProcess, ttl_s: float) -> None:
    with daemon.client() as client:
        chain = new_chain(SMALL)
        save(client, SMALL, chain)
        with pytest.raises(InvalidRequest, match=r"more than 0 s, and at most 2592000 s"):
            client.admin.pin(chain, ttl_s)
        assert pinned_until_s(client, chain) == 0


def test_a_wall_clock_that_jumps_ends_no_pin_of_a_running_daemon_and_all_past_ones_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "clock"
    monkeypatch.setenv(jumping_clock.FILE_VARIABLE, str(file))

    def set_clock(days: int) -> None:
        new = file.with_suffix(".new")
        new.write_text(str(days * DAY_S))
        new.replace(file)

    set_clock(0)
    with DaemonProcess(tmp_path, program=(str(jumping_clock.__file__),)) as daemon, daemon.client() as client:
        chain = new_chain(SMALL)
        save(client, SMALL, chain)
        client.admin.pin(chain, 10 * DAY_S)
        set_clock(20)
        until_s = pinned_until_s(client, chain)
        assert 9 * DAY_S < until_s - time.time() < 11 * DAY_S

        daemon.kill()
        set_clock(5)
        daemon.start()
        assert pinned_until_s(client, chain) == until_s
        daemon.kill()
        set_clock(11)
        daemon.start()
        assert pinned_until_s(client, chain) == 0, "its time has passed"
        daemon.kill()
        set_clock(-3650)
        daemon.start()
        assert pinned_until_s(client, chain) - time.time() < -3000 * DAY_S, (
            "30 days at most, by the wall clock at each start"
        )
