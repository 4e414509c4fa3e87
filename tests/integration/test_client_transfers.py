"""The client saves and loads: the same bytes in the same order, from and into every kind of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from kvservice_api.errors import BlockNotFound, InvalidRequest, LeaseExpired
from kvservice_client import Client, Durability, Layout, ResidencyRun, SaveResult, Shard, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.conversations import large_layout, layers_of, new_chain, same, small_layout


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with Client(daemon.address, name="test") as client:
        yield client


@pytest.mark.parametrize("layout", [small_layout(), large_layout()], ids=["small slices", "large slices"])
def test_what_was_saved_comes_back_bit_for_bit_and_layer_by_layer(client: Client, layout: Layout) -> None:
    blocks = client.open_layout(layout)
    chain = new_chain(layout, 3 * layout.block_tokens + 5)
    layers = layers_of(blocks, chain)

    saved = blocks.save(chain, layers)
    assert (saved.stored, saved.already_stored, saved.is_complete) == (4, 0, True)

    with blocks.lookup(chain) as lease:
        assert (lease.hit_blocks, lease.hit_tokens) == (4, chain.token_count)
        loaded = list(lease.load())
    assert [layer.index for layer in loaded] == list(range(layout.layers))
    assert same([layer.data for layer in loaded], layers)


def test_a_chain_longer_than_one_save_may_be_is_saved_in_parts(client: Client) -> None:
    layout = small_layout()
    count = 2 * client.capabilities().max_save_blocks + 3
    blocks, chain = client.open_layout(layout), new_chain(layout, count * layout.block_tokens - 1)
    layers = layers_of(blocks, chain)
    size = blocks.slice_bytes(layout.block_tokens)
    blocks.save(chain[5:7], [layer[5 * size : 7 * size] for layer in layers])

    saved = blocks.save(chain, layers)

    assert (saved.stored, saved.already_stored, saved.is_complete) == (count - 2, 2, True)
    with blocks.lookup(chain) as lease:
        assert lease.hit_blocks == count
        assert same([layer.data for layer in lease.load()], layers)
    assert client.admin.inspect(chain.keys[-1]).shards[0].parent_key == chain.keys[-2]


def test_a_load_fills_the_buffers_it_is_given(client: Client) -> None:
    layout = small_layout()
    blocks, chain = client.open_layout(layout), new_chain(layout, 20)
    layers = layers_of(blocks, chain)
    blocks.save(chain, layers)

    with blocks.lookup(chain) as lease:
        into = torch.zeros(layout.layers, lease.layer_bytes() // 2, dtype=torch.bfloat16)
        for layer in lease.load(list(into)):
            assert np.array_equal(into[layer.index].view(torch.uint8).numpy(), layers[layer.index])


def test_a_part_of_the_hits_can_be_loaded(client: Client) -> None:
    layout = small_layout()
    blocks, chain = client.open_layout(layout), new_chain(layout, 5 * layout.block_tokens)
    layers = layers_of(blocks, chain)
    blocks.save(chain, layers)
    size = blocks.slice_bytes(layout.block_tokens)

    with blocks.lookup(chain) as lease:
        loaded = [layer.data for layer in lease.load(first_block=1, block_count=3)]
    assert same(loaded, [layer[size : 4 * size] for layer in layers])


def test_a_lookup_counts_only_the_unbroken_prefix(client: Client) -> None:
    layout = small_layout()
    blocks, chain = client.open_layout(layout), new_chain(layout, 5 * layout.block_tokens)
    blocks.save(chain[:2], layers_of(blocks, chain[:2]))
    blocks.save(chain[3:], layers_of(blocks, chain[3:]))

    assert blocks.contains(chain) == 2
    with blocks.lookup(chain) as lease:
        assert lease.hit_blocks == 2
        assert sum(run.count for run in lease.residency) == 2


def test_nothing_stored_is_an_answer_and_not_an_error(client: Client) -> None:
    layout = small_layout()
    blocks, chain = client.open_layout(layout), new_chain(layout, 30)

    assert blocks.contains(chain) == 0
    with blocks.lookup(chain) as lease:
        assert (lease.hit_blocks, lease.hit_tokens, lease.residency, lease.remaining_s) == (0, 0, [], 0)
        with pytest.raises(BlockNotFound):
            lease.load()


def test_a_prompt_shorter_than_a_block_hits_nothing_and_stores_nothing_and_the_daemon_is_not_asked() -> None:
    layout = small_layout()
    with Client("127.0.0.1:1", timeout_s=0.2) as client:  # No process listens there.
        blocks = client.open_layout(layout)
        chain = block_chain(layout, list(range(layout.block_tokens - 1)))
        assert len(chain) == 0 and blocks.contains(chain) == 0
        with blocks.lookup(chain) as lease:
            assert (lease.hit_blocks, lease.hit_tokens, lease.residency, lease.remaining_s) == (0, 0, [], 0)
            for call in (lease.load, lease.layer_bytes):
                with pytest.raises(BlockNotFound):
                    call()
            with pytest.raises(LeaseExpired):
                lease.renew()
        layers = [np.empty(0, np.uint8)] * layout.layers
        assert blocks.save(chain, layers) == SaveResult(0, 0, [])
        assert blocks.save(chain, []).is_complete


def test_saving_twice_stores_once(client: Client) -> None:
    layout = small_layout()
    blocks, chain = client.open_layout(layout), new_chain(layout, 3 * layout.block_tokens)
    layers = layers_of(blocks, chain)
    blocks.save(chain[:1], layers_of(blocks, chain[:1]))

    again = blocks.save(chain, layers)
    assert (again.stored, again.already_stored) == (2, 1)


def test_a_save_takes_bytes_arrays_and_tensors_whole_or_block_by_block(client: Client) -> None:
    layout = small_layout()
    blocks, chain = client.open_layout(layout), new_chain(layout, 2 * layout.block_tokens)
    layers = layers_of(blocks, chain)
    tensors = torch.from_numpy(np.stack(layers)).view(torch.bfloat16).view(layout.layers, 2, 2, 2, 8, 16)
    given: list[Any] = [
        layers[0].tobytes(),
        layers[1].data.cast("H"),
        tensors[2],
        [tensors[3][0], layers[3][len(layers[3]) // 2 :]],
    ]

    assert blocks.save(chain, given).stored == 2
    with blocks.lookup(chain) as lease:
        assert same([layer.data for layer in lease.load()], layers)


def test_buffers_of_a_wrong_shape_are_refused_by_name(client: Client) -> None:
    layout = small_layout()
    blocks, chain = client.open_layout(layout), new_chain(layout, 2 * layout.block_tokens)
    layers = layers_of(blocks, chain)

    with pytest.raises(InvalidRequest, match="3 layers are given; the shard has 4"):
        blocks.save(chain, layers[:3])
    with pytest.raises(InvalidRequest, match=r"layers\[1\] has 2047 bytes; it must have 2048"):
        blocks.save(chain, [layers[0], layers[1][1:], *layers[2:]])
    with pytest.raises(InvalidRequest, match=r"layers\[3\] has 1 buffers; the chain has 2 blocks"):
        blocks.save(chain, [*layers[:3], [layers[3]]])
    assert blocks.contains(chain) == 0

    blocks.save(chain, layers)
    with blocks.lookup(chain) as lease:
        with pytest.raises(InvalidRequest, match=r"into\[2\] is read-only"):
            lease.load([*layers[:2], layers[2].tobytes(), layers[3]])
        with pytest.raises(InvalidRequest, match=r"blocks 1\.\.3 are not within the 2"):
            lease.load(first_block=1, block_count=2)


def test_a_rank_loads_its_heads_and_layers_of_whole_blocks(client: Client) -> None:
    layout = small_layout()
    whole, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
    layers = layers_of(whole, chain)
    whole.save(chain, layers)

    rank = client.open_layout(layout, Shard(1, 3, 1, 2))
    with rank.lookup(chain) as lease:
        loaded = [layer.data for layer in lease.load()]
    assert len(loaded) == 2
    for part, layer in zip(loaded, layers[1:3], strict=True):
        [(keys, values)] = rank.layer_arrays(part, chain.token_counts)
        [(all_keys, all_values)] = whole.layer_arrays(layer, chain.token_counts)
        assert keys.shape == (1, 8, 16)
        assert np.array_equal(keys[0], all_keys[1])
        assert np.array_equal(values[0], all_values[1])


def test_a_layer_arrives_before_the_last_one_has_left_the_daemon(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon, layout = new_daemon(dram__capacity_bytes=256 * MIB, ssd__capacity_bytes=0), large_layout()
    with Client(daemon.address) as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, 12 * layout.block_tokens)
        layers = layers_of(blocks, chain)
        total_bytes = sum(map(len, layers))
        until(lambda: client.admin.status().dram.capacity_bytes > 240 * MIB)
        assert blocks.save(chain, layers).is_complete

        with blocks.lookup(chain) as lease:
            load = lease.load()
            first = next(load)
            sent_bytes = client.admin.status().counters["load_bytes"]
            assert np.array_equal(first.data, layers[0])
            assert sent_bytes < total_bytes
            with blocks.lookup(chain) as other:  # A reader that pauses stalls no other load of its client.
                assert same([layer.data for layer in other.load()], layers)
            assert same([layer.data for layer in load], layers[1:])


def test_a_load_that_is_left_early_ends_at_the_daemon(daemon: DaemonProcess, client: Client) -> None:
    layout = large_layout()
    blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
    blocks.save(chain, layers_of(blocks, chain))

    for layer in blocks.lookup(chain).load():
        assert layer.index == 0
        break
    with blocks.lookup(chain) as lease:
        assert len(list(lease.load())) == layout.layers


def test_durable_saves_are_on_ssd_when_they_return(client: Client) -> None:
    layout = small_layout()
    blocks, chain = client.open_layout(layout), new_chain(layout, 3 * layout.block_tokens)
    layers = layers_of(blocks, chain)
    blocks.save(chain, layers, Durability.SSD)
    assert blocks.lookup(chain).residency == [ResidencyRun(3, dram=True, ssd=True)]

    assert client.evict(chain, "dram") == (0, 3, 0)  # Leased above.


def test_evicted_blocks_come_back_from_ssd_and_prefetched_ones_are_in_dram(client: Client) -> None:
    layout = small_layout()
    blocks, chain = client.open_layout(layout), new_chain(layout, 3 * layout.block_tokens)
    layers = layers_of(blocks, chain)
    blocks.save(chain, layers, Durability.SSD)

    assert client.evict(chain, "dram") == (3, 0, 0)
    with blocks.lookup(chain) as lease:
        assert lease.residency == [ResidencyRun(3, dram=False, ssd=True)]
        assert same([layer.data for layer in lease.load()], layers)

    def is_in_dram() -> bool:
        with blocks.lookup(chain) as lease:
            return lease.residency == [ResidencyRun(3, dram=True, ssd=True)]

    until(is_in_dram)  # The load promoted them; their index records may not be committed yet.
    assert client.evict(chain, "dram") == (3, 0, 0)
    missing = new_chain(layout, layout.block_tokens)
    assert client.prefetch([*chain, *missing], wait=True) == (1, 0, 3, 0)
    assert client.prefetch(chain) == (0, 3, 0, 0)


def test_what_a_client_handed_out_outlives_the_name_it_had(daemon: DaemonProcess) -> None:
    layout = small_layout()
    blocks = Client(daemon.address).open_layout(layout)
    chain = new_chain(layout, layout.block_tokens)
    layers = layers_of(blocks, chain)

    blocks.save(chain, layers)

    lease = Client(daemon.address).open_layout(layout).lookup(chain)
    gc.collect()
    assert same([layer.data for layer in lease.load()], layers)
    assert Client(daemon.address).admin.status().state == "serving"


def test_many_threads_share_one_client(client: Client) -> None:
    layout = small_layout()
    blocks = client.open_layout(layout)

    def converse(_: int) -> bool:
        chain = new_chain(layout, 10 * layout.block_tokens)
        layers = layers_of(blocks, chain)
        blocks.save(chain, layers)
        with blocks.lookup(chain) as lease:
            return same([layer.data for layer in lease.load()], layers)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(converse, range(40)))


def test_a_unix_socket_is_an_address_too(daemon: DaemonProcess) -> None:
    with Client(str(daemon.socket_path)) as client:
        assert client.capabilities().boot_epoch == client.admin.status().boot_epoch
