"""Models whose layers differ, through a real daemon: whole, by ranks, in place, from SSD, and after a restart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.layer_source import HostLayers
from kvservice_adapter.load import LayerLoader
from kvservice_adapter.save import LayerSaver
from kvservice_api.errors import InvalidRequest
from kvservice_client import BlockChain, Client, Durability, LayerGroup, Layout, Rotary, Shard, block_chain
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import slice_of

# In the shapes of Gemma (sliding layers with more heads than full ones), gpt-oss (alternating windows), DeepSeek
# (latent vectors, K and V of other dims). Slices of 64 KiB and more stand between small ones.
LAYOUTS = {
    "Gemma": Layout(
        "gemma-like",
        groups=[
            LayerGroup(2, 8, 64, 64, "bfloat16", window=32, rotary=Rotary("default", dims=64, base=1e4)),
            LayerGroup(1, 2, 128, 128, "bfloat16", rotary=Rotary("linear", dims=128, base=1e6)),
            LayerGroup(2, 8, 64, 64, "bfloat16", window=32, rotary=Rotary("default", dims=64, base=1e4)),
        ],
        block_tokens=48,
    ),
    "gpt-oss": Layout(
        "gpt-oss-like",
        groups=[LayerGroup(1, 4, 16, 16, "float16", window=window) for window in (128, 0, 128, 0, 128)],
        block_tokens=16,
    ),
    "DeepSeek": Layout(
        "deepseek-like",
        groups=[
            LayerGroup(1, 4, 24, 16, "float32"),
            LayerGroup(2, 1, 576, 0, "bfloat16"),
            LayerGroup(1, 4, 256, 256, "float8_e4m3fn"),
        ],
        block_tokens=64,
    ),
}

_salts = itertools.count()
WAIT_S = 30.0


@pytest.fixture(params=["grpc", "shm"])
def client(request: pytest.FixtureRequest, daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client(transport=request.param) as client:
        yield client


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def new_chain(layout: Layout) -> BlockChain:
    """Three blocks that no other call gives; the last is not full."""
    salt = str(next(_salts)).encode()
    return block_chain(layout, np.arange(3 * layout.block_tokens - 3), salt=salt, with_partial=True)


def expected(layout: Layout, chain: BlockChain, shard: Shard) -> list[NDArray[np.uint8]]:
    """One buffer per layer of the shard, cut from whole slices by hand."""
    layers = []
    for layer in range(shard.layer_begin, shard.layer_end):
        group = layout.group_of(layer)
        first, last = layout.heads_of(shard, layer)
        parts = []
        for key, tokens in zip(chain.keys, chain.token_counts, strict=True):
            whole = slice_of(key, layer, group.slice_bytes(group.kv_heads, tokens))
            k_end = (
                group.slice_bytes(group.kv_heads, tokens) * group.k_head_dim // (group.k_head_dim + group.v_head_dim)
            )
            parts += [
                half.reshape(group.kv_heads, -1)[first:last].reshape(-1) for half in (whole[:k_end], whole[k_end:])
            ]
        layers.append(np.concatenate(parts))
    return layers


def save(client: Client, layout: Layout, chain: BlockChain, shard: Shard) -> None:
    result = client.open_layout(layout, shard).save(chain, expected(layout, chain, shard), Durability.SSD)
    assert result.stored == len(chain)


def compare(client: Client, layout: Layout, chain: BlockChain, shard: Shard) -> None:
    wanted = expected(layout, chain, shard)
    with client.open_layout(layout, shard).lookup(chain) as lease:
        assert lease.hit_blocks == len(chain)
        into = [np.empty(lease.layer_bytes(layer=layer), np.uint8) for layer in range(shard.layers)]
        for layer in lease.load(into=into):
            assert np.array_equal(layer.data, wanted[layer.index])


def ranks(layout: Layout) -> list[Shard]:
    half = layout.kv_heads // 2
    heads = [Shard(0, layout.layers, 0, half), Shard(0, layout.layers, half, layout.kv_heads)]
    quarters = [Shard(0, layout.layers, begin, begin + 1) for begin in range(layout.kv_heads)]
    return [*heads, *quarters, Shard(0, 2, 0, layout.kv_heads), Shard(2, layout.layers, 0, layout.kv_heads)]


def test_what_was_saved_whole_is_loaded_whole_and_by_each_rank(client: Client, layout: Layout) -> None:
    chain = new_chain(layout)
    save(client, layout, chain, Shard.whole(layout))

    for shard in [Shard.whole(layout), *ranks(layout)]:
        compare(client, layout, chain, shard)
    client.evict(chain, "dram")
    for shard in [ranks(layout)[0], Shard.whole(layout)]:
        compare(client, layout, chain, shard)


def test_what_ranks_saved_is_loaded_whole(client: Client, layout: Layout) -> None:
    halves, single_heads, layer_ranges = ranks(layout)[:2], ranks(layout)[2:-2], ranks(layout)[-2:]
    for shards in (halves, single_heads, layer_ranges):
        chain = new_chain(layout)
        for shard in shards:
            if not client.open_layout(layout, shard).contains(chain):
                save(client, layout, chain, shard)
        for shard in [Shard.whole(layout), *ranks(layout)]:
            compare(client, layout, chain, shard)


def test_each_layer_is_seen_in_its_own_shape(client: Client) -> None:
    layout = LAYOUTS["DeepSeek"]
    chain = new_chain(layout)
    blocks = client.open_layout(layout)
    blocks.save(chain, expected(layout, chain, Shard.whole(layout)))

    with blocks.lookup(chain) as lease:
        loaded = list(lease.load())
    shapes = [
        [array.shape for array in blocks.layer_arrays(layer.data, chain.token_counts, layer.index)[0]]
        for layer in loaded
    ]
    assert shapes == [
        [(4, 64, 24), (4, 64, 16)],
        [(1, 64, 576), (1, 64, 0)],
        [(1, 64, 576), (1, 64, 0)],
        [(4, 64, 256), (4, 64, 256)],
    ]
    with pytest.raises(InvalidRequest, match="name the layer"):
        blocks.layer_arrays(loaded[0].data, chain.token_counts)
    with pytest.raises(InvalidRequest, match="name the layer"):
        blocks.slice_bytes(64)


def test_a_buffer_is_checked_against_its_own_layer(client: Client) -> None:
    layout = LAYOUTS["DeepSeek"]
    blocks, chain = client.open_layout(layout), new_chain(layout)[:2]
    layers: list[NDArray[np.generic]] = [
        np.zeros((2 * 64 * 4 * 40,), np.float32),
        np.zeros((2, 1, 1, 64, 576), np.int16),
        np.zeros((2, 1, 1, 64, 576), np.int16),
        np.zeros((2, 2, 4, 64, 256), np.int8),
    ]
    assert blocks.save(chain, layers).stored + blocks.save(chain, layers).already_stored >= 2
    for wrong in (0, 3):
        mixed = [*layers[:wrong], layers[wrong].view(np.int16), *layers[wrong + 1 :]]
        with pytest.raises(InvalidRequest, match=rf"layers\[{wrong}\] has elements of int16"):
            blocks.save(chain, mixed)


def test_a_view_shows_each_layer_in_place(daemon: DaemonProcess, layout: Layout) -> None:
    with daemon.client(transport="shm") as client:
        chain = new_chain(layout)
        save(client, layout, chain, Shard.whole(layout))
        for shard in [Shard.whole(layout), ranks(layout)[0]]:
            wanted = expected(layout, chain, shard)
            with client.open_layout(layout, shard).lookup(chain) as lease, lease.view() as view:
                for layer in range(shard.layers):
                    found = [part for block in view.slices(layer) for part in block]
                    assert np.array_equal(np.concatenate(found), wanted[layer])


def test_the_adapters_pipelines_save_and_load_layers_of_several_geometries(client: Client, layout: Layout) -> None:
    blocks, chain, device = client.open_layout(layout), new_chain(layout), CpuDevice()
    wanted = expected(layout, chain, Shard.whole(layout))

    def pages(layer: int) -> Pages:
        group, dtype = layout.group_of(layer), getattr(torch, layout.group_of(layer).dtype)
        dims = (group.k_head_dim, group.v_head_dim)
        keys, values = (torch.zeros(1, group.kv_heads, chain.token_count, dim, dtype=dtype) for dim in dims)
        return Pages(keys, values, [0])

    stream = device.stream("test")
    computed = [pages(layer) for layer in range(layout.layers)]
    for layer, data in enumerate(wanted):
        assert stream.scatter(data.copy(), chain.token_counts, computed[layer]).wait(WAIT_S)
    saver = LayerSaver(device, blocks, staging_bytes=4 << 20)
    job = saver.begin(chain)
    assert job is not None
    for layer, given in enumerate(computed):
        job.layer(layer, given)
    job.commit()
    assert saver.flush(WAIT_S)
    compare(client, layout, chain, Shard.whole(layout))

    with blocks.lookup(chain) as lease:
        source = HostLayers(stream, lease.load, chain.token_counts)
        loader = LayerLoader(device, stream, source, pages, layer_count=layout.layers, wait_s=WAIT_S)
        loader.start()
        for layer in range(layout.layers):
            loaded = loader.wait(layer)
            for name in ("keys", "values"):
                found, stored = (getattr(each, name).view(torch.uint8) for each in (loaded, computed[layer]))
                assert torch.equal(found, stored)


def test_a_truncated_session_gives_what_was_kept_of_every_layer(client: Client, layout: Layout) -> None:
    blocks, chain, session = client.open_layout(layout), new_chain(layout), client.session(layout, f"s{next(_salts)}")
    whole = expected(layout, chain, Shard.whole(layout))
    blocks.save(chain, whole)
    session.append(chain)
    first, count = layout.block_tokens + 3, chain.token_count - layout.block_tokens - 3
    session.truncate([(0, 4), (first, count)], 1)

    def kept(data: NDArray[np.uint8], layer: int) -> list[bytes]:
        parts = zip(*blocks.layer_arrays(data, chain.token_counts, layer), strict=True)
        tokens = [np.concatenate(part, axis=1) for part in parts]
        return [np.concatenate([part[:, :4], part[:, first:]], axis=1).tobytes() for part in tokens]

    with session.lookup() as history:
        for layer in history.load():
            parts = zip(*blocks.layer_arrays(layer.data, history.token_counts, layer.index), strict=True)
            found = [np.concatenate(part, axis=1).tobytes() for part in parts]
            assert found == kept(whole[layer.index], layer.index)


def test_blocks_of_several_groups_survive_a_kill(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        chains = {name: new_chain(layout) for name, layout in LAYOUTS.items()}
        with daemon.client() as client:
            for name, layout in LAYOUTS.items():
                save(client, layout, chains[name], Shard.whole(layout))
        daemon.kill()
        assert daemon.check().returncode == 0
        daemon.start()
        with daemon.client() as client:
            for name, layout in LAYOUTS.items():
                compare(client, layout, chains[name], Shard.whole(layout))
                client.evict(chains[name], "dram")
                compare(client, layout, chains[name], Shard.whole(layout))
