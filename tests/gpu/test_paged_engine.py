"""An engine that keeps KV in pages on a GPU, as vLLM does: saves in place, loads of parts by ticket, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvservice_adapter.breaker import Breaker, probe_of
from kvservice_adapter.device.arrays import view_of
from kvservice_adapter.engine.page_loads import AnswerWait, PagedLayers, PrefixLoad, Waits, release_on
from kvservice_adapter.engine.page_saves import PageSave, PageSaver
from kvservice_adapter.load import LayerLoader
from kvservice_api.cuda.runtime import Gpu
from kvservice_client import BlockCache, BlockChain
from kvservice_client.retry import SYSTEM_CLOCK
from tests.contracts.device import WAIT_S
from tests.daemon import MIB, DaemonProcess, until
from tests.gpu.conftest import simulation
from tests.gpu.test_pipelines import (
    LAYERS,
    PAGE_IDS,
    TOKENS,
    Engine,
    answers,
    attached,
    layout_of,
    new_chain,
    take_all,
)

pytestmark = pytest.mark.gpu


class PagedEngine(Engine):
    @property
    def layers(self) -> PagedLayers:
        pages = [self.pages(layer) for layer in range(LAYERS)]
        return PagedLayers(
            [view_of(each.keys) for each in pages],
            [view_of(each.values) for each in pages],
            [self.dtype] * LAYERS,
            [0] * LAYERS,
        )

    def save_pages(self, blocks: BlockCache, chain: BlockChain) -> None:
        saver = PageSaver(
            self.device, blocks, self.layers, Breaker(probe_of(blocks)), SYSTEM_CLOCK, staging_bytes=8 * MIB
        )
        assert saver.gather([PageSave(chain, 0, [PAGE_IDS])], WAIT_S).wait(WAIT_S)
        until(lambda: blocks.contains(chain) == len(chain))
        saver.close(WAIT_S)

    def prefix_load(self, blocks: BlockCache, chain: BlockChain, begin: int, end: int) -> PrefixLoad:
        waits = Waits(AnswerWait(WAIT_S, SYSTEM_CLOCK), WAIT_S, WAIT_S)
        stream, ticket = self.device.stream("paged"), blocks.lookup(chain).export()
        load = PrefixLoad(stream, blocks, ticket, (begin, end), waits, release_on(stream), verify="once")
        load.after(self.device.computed())
        return load


@pytest.mark.parametrize("transport", ["shm", "grpc"])
@pytest.mark.parametrize(("begin", "end"), [(0, TOKENS), (37, 80)])
def test_tokens_come_back_into_other_pages_and_no_other_token_changes(
    cupy: Any, gpu: Gpu, daemon: DaemonProcess, transport: str, begin: int, end: int
) -> None:
    saved = PagedEngine(cupy, gpu, "bfloat16", 1)
    loaded = PagedEngine(cupy, gpu, "bfloat16", 2, beside=saved)
    with attached(daemon, saved, transport) as client:
        blocks = client.open_layout(layout_of("bfloat16"))
        chain = new_chain(blocks.layout)
        saved.save_pages(blocks, chain)
        expected = [[part.copy() for part in loaded.tokens(layer)] for layer in range(LAYERS)]
        for layer in range(LAYERS):
            for ours, theirs in zip(expected[layer], saved.tokens(layer), strict=True):
                ours[begin:end] = theirs[begin:end]

        load = loaded.prefix_load(blocks, chain, begin, end)
        for _ in load.begin(load.pages_of_layer(loaded.layers, [PAGE_IDS])):
            pass

        assert load.transport == transport
        for layer in range(LAYERS):
            assert all(np.array_equal(*each) for each in zip(loaded.tokens(layer), expected[layer], strict=True))
        if simulation() is not None:
            assert simulation().findings() == []


@pytest.mark.sim
def test_a_save_in_place_and_a_load_are_one_dma_per_slice_each_and_nothing_is_staged(
    cupy: Any, gpu: Gpu, daemon: DaemonProcess
) -> None:
    import cudasim

    saved = PagedEngine(cupy, gpu, seed=1)
    loaded = PagedEngine(cupy, gpu, seed=2, beside=saved)
    with attached(daemon, saved, "shm") as client:
        blocks = client.open_layout(layout_of("float16"))
        chain = new_chain(blocks.layout)
        cudasim.reset()
        saved.save_pages(blocks, chain)
        written = cudasim.copies()
        cudasim.reset()
        load = loaded.prefix_load(blocks, chain, 0, TOKENS)
        loader = LayerLoader(
            loaded.device,
            loaded.device.stream("paged-load"),
            load,
            load.pages_of_layer(loaded.layers, [PAGE_IDS]),
            layer_count=LAYERS,
            buffer_layers=LAYERS,
            wait_s=WAIT_S,
        )
        loader.start()
        take_all(loader)
        until(lambda: loader.is_done)
        read = cudasim.copies()

        tables = LAYERS  # One page table per layer, in pinned memory.
        slices = LAYERS * len(chain)
        assert written["d2h"] == {"pinned": (slices, load.size_bytes), "pageable": (0, 0)}
        assert read["h2d"]["pinned"][0] == slices + tables
        assert read["h2d"]["pageable"] == (0, 0)
        assert loaded.has_the_tokens_of(saved)
        assert client.stats().viewed_bytes == load.size_bytes
        assert answers(blocks)
