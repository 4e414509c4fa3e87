"""Layers from a real daemon while an engine takes them, also when the daemon dies or hangs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.layer_source import HostLayers
from kvservice_adapter.load import LayerLoader, LoadFailed
from kvservice_api.errors import KVError
from kvservice_client import BlockCache, BlockChain, Client, Layout, Lease
from tests.contracts.device import WAIT_S
from tests.daemon import MIB, SOON_S, DaemonProcess, until
from tests.integration.conversations import layers_of, new_chain
from tests.layouts import changed

LAYOUT = Layout("preloaded", "float16", layers=8, kv_heads=4, k_head_dim=64, v_head_dim=64, block_tokens=256)
TOKENS = 600
LAYER_BYTES = TOKENS * LAYOUT.bytes_per_token // LAYOUT.layers
# 2000 tokens of it are 65 MB: much more than gRPC sends ahead of its reader.
LARGE, LARGE_TOKENS = changed(LAYOUT, model_id="preloaded/large", layers=32), 2000
DEVICE = CpuDevice()
Layers = list[NDArray[np.uint8]]


@pytest.fixture(params=["shm", "grpc"])
def client(request: pytest.FixtureRequest, daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client("engine", transport=request.param, timeout_s=15) as client:
        yield client


def saved(blocks: BlockCache, tokens: int = TOKENS) -> tuple[BlockChain, Layers]:
    chain = new_chain(blocks.layout, tokens)
    layers = layers_of(blocks, chain)
    assert blocks.save(chain, layers).is_complete
    return chain, layers


def loader_of(lease: Lease, layers: int = LAYOUT.layers, *, k: int = 0, wait_s: float = WAIT_S) -> LayerLoader:
    tokens, stream = lease.hit_tokens, DEVICE.stream("engine-load")

    def pages(layer: int) -> Pages:
        return Pages(torch.zeros(1, 4, tokens, 64).half(), torch.zeros(1, 4, tokens, 64).half(), [0])

    return LayerLoader(
        DEVICE,
        stream,
        HostLayers(stream, partial(lease.load, timeout_s=5.0), lease.token_counts),
        pages,
        layer_count=layers,
        wait_s=wait_s,
        buffer_layers=k,
        release=lease.release,
    )


def is_there(blocks: BlockCache, chain: BlockChain, pages: Pages, data: NDArray[np.uint8]) -> bool:
    first, same = 0, True
    for keys, values in blocks.layer_arrays(data, chain.token_counts):
        end = first + keys.shape[1]
        for part, states in ((keys, pages.keys), (values, pages.values)):
            same &= np.array_equal(part.view(np.int16), states[0, :, first:end].view(torch.int16).numpy())
        first = end
    return same


def has_loaded(loader: LayerLoader, layers: int) -> bool:
    return loader.report.layers == layers


def leases(client: Client) -> int:
    return client.admin.status().leases


def test_a_history_comes_into_the_engines_pages_and_its_lease_ends(client: Client) -> None:
    blocks = client.open_layout(LAYOUT)
    chain, layers = saved(blocks)
    loader = loader_of(blocks.lookup(chain), k=3)

    loader.start()
    for index, data in enumerate(layers):
        assert is_there(blocks, chain, loader.wait(index), data)

    until(lambda: loader.is_done)
    assert leases(client) == 0
    assert loader.report.size_bytes == LAYOUT.layers * LAYER_BYTES


def test_a_load_that_is_dropped_while_it_waits_for_the_engine_ends_its_lease(client: Client) -> None:
    blocks = client.open_layout(LAYOUT)
    chain, _ = saved(blocks)
    loader = loader_of(blocks.lookup(chain), k=2)
    loader.start()
    until(partial(has_loaded, loader, 2))
    assert leases(client) == 1

    del loader

    until(lambda: leases(client) == 0)


@pytest.mark.parametrize("way", ["killed", "hung"])
def test_a_daemon_that_goes_away_in_the_middle_costs_one_bounded_wait(
    new_daemon: Callable[..., DaemonProcess], way: str
) -> None:
    daemon = new_daemon(dram__capacity_bytes=160 * MIB, ssd__capacity_bytes=0)
    with daemon.client("saver") as client:
        chain, layers = saved(client.open_layout(LARGE), LARGE_TOKENS)
    with daemon.client("engine", transport="grpc", timeout_s=SOON_S) as client:
        blocks = client.open_layout(LARGE)
        loader = loader_of(blocks.lookup(chain), LARGE.layers, k=2, wait_s=3.0)
        loader.start()
        taken = [loader.wait(0)]

        if way == "killed":
            daemon.kill()
        else:
            daemon.process.send_signal(signal.SIGSTOP)

        error = take_all(loader, taken)
        assert len(taken) < LARGE.layers  # Some had been sent already.
        if way == "killed":
            assert isinstance(error.__cause__, KVError)
        for pages, data in zip(taken, layers, strict=False):
            assert is_there(blocks, chain, pages, data)
        loader.cancel()
        until(lambda: loader.is_done)
        if way == "hung":
            daemon.process.send_signal(signal.SIGCONT)


def take_all(loader: LayerLoader, taken: list[Pages]) -> LoadFailed:
    """The layers that still arrive, and the error of the next one."""
    while True:
        try:
            taken.append(loader.wait(len(taken)))
        except LoadFailed as error:
            return error
