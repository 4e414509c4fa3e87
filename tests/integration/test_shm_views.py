"""Views: blocks in place, without a copy, and never a doubtful byte."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvservice_api.errors import ChecksumMismatch, InvalidRequest, LeaseExpired, NotShared
from kvservice_client import Client, Durability, Layout, Shard, View
from tests.clock import ClientClock
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import LARGE, SMALL, layers_of, new_chain, save
from tests.integration.media import Flip, arena, flip_bit_of, flip_data, flip_trailer


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client(transport="shm") as client:
        yield client


def seen(view: View, layers: int) -> list[list[bytes]]:
    return [[b"".join(part.tobytes() for part in parts) for parts in view.slices(layer)] for layer in range(layers)]


@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["small slices", "large slices"])
def test_a_view_shows_every_byte_where_the_daemon_has_it(client: Client, layout: Layout) -> None:
    chain = new_chain(layout, 5)
    save(client, layout, chain, Durability.SSD)
    client.evict(chain.keys[2:4], "dram")
    with client.open_layout(layout).lookup(chain) as lease, lease.view(first_block=1, block_count=3) as view:
        expected = layers_of(layout, chain[1:4])
        assert seen(view, layout.layers) == [[each.tobytes() for each in layer] for layer in expected]
        for (part,) in view.slices(0):
            assert not part.flags.owndata
            assert not part.flags.writeable
    assert client.stats().viewed_bytes == sum(each.size for layer in expected for each in layer)


@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["small slices", "large slices"])
def test_a_view_shows_whole_blocks_with_one_array_each(client: Client, layout: Layout) -> None:
    chain = new_chain(layout, 3)
    save(client, layout, chain)
    with client.open_layout(layout).lookup(chain) as lease, lease.view(first_block=1) as view:
        expected = np.stack([np.stack(layer) for layer in layers_of(layout, chain[1:])], axis=1)
        blocks = view.blocks()
        assert [block.tobytes() for block in blocks] == [block.tobytes() for block in expected]
        assert {block.shape for block in blocks} == {expected.shape[1:]}
        assert not any(block.flags.owndata or block.flags.writeable for block in blocks)
    with pytest.raises(LeaseExpired):
        view.blocks()


def test_whole_blocks_of_a_view_that_always_verifies_are_verified(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(ssd__capacity_bytes=0)
    with daemon.client(transport="shm") as client:
        chain = new_chain(LARGE, 3)
        save(client, LARGE, chain)
        with client.open_layout(LARGE).lookup(chain) as lease:
            flip_bit_of(arena(daemon), LARGE, chain.keys[1], LARGE.layers - 1)
            view = lease.view(verify="always")
            with pytest.raises(ChecksumMismatch, match=f"layer {LARGE.layers - 1}"):
                view.blocks()


def test_blocks_that_are_not_of_one_shape_are_refused_as_whole_blocks(client: Client) -> None:
    chain = new_chain(SMALL, 2)
    save(client, SMALL, chain)
    rank = client.open_layout(SMALL, Shard(1, 3, 1, 3))
    with rank.lookup(chain) as lease, lease.view(verify="always") as view:
        with pytest.raises(InvalidRequest, match="use `slices`"):
            view.blocks()
        assert not view._verified_layers, "they are refused before any byte is read"


def test_a_rank_sees_its_heads_of_whole_blocks_as_keys_and_values(client: Client) -> None:
    chain = new_chain(SMALL, 2)
    save(client, SMALL, chain)
    whole, rank = client.open_layout(SMALL), client.open_layout(SMALL, Shard(1, 3, 1, 3))
    with rank.lookup(chain) as lease, lease.view() as view:
        for layer, expected in enumerate(layers_of(SMALL, chain)[1:3]):
            arrays = whole.layer_arrays(np.concatenate(expected), [SMALL.block_tokens] * 2)
            for (keys, values), (all_keys, all_values) in zip(view.slices(layer), arrays, strict=True):
                assert keys.tobytes() == all_keys[1:3].tobytes()
                assert values.tobytes() == all_values[1:3].tobytes()


def test_a_view_shows_nothing_once_it_or_its_lease_is_over(client: Client) -> None:
    chain = new_chain(SMALL, 2)
    save(client, SMALL, chain)
    lease = client.open_layout(SMALL).lookup(chain)
    with lease.view() as left, pytest.raises(InvalidRequest, match="layer 5"):
        left.slices(SMALL.layers)
    with pytest.raises(LeaseExpired, match="the view is closed"):
        left.slices(0)
    with pytest.raises(LeaseExpired), lease.view() as view:  # Leaving the view checks it too.
        lease.release()
    with pytest.raises(LeaseExpired):
        view.check()
    with pytest.raises(LeaseExpired):
        lease.view()


def test_a_view_lasts_as_long_as_its_lease_less_a_fifth(daemon: DaemonProcess) -> None:
    chain, clock = new_chain(SMALL, 2), ClientClock()
    with daemon.client(transport="shm", clock=clock) as client:
        save(client, SMALL, chain)
        with client.open_layout(SMALL).lookup(chain, lease_ttl_s=300) as lease:
            view = lease.view()
            clock.advance(seconds=239)
            view.check()
            clock.advance(seconds=2)
            with pytest.raises(LeaseExpired, match="about to end"):
                view.check()
            lease.renew(300)
            view.check()


def test_damage_since_before_the_daemons_start_is_found_before_anything_is_shown(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(ssd__capacity_bytes=0)
    with daemon.client(transport="shm") as client:
        chain = new_chain(LARGE, 3)
        save(client, LARGE, chain)
        daemon.kill()
        flip_data(arena(daemon), LARGE, chain.keys[1], random.Random(5))
        daemon.start()
        blocks = client.open_layout(LARGE)
        with blocks.lookup(chain) as lease, pytest.raises(ChecksumMismatch):
            lease.view()
        with blocks.lookup(chain) as lease, lease.view() as view:
            assert view.block_count == 1
            assert seen(view, LARGE.layers) == [[layer[0].tobytes()] for layer in layers_of(LARGE, chain)]


@pytest.mark.parametrize("flip", [flip_data, flip_trailer], ids=["data", "trailer"])
def test_a_view_that_always_verifies_finds_damage_since_the_last_look_and_has_the_block_dropped(
    new_daemon: Callable[..., DaemonProcess], flip: Flip
) -> None:
    daemon = new_daemon(ssd__capacity_bytes=0)
    with daemon.client(transport="shm") as client:
        for layout, chooser in ((SMALL, random.Random(11)), (LARGE, random.Random(12))):
            blocks, chain = client.open_layout(layout), new_chain(layout, 4)
            save(client, layout, chain)
            expected = [[each.tobytes() for each in layer] for layer in layers_of(layout, chain)]
            with blocks.lookup(chain) as lease, lease.view() as view:
                assert seen(view, layout.layers) == expected
            flip(arena(daemon), layout, chain.keys[2], chooser)
            with blocks.lookup(chain) as lease:
                # Slices that are not damaged can be read.
                with lease.view(block_count=2, verify="always") as view:
                    assert seen(view, layout.layers) == [layer[:2] for layer in expected]
                view = lease.view(1, verify="always")
                with pytest.raises(ChecksumMismatch):
                    seen(view, layout.layers)
            with blocks.lookup(chain) as lease:
                assert lease.hit_blocks == 2


def test_a_view_that_always_verifies_shows_nothing_that_was_damaged_while_it_was_open(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(ssd__capacity_bytes=0)
    with daemon.client(transport="shm") as client:
        blocks, chain = client.open_layout(LARGE), new_chain(LARGE, 2)
        save(client, LARGE, chain)
        with blocks.lookup(chain) as lease, lease.view(verify="always") as view:
            assert seen(view, 1) == [[each.tobytes() for each in layers_of(LARGE, chain)[0]]]
            for layer in range(1, LARGE.layers):
                flip_bit_of(arena(daemon), LARGE, chain.keys[1], layer)
                with pytest.raises(ChecksumMismatch):
                    view.slices(layer)


def test_a_view_that_always_verifies_shows_a_rank_its_heads_of_whole_blocks(client: Client) -> None:
    chain, shard = new_chain(SMALL, 2), Shard(1, 3, 1, 3)
    save(client, SMALL, chain)
    rank = client.open_layout(SMALL, shard)
    with rank.lookup(chain) as lease, lease.view(verify="always") as always, lease.view() as once:
        assert seen(always, 2) == seen(once, 2) == seen(always, 2)


@pytest.mark.parametrize("word", ["", "Always", "never", "twice", None, True])
def test_a_view_that_verifies_in_an_unknown_way_is_refused_at_once(daemon: DaemonProcess, word: Any) -> None:
    chain = new_chain(SMALL, 1)
    for transport in ("shm", "grpc"):
        with daemon.client(transport=transport) as client:
            save(client, SMALL, chain)
            with client.open_layout(SMALL).lookup(chain) as lease, pytest.raises(InvalidRequest, match="verify"):
                lease.view(verify=word)


def test_a_stream_has_no_views(daemon: DaemonProcess, client: Client) -> None:
    chain = new_chain(SMALL, 2)
    save(client, SMALL, chain)
    with (
        daemon.client(transport="grpc") as other,
        other.open_layout(SMALL).lookup(chain) as lease,
        pytest.raises(NotShared, match="load the blocks"),
    ):
        lease.view()
