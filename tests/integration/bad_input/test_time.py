"""Deadlines that pass, and a wall clock that jumps: calls end in time, and leases and blocks do not change."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import grpc
import pytest

from kvservice.clock import SystemClock
from kvservice_api.keys import BlockChain
from kvservice_api.v1 import admin_pb2, blocks_pb2, types_pb2
from tests.daemon import MIB, DaemonProcess, until
from tests.integration import jumping_clock
from tests.integration.known_blocks import LARGE, SMALL, new_chain
from tests.integration.wire import Feed, Upload, Wire, unharmed

YEAR_S = 365 * 86400


def passes_its_deadline(call: Callable[[], object]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


# Deadlines


def test_a_call_whose_deadline_has_passed_has_no_effect(wire: Wire, kept: BlockChain) -> None:
    keys, passed = kept.packed_keys, -1.0
    request = blocks_pb2.EvictRequest(keys=keys, tier=types_pb2.TIER_DRAM)
    passes_its_deadline(lambda: wire.blocks.Evict(request, timeout=passed))
    passes_its_deadline(lambda: wire.admin.Discard(admin_pb2.DiscardRequest(keys=keys), timeout=passed))
    passes_its_deadline(lambda: wire.save(Upload.of(wire, SMALL, new_chain(SMALL)).messages(), timeout_s=passed))


def test_a_load_whose_client_does_not_read_releases_its_blocks_at_its_deadline(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    with Wire(new_daemon(ssd__capacity_bytes=0).address) as wire:
        wire.attach()
        wire.open_layout(LARGE)
        chain = new_chain(LARGE, 64)  # 12 MiB: more than the connection buffers.
        until(lambda: wire.status().dram.capacity_bytes > 48 * MIB)
        assert wire.save(Upload.of(wire, LARGE, chain).messages()).stored == 64
        lease_id = wire.lookup(LARGE, chain).lease_id
        evict = blocks_pb2.EvictRequest(keys=chain.packed_keys, tier=types_pb2.TIER_DRAM)

        request = blocks_pb2.LoadBlocksRequest(client_id=wire.client_id, lease_id=lease_id)
        load = wire.blocks.LoadBlocks(request, timeout=3)
        next(load)
        wire.release(lease_id)
        assert wire.blocks.Evict(evict).held == 64
        until(lambda: not load.is_active())
        passes_its_deadline(lambda: list(load))
        until(lambda: wire.blocks.Evict(evict).held == 0)
        assert wire.state()["DRAM bytes"] == 0


def test_a_save_that_waits_for_another_one_ends_at_its_deadline(wire: Wire, daemon: DaemonProcess) -> None:
    chain = new_chain(SMALL)
    upload = Upload.of(wire, SMALL, chain)
    feed = Feed(*upload.messages()[:2])
    first = wire.begin_save(feed)
    until(lambda: wire.status().uploads == 1)
    passes_its_deadline(lambda: wire.save(upload.messages(), timeout_s=0.2))
    assert wire.status().uploads == 1
    first.cancel()
    until(lambda: wire.status().uploads == 0)


# The wall clock


def test_the_clock_does_not_follow_a_wall_clock_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SystemClock()
    wall_ms, monotonic_s = clock.wall_ms(), clock.monotonic_s()
    real_time_ns = time.time_ns
    for years in (10, -10):
        monkeypatch.setattr(time, "time_ns", lambda years=years: real_time_ns() + years * YEAR_S * 10**9)
        assert 0 <= clock.wall_ms() - wall_ms < 60_000
        assert 0 <= clock.monotonic_s() - monotonic_s < 60
    assert clock.wall_ms() <= clock.wall_ms()


@pytest.fixture
def set_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], object]:
    """Sets the wall clock of daemons in a `jumping_clock` program, in years from now."""
    file = tmp_path / "clock"
    monkeypatch.setenv(jumping_clock.FILE_VARIABLE, str(file))

    def set_to(years: int) -> None:
        new = file.with_suffix(".new")
        new.write_text(str(years * YEAR_S))
        new.replace(file)  # At once: the daemon reads it all the time.

    set_to(0)
    return set_to


def jumping_daemon(folder: Path) -> DaemonProcess:
    return DaemonProcess(folder, program=(str(jumping_clock.__file__),))


def test_a_wall_clock_that_jumps_ends_no_lease_and_prolongs_none(
    tmp_path: Path, set_clock: Callable[[int], object]
) -> None:
    with jumping_daemon(tmp_path) as daemon:
        with unharmed(daemon.address) as kept, Wire(daemon.address) as wire:
            wire.attach()
            started_s = wire.status().started_at.seconds
            for years in (10, -10):
                lasting = wire.lookup(SMALL, kept, ttl_ms=300_000).lease_id
                short = wire.lookup(SMALL, kept, ttl_ms=200).lease_id
                set_clock(years)

                until(lambda: wire.status().leases == 1)
                assert len(wire.load(lasting)) == SMALL.layers
                assert wire.renew(lasting, ttl_ms=1000).ttl_ms == 1000
                used_s = wire.admin.Inspect(admin_pb2.InspectRequest(key=kept.keys[0])).shards[0].used_at.seconds
                assert started_s <= used_s < started_s + 600
                wire.release(lasting)
                wire.release(short)
        assert daemon.stop() == 0
        log_years = {datetime.fromisoformat(line["time"]).year for line in daemon.log}
        assert max(log_years) - min(log_years) >= 9, "the daemon did not see the clock jump"


def test_a_restart_with_a_clock_set_back_keeps_everything(tmp_path: Path, set_clock: Callable[[int], object]) -> None:
    set_clock(10)
    first, second = new_chain(SMALL, 2), new_chain(SMALL, 2)
    with jumping_daemon(tmp_path) as daemon:
        with Wire(daemon.address) as wire:
            wire.attach()
            wire.open_layout(SMALL)
            assert wire.save(Upload.of(wire, SMALL, first, types_pb2.DURABILITY_SSD).messages()).stored == 2
        daemon.stop()
        set_clock(0)
        daemon.start()
        with Wire(daemon.address) as wire:
            wire.attach()
            assert wire.save(Upload.of(wire, SMALL, second).messages()).stored == 2
            assert wire.has(SMALL, first)
            assert wire.has(SMALL, second)
            stored_s = [
                wire.admin.Inspect(admin_pb2.InspectRequest(key=chain.keys[0])).shards[0].stored_at.seconds
                for chain in (first, second)
            ]
            assert stored_s[0] > stored_s[1] + 9 * YEAR_S, "the first ones are from the future"
