"""An engine's worker for tests of cuda_ipc: pages in CuPy's memory, and their registration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from kvservice_adapter.device.arrays import ArrayView, view_of
from kvservice_adapter.device.cuda_ipc import IpcPages
from kvservice_api.cuda.runtime import Gpu
from kvservice_api.v1 import devices_pb2 as pb
from kvservice_client import BlockChain, Client, Durability, Layout, Lease, Shard, block_chain
from kvservice_client.channel import DEVICES
from kvservice_client.device_memory import DeviceMemory, DeviceSave, LoadPlace, SavePlace
from tests.daemon import SOON_S

LAYERS, HEADS, K_DIM, V_DIM, PAGE_TOKENS, PAGES = 3, 2, 16, 8, 16, 12
BITS = {"bfloat16": "uint16", "float16": "uint16", "float8_e4m3fn": "uint8"}
_numbers = count(1)


def layout_of(dtype: str, layers: int = LAYERS) -> Layout:
    return Layout(f"ipc-{dtype}", dtype, layers, HEADS, K_DIM, V_DIM, block_tokens=32)


def new_chain(layout: Layout, tokens: int) -> BlockChain:
    return block_chain(layout, np.arange(tokens) + 100_000 * next(_numbers), with_partial=True)


class Pages:
    """Pages of one worker: in each layer keys beside values, in memory that CuPy carves from larger allocations."""

    def __init__(self, cupy: Any, layout: Layout, heads: int = HEADS) -> None:
        self._cupy = cupy
        bits = BITS[layout.dtype]
        self.arrays = [cupy.zeros((PAGES, heads, PAGE_TOKENS, K_DIM + V_DIM), bits) for _ in range(layout.layers)]
        views = [view_of(each).named(layout.dtype) for each in self.arrays]
        self.keys = [_part(view, 0, K_DIM) for view in views]
        self.values = [_part(view, K_DIM, V_DIM) for view in views]

    def fill(self) -> list[Any]:
        """Random bits in all pages. Returns them."""
        generator = np.random.default_rng(next(_numbers))
        for layer in self.arrays:
            layer[...] = self._cupy.asarray(generator.integers(0, 255, layer.shape).astype(layer.dtype))
        self._cupy.cuda.runtime.deviceSynchronize()
        return self.read()

    def clear(self) -> None:
        for layer in self.arrays:
            layer[...] = 0
        self._cupy.cuda.runtime.deviceSynchronize()

    def read(self) -> list[Any]:
        return [self._cupy.asnumpy(layer) for layer in self.arrays]


class Engine:
    """Pages, and their registration at a daemon: what the client's library does, without an engine's pipelines."""

    def __init__(
        self,
        cupy: Any,
        client: Client,
        layout: Layout,
        shard: Shard | None = None,
        groups: Sequence[int] = (0,) * LAYERS,
    ) -> None:
        self.layout, self.blocks = layout, client.open_layout(layout, shard)
        self.pages = Pages(cupy, layout, self.blocks.shard.heads)
        self.fill, self.clear, self.read = self.pages.fill, self.pages.clear, self.pages.read
        self.exported = IpcPages(Gpu(0), self.pages.keys, self.pages.values, groups)
        self.memory: DeviceMemory = self.blocks.device_memory(self.exported)

    def begin_save(
        self,
        chain: BlockChain,
        page_ids: Sequence[int],
        answer_s: float = SOON_S,
        durability: Durability = Durability.DRAM,
    ) -> DeviceSave:
        return self.memory.save([(chain, SavePlace(0, [page_ids]))], durability, answer_s=answer_s)

    def save(self, chain: BlockChain, page_ids: Sequence[int]) -> int:
        """Blocks stored."""
        with self.begin_save(chain, page_ids) as save:
            save.gather()
            (result,) = save.commit()
        assert result.refused == []
        return result.stored

    def load(self, chain: BlockChain, page_ids: Sequence[int], begin: int = 0, end: int | None = None) -> list[int]:
        place = LoadPlace(0, [page_ids], [begin], chain.token_count if end is None else end)
        with self.blocks.lookup(chain) as lease:
            assert lease.hit_blocks == len(chain)
            return list(self.copies(lease, place))

    def copies(self, lease: Lease, place: LoadPlace, layer_s: float = SOON_S) -> Iterator[int]:
        fence = self.memory.fence()
        return lease.copy_to(
            self.memory, place, fence, 0, lease.hit_blocks, layer_timeout_s=layer_s, idle_timeout_s=layer_s
        )

    def take_registration_of(self, other: Engine) -> None:
        """Use another client's registration, whose number was guessed."""
        mine, theirs = self.memory._registered, other.memory._registered
        assert mine is not None
        assert theirs is not None
        self.memory._registered = mine._replace(number=theirs.number)

    def register_anyway(self) -> None:
        """Register without a look at what the daemon offers."""
        connection = self.memory._connection
        deadline = connection.deadline(SOON_S)
        request = self.exported.description()
        request.client_id = connection.session(self.layout, deadline).attachment.client_id
        request.layout_fingerprint = self.layout.fingerprint
        connection.channel.call(DEVICES + "RegisterMemory", request, pb.RegisterMemoryResponse, deadline)


def _part(view: ArrayView, first: int, dim: int) -> ArrayView:
    return replace(view, address=view.address + first * view.item_bytes, shape=(*view.shape[:3], dim))


def tokens_of(pages: Any, page_ids: Sequence[int], begin: int, end: int) -> Any:
    """The tokens of a sequence in one layer, as ``[head, token, dim]``."""
    return np.concatenate([pages[page] for page in page_ids], axis=1)[:, begin:end]


def same_tokens(
    before: Sequence[Any], from_ids: Sequence[int], after: Sequence[Any], to_ids: Sequence[int], begin: int, end: int
) -> bool:
    """Whether tokens have the same bits in all layers, in other pages."""
    return all(
        np.array_equal(tokens_of(old, from_ids, begin, end), tokens_of(new, to_ids, begin, end))
        for old, new in zip(before, after, strict=True)
    )
