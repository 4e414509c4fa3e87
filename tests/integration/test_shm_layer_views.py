"""Views whose layers are used one by one, while the daemon promotes the next ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

from kvservice_api.errors import (
    Cancelled,
    DaemonUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    LeaseExpired,
    StorageFailed,
)
from kvservice_client import BlockChain, Client, Durability, View
from tests.daemon import NEVER_S, SOON_S, DaemonProcess, until
from tests.integration.known_blocks import LARGE, layers_of, new_chain, save
from tests.integration.test_faults_disk import Faults, faulty_daemon

_BLOCKS = 4


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    return Faults(tmp_path / "faults")


@pytest.fixture
def daemon(faults: Faults) -> Iterator[DaemonProcess]:
    process = faulty_daemon(faults.folder.parent)
    try:
        yield process.start(environment={"TEST_FAULTS": str(faults.folder)})
        faults.clear()
    finally:
        process.remove()


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client(transport="shm", timeout_s=NEVER_S) as client:
        yield client


@pytest.fixture
def chain(client: Client) -> BlockChain:
    """A chain that only SSD has."""
    chain = new_chain(LARGE, _BLOCKS)
    save(client, LARGE, chain, Durability.SSD)
    assert client.evict(chain, "dram").evicted == _BLOCKS
    return chain


def seen(view: View, layer: int) -> list[bytes]:
    return [part.tobytes() for (part,) in view.slices(layer)]


def leave(view: View) -> None:
    with view:
        pass


def expected(chain: BlockChain) -> list[list[bytes]]:
    return [[each.tobytes() for each in layer] for layer in layers_of(LARGE, chain)]


@pytest.mark.parametrize("verify", ["once", "always"])
def test_a_view_is_returned_before_its_blocks_are_promoted_and_waits_for_each_layer(
    client: Client, chain: BlockChain, faults: Faults, verify: Literal["once", "always"]
) -> None:
    faults.set("preadv", "HOLD")
    with (
        client.open_layout(LARGE).lookup(chain, lease_ttl_s=NEVER_S) as lease,
        lease.view(verify=verify, layer_timeout_s=NEVER_S) as view,
        ThreadPoolExecutor() as threads,
    ):
        first = threads.submit(seen, view, 0)
        assert not first.done(), "the disk has read nothing"
        faults.clear()
        assert [first.result(), seen(view, 1), seen(view, 2)] == expected(chain)


def test_a_layer_that_is_not_promoted_in_its_time_ends_the_view(
    client: Client, chain: BlockChain, faults: Faults
) -> None:
    faults.set("preadv", "HOLD")
    with client.open_layout(LARGE).lookup(chain, lease_ttl_s=NEVER_S) as lease:
        view = lease.view(layer_timeout_s=0.1)
        begin_s = time.monotonic()
        for _ in range(2):
            with pytest.raises(DeadlineExceeded, match="layer"):
                view.slices(0)
        assert time.monotonic() - begin_s < SOON_S
        faults.clear()


def test_a_view_of_which_nothing_arrives_ends_before_the_time_of_its_layer(
    client: Client, chain: BlockChain, faults: Faults
) -> None:
    faults.set("preadv", "HOLD")
    with client.open_layout(LARGE).lookup(chain, lease_ttl_s=NEVER_S) as lease:
        view = lease.view(layer_timeout_s=NEVER_S, idle_timeout_s=0.1)
        with pytest.raises(DeadlineExceeded, match=r"sent nothing of the layer for 0\.1 s"):
            view.slices(0)
        faults.clear()


def test_the_daemon_keeps_the_blocks_in_their_place_until_the_view_is_left(client: Client, chain: BlockChain) -> None:
    lease = client.open_layout(LARGE).lookup(chain, lease_ttl_s=NEVER_S)
    view = lease.view(layer_timeout_s=NEVER_S)
    assert [seen(view, layer) for layer in range(LARGE.layers)] == expected(chain)
    lease.release()
    until(lambda: client.evict(chain, "dram").held == _BLOCKS)  # Once the promotions have ended.
    with pytest.raises(LeaseExpired):
        leave(view)
    until(lambda: client.evict(chain, "dram").held == 0)


def test_a_view_that_was_dropped_keeps_nothing(client: Client, chain: BlockChain) -> None:
    lease = client.open_layout(LARGE).lookup(chain, lease_ttl_s=NEVER_S)
    lease.view(layer_timeout_s=NEVER_S).slices(LARGE.layers - 1)
    lease.release()
    until(lambda: client.evict(chain, "dram").held == 0)


def test_a_view_whose_disk_fails_raises_where_the_layer_is_requested(
    client: Client, chain: BlockChain, faults: Faults
) -> None:
    faults.set("preadv", "EIO")
    with client.open_layout(LARGE).lookup(chain) as lease:
        view = lease.view(layer_timeout_s=NEVER_S)
        with pytest.raises(StorageFailed):
            view.slices(0)


def test_a_view_whose_daemon_is_killed_ends(
    daemon: DaemonProcess, client: Client, chain: BlockChain, faults: Faults
) -> None:
    faults.set("preadv", "HOLD")
    view = client.open_layout(LARGE).lookup(chain).view(layer_timeout_s=NEVER_S)
    daemon.kill()
    with pytest.raises(DaemonUnavailable):
        view.slices(0)


def test_cancel_ends_a_view_that_waits_and_a_view_that_is_whole(
    daemon: DaemonProcess, client: Client, chain: BlockChain, faults: Faults
) -> None:
    blocks = client.open_layout(LARGE)
    with blocks.lookup(chain[:1], lease_ttl_s=NEVER_S) as lease:
        whole = lease.view()
        lease.cancel()
        for use in (whole.check, lambda: whole.slices(0), lease.view):
            with pytest.raises(Cancelled):
                use()
    faults.set("preadv", "HOLD")
    with blocks.lookup(chain, lease_ttl_s=NEVER_S) as lease, ThreadPoolExecutor() as threads:
        view = lease.view(layer_timeout_s=NEVER_S)
        with daemon.stopped():
            waiting = threads.submit(view.slices, 0)
            lease.cancel()
            with pytest.raises(Cancelled):
                waiting.result(SOON_S)
        faults.clear()


def test_blocks_are_located_within_a_time_of_their_own(
    client: Client, chain: BlockChain, daemon: DaemonProcess
) -> None:
    late = pytest.raises(DeadlineExceeded, match=r"0\.05 s")
    with client.open_layout(LARGE).lookup(chain, lease_ttl_s=NEVER_S) as lease, daemon.stopped(), late:
        lease.view(timeout_s=0.05, layer_timeout_s=NEVER_S)


def test_a_wrong_time_for_a_view_is_refused(client: Client, chain: BlockChain) -> None:
    with client.open_layout(LARGE).lookup(chain) as lease:
        with pytest.raises(InvalidRequest, match="timeout_s"):
            lease.view(timeout_s=-1, layer_timeout_s=1)
        with pytest.raises(InvalidRequest, match="layer_timeout_s"):
            lease.view(layer_timeout_s=-1)
        with pytest.raises(InvalidRequest, match="needs layer_timeout_s"):
            lease.view(idle_timeout_s=1)
