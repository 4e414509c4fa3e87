"""The next load that copies finds one flipped bit at any place: the block is quarantined, counted, and a miss.

Bits are flipped from outside, in the files of a running daemon.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvservice_api.errors import ChecksumMismatch
from kvservice_api.v1 import admin_pb2
from kvservice_client import BlockChain, Client, Durability, Layout, Lease, Tier
from kvservice_client.transports import shm
from kvservice_client.transports.in_place import InPlace
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, compare, new_chain, save, tiers_of, verify
from tests.integration.media import Flip, arena, flip_bit_of, flip_data, flip_trailer, ssd_file

_PLACES = 12  # Blocks damaged in each test, each at another random place.


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """With `lru`, which reads nothing ahead: the load finds the damage."""
    with DaemonProcess(
        tmp_path_factory.mktemp("damage"),
        dram__capacity_bytes=24 * MIB,
        ssd__capacity_bytes=64 * MIB,
        mover__policy="lru",
    ) as process:
        yield process


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    """A client of an empty store."""
    with daemon.client() as made:
        made.admin.discard_all()
        yield made


def quarantined(client: Client) -> int:
    return int(client.admin.status().counters["quarantined_blocks"])


def expect_quarantine(daemon: DaemonProcess, client: Client, layout: Layout, chain: BlockChain) -> None:
    """The load fails; then the block is a miss, and can be stored again."""
    before = quarantined(client)
    with client.open_layout(layout).lookup(chain) as lease:
        assert lease.hit_blocks == 1
        with pytest.raises(ChecksumMismatch):
            compare(lease, layout, chain)
    assert quarantined(client) == before + 1
    (key,) = chain.keys
    events = client.admin.explain_block(key).events
    assert [event for event in events if event.kind == admin_pb2.EVENT_KIND_QUARANTINED]
    assert client.open_layout(layout).contains(chain) == 0
    assert save(client, layout, chain).stored == 1
    verify(client, layout, chain)


def test_the_log_names_the_damaged_block_and_what_of_it_is_damaged(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, ssd__capacity_bytes=64 * MIB) as daemon, daemon.client() as client:
        for flip, what in ((flip_data, "layer"), (flip_trailer, "the trailer")):
            for tier in (Tier.DRAM, Tier.SSD):
                chain = new_chain(LARGE)
                save(client, LARGE, chain, Durability.SSD)
                if tier is Tier.SSD:
                    client.evict(chain, Tier.DRAM)
                flip((arena if tier is Tier.DRAM else ssd_file)(daemon), LARGE, chain.keys[0], random.Random(3))
                with client.open_layout(LARGE).lookup(chain) as lease, pytest.raises(ChecksumMismatch):
                    compare(lease, LARGE, chain)
                event = "a damaged block was quarantined"
                line = daemon.wait_for_log(event, key=chain.keys[0].hex(), tier=str(tier))
                assert str(line["damaged"]).startswith(what)


@pytest.mark.parametrize("layout", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("flip", [flip_data, flip_trailer])
def test_a_flipped_bit_on_ssd_is_caught_on_the_way_up(
    daemon: DaemonProcess, client: Client, layout: Layout, flip: Flip
) -> None:
    chooser = random.Random(1)
    chains = [new_chain(layout) for _ in range(_PLACES)]
    for chain in chains:
        assert save(client, layout, chain, Durability.SSD).is_complete
        client.evict(chain, Tier.DRAM)
    for chain in chains[1:]:
        flip(ssd_file(daemon), layout, chain.keys[0], chooser)
    for chain in chains[1:]:
        assert tiers_of(client, layout, chain) == ["ssd"]
        expect_quarantine(daemon, client, layout, chain)
    verify(client, layout, chains[0])


@pytest.mark.parametrize(("layout", "flip"), [(LARGE, flip_data), (SMALL, flip_trailer)], ids=["large", "small"])
def test_a_flipped_bit_on_ssd_is_caught_where_dram_has_no_room(
    daemon: DaemonProcess, client: Client, layout: Layout, flip: Flip
) -> None:
    chooser = random.Random(2)
    chains = [new_chain(layout) for _ in range(_PLACES)]
    for chain in chains:
        assert save(client, layout, chain, Durability.SSD).is_complete
        client.evict(chain, Tier.DRAM)
    with DramFilled(client):
        verify(client, layout, chains[0])
        assert client.admin.status().counters["read_through_bytes"] > 0
        for chain in chains[1:]:
            flip(ssd_file(daemon), layout, chain.keys[0], chooser)
            before = quarantined(client)
            with client.open_layout(layout).lookup(chain) as lease, pytest.raises(ChecksumMismatch):
                compare(lease, layout, chain)
            assert quarantined(client) == before + 1
            assert client.open_layout(layout).contains(chain) == 0


@pytest.mark.parametrize("on_ssd", [False, True], ids=["only there", "on SSD too"])
@pytest.mark.parametrize("layout", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("flip", [flip_data, flip_trailer])
def test_a_flipped_bit_in_the_arena_is_caught_by_the_next_load(
    daemon: DaemonProcess, client: Client, layout: Layout, flip: Flip, on_ssd: bool
) -> None:
    chooser = random.Random(3)
    chains = [new_chain(layout) for _ in range(_PLACES)]
    for chain in chains:
        assert save(client, layout, chain, Durability.SSD).is_complete
        if not on_ssd:
            client.evict(chain, Tier.SSD)
    for chain in chains[1:]:
        flip(arena(daemon), layout, chain.keys[0], chooser)
    for chain in chains[1:]:
        assert tiers_of(client, layout, chain) == ["dram+ssd" if on_ssd else "dram"]
        expect_quarantine(daemon, client, layout, chain)
    verify(client, layout, chains[0])


def test_damage_that_is_found_during_a_load_in_place_is_its_error_also_if_the_block_has_left_before(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_copy = shm._start_copy

    def start_copy_late(blocks: InPlace, *arguments: Any) -> Any:
        """The daemon has found the damage of a later layer, and has released the space of the block."""
        until(lambda: blocks.are_replaced)
        return start_copy(blocks, *arguments)

    with daemon.client(transport="shm") as client:
        chain = new_chain(LARGE)
        assert save(client, LARGE, chain, Durability.SSD).is_complete
        client.evict(chain, Tier.DRAM)
        flip_bit_of(ssd_file(daemon), LARGE, chain.keys[0], LARGE.layers - 1)
        monkeypatch.setattr(shm, "_start_copy", start_copy_late)
        with client.open_layout(LARGE).lookup(chain) as lease, pytest.raises(ChecksumMismatch) as caught:
            compare(lease, LARGE, chain)
        assert caught.value.details["block"] == "0"


def test_one_damaged_block_of_a_chain_ends_the_prefix_there_and_costs_no_other_block(
    daemon: DaemonProcess, client: Client
) -> None:
    chain = new_chain(LARGE, 6)
    assert save(client, LARGE, chain, Durability.SSD).is_complete
    client.evict(chain, Tier.DRAM)
    flip_data(ssd_file(daemon), LARGE, chain.keys[3], random.Random(4))
    with client.open_layout(LARGE).lookup(chain) as lease, pytest.raises(ChecksumMismatch):
        compare(lease, LARGE, chain)
    assert client.open_layout(LARGE).contains(chain) == 3
    for position in (0, 1, 2, 4, 5):
        verify(client, LARGE, chain[position : position + 1])


def test_a_prefetch_brings_no_damaged_block_up(daemon: DaemonProcess, client: Client) -> None:
    chain = new_chain(LARGE, 4)
    assert save(client, LARGE, chain, Durability.SSD).is_complete
    client.evict(chain, Tier.DRAM)
    flip_data(ssd_file(daemon), LARGE, chain.keys[1], random.Random(5))
    before = quarantined(client)
    result = client.prefetch(chain, wait=True)
    assert (result.promoted, result.failed) == (3, 1)
    assert quarantined(client) == before + 1
    assert client.open_layout(LARGE).contains(chain) == 1


def test_a_scrub_finds_every_damaged_copy(daemon: DaemonProcess, client: Client) -> None:
    chooser = random.Random(6)
    chains = [new_chain(layout) for layout in (LARGE, SMALL) * 4]
    for chain, layout in zip(chains, (LARGE, SMALL) * 4, strict=True):
        assert save(client, layout, chain, Durability.SSD).is_complete
    for number, (chain, layout) in enumerate(zip(chains, (LARGE, SMALL) * 4, strict=True)):
        if number < 6:
            flip = (flip_data, flip_trailer)[number % 4 // 2]
            flip((arena, ssd_file)[number // 3](daemon), layout, chain.keys[0], chooser)
    before = quarantined(client)
    *_, last = client.admin.scrub()
    assert (last.damaged, last.done) == (6, True)
    assert quarantined(client) == before + 6
    assert client.admin.status().blocks == 2


@pytest.mark.parametrize("tier", list(Tier))
def test_a_bit_that_flipped_while_no_daemon_ran_is_caught_all_the_same(
    daemon: DaemonProcess, client: Client, tier: Tier
) -> None:
    chooser = random.Random(7)
    chains = [new_chain(LARGE) for _ in range(4)]
    for chain in chains:
        assert save(client, LARGE, chain, Durability.SSD).is_complete
        client.evict(chain, Tier.SSD if tier is Tier.DRAM else Tier.DRAM)
    daemon.kill()
    medium = arena(daemon) if tier is Tier.DRAM else ssd_file(daemon)
    for flip, chain in zip((flip_data, flip_trailer), chains[1:3], strict=True):
        flip(medium, LARGE, chain.keys[0], chooser)
    checked = daemon.check()
    assert checked.returncode == 1
    assert all(chain.keys[0].hex() in checked.stdout for chain in chains[1:3])
    assert not any(chain.keys[0].hex() in checked.stdout for chain in (chains[0], chains[3]))
    daemon.start()
    for chain in chains[1:3]:
        with client.open_layout(LARGE).lookup(chain) as lease:
            if lease.hit_blocks:  # Unless the write-behind found the damage first.
                with pytest.raises(ChecksumMismatch):
                    compare(lease, LARGE, chain)
        assert client.open_layout(LARGE).contains(chain) == 0
    assert quarantined(client) == 2
    verify(client, LARGE, chains[0])
    verify(client, LARGE, chains[3])


class DramFilled:
    """Leases on all blocks in DRAM, so that nothing is promoted from SSD."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._leases: list[object] = []

    def __enter__(self) -> None:
        for layout in (LARGE, SMALL):
            while True:
                chain = new_chain(layout)
                if not save(self._client, layout, chain).is_complete:
                    break
                lease = self._client.open_layout(layout).lookup(chain, lease_ttl_s=60.0)
                assert lease.hit_blocks == 1
                self._leases.append(lease)

    def __exit__(self, *exc: object) -> None:
        for lease in self._leases:
            lease.release()  # type: ignore[attr-defined]


def read_view(lease: Lease) -> None:
    with lease.view(verify="always") as view:
        for layer in range(LARGE.layers):
            view.slices(layer)


def test_bytes_in_place_that_were_damaged_are_counted_as_mismatches_and_not_as_fallbacks(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, ssd__capacity_bytes=0) as daemon, daemon.client(transport="shm") as client:
        blocks = client.open_layout(LARGE)
        reads: list[Callable[[Lease], object]] = [lambda lease: list(lease.load()), read_view]
        for count, read in enumerate(reads, start=1):
            chain = new_chain(LARGE, 1)
            save(client, LARGE, chain)
            flip_data(arena(daemon), LARGE, chain.keys[0], random.Random(count))
            with blocks.lookup(chain) as lease, pytest.raises(ChecksumMismatch):
                read(lease)
            counted = client.stats().transports["shm"]
            assert (counted.mismatches, counted.fallbacks, client.stats().shm_refused_because) == (count, 0, "")
