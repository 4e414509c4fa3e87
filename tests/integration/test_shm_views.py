"""Views: blocks in place, without a copy, and never a byte that is in doubt."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvservice_api.errors import ChecksumMismatch, InvalidRequest, LeaseExpired, NotShared
from kvservice_client import Client, Durability, Layout, Shard, View
from tests.clock import later
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import LARGE, SMALL, layers_of, new_chain, save
from tests.integration.media import arena, flip_data


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
    with pytest.raises(LeaseExpired, match="was left"):
        left.slices(0)
    with pytest.raises(LeaseExpired), lease.view() as view:  # Noticed by whoever leaves the view, too.
        lease.release()
    with pytest.raises(LeaseExpired):
        view.check()
    with pytest.raises(LeaseExpired):
        lease.view()


def test_a_view_lasts_as_long_as_its_lease_less_a_fifth(client: Client) -> None:
    chain = new_chain(SMALL, 2)
    save(client, SMALL, chain)
    with client.open_layout(SMALL).lookup(chain, lease_ttl_s=300) as lease:
        view = lease.view()
        with later(seconds=200):
            view.check()
        with later(seconds=245), pytest.raises(LeaseExpired, match="all but over"):
            view.check()
        with later(seconds=245):
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


def test_a_stream_has_no_views(daemon: DaemonProcess, client: Client) -> None:
    chain = new_chain(SMALL, 2)
    save(client, SMALL, chain)
    with (
        daemon.client(transport="grpc") as other,
        other.open_layout(SMALL).lookup(chain) as lease,
        pytest.raises(NotShared, match="load the blocks"),
    ):
        lease.view()
