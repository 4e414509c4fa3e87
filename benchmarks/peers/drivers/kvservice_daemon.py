"""KVService: one save of all blocks, and one lease that loads them, as an engine does with a prefix.

Each block has 32 layers, and is loaded layer by layer into the client's memory, with every slice's checksum verified.
A view copies nothing, and the daemon verifies each block once: with the option `first` in the time of the get, as far
as it has not done so since the put, else between put and get, by a view that is not timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks.client.wire import until_allocated
from benchmarks.peers.drivers.loop import Bytes, Client, Memory, Servers, System, main
from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.layout import Layout
from kvservice_client import client as kvservice
from kvservice_client.block_cache import BlockCache
from kvservice_client.transports.base import Durability
from kvservice_client.transports.in_place import View

_LAYERS = 32
_BLOCK_TOKENS = 256
_TIMEOUT_S = 60.0
_PAGE = 4096


class KVService(System):
    """Options: `transport`; `view` for blocks in place instead of a load, and `first` for the first view of each block;
    `ssd` for blocks that are on SSD only.
    """

    def start(self, servers: Servers) -> None:
        dram_bytes = 2 * self.bytes_max + (256 << 20)
        serving = servers.run_until_logged(
            [
                *(sys.executable, "-m", "kvservice", "serve", f"--store.path={servers.folder / 'store'}"),
                *(f"--dram.path={self.options['dram_path']}", f"--dram.capacity_bytes={dram_bytes}"),
                f"--ssd.capacity_bytes={dram_bytes if self.options.get('ssd') else 0}",
                *("--server.address=127.0.0.1:0", "--server.unix_socket=off", "--server.metrics_address="),
                "--log.format=json",
            ],
            '"serving"',
        )
        self.address = f"127.0.0.1:{json.loads(serving)['port']}"

    def client(self, memory: Memory, number: int) -> Client:
        return KVServiceClient(self.address, memory, self.options)


class KVServiceClient(Client):
    def __init__(self, address: str, memory: Memory, options: dict[str, Any]) -> None:
        self._transport = options["transport"]
        self._client = kvservice.Client(address, name="peers bench", timeout_s=_TIMEOUT_S, transport=self._transport)
        until_allocated(self._client)
        self._memory = memory
        self._is_view = options.get("view", False)
        self._is_viewed_before = self._is_view and not options.get("first", False)
        self._is_on_ssd = options.get("ssd", False)
        self._caches: dict[int, BlockCache] = {}
        self._cache: BlockCache
        self._block_bytes = 0
        self._leased = ExitStack()
        self._view: View

    def names(self, turn: str, block_bytes: int, blocks: int) -> BlockChain:
        if block_bytes not in self._caches:
            self._caches[block_bytes] = self._client.open_layout(_layout(block_bytes))
        self._cache, self._block_bytes = self._caches[block_bytes], block_bytes
        return block_chain(self._cache.layout, np.arange(blocks * _BLOCK_TOKENS), salt=turn.encode())

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        durability = Durability.SSD if self._is_on_ssd else Durability.DRAM
        result = self._cache.save(names, self._layers(self._memory.source, blocks), durability, _TIMEOUT_S)
        if result.refused:
            raise result.refused[0][1]

    def get(self, names: Any, blocks: Sequence[Bytes]) -> None:
        into = self._layers(self._memory.target, blocks)
        with self._leased.pop_all():  # Of the last turn, if it failed.
            pass
        lease = self._leased.enter_context(self._cache.lookup(names))
        if lease.hit_blocks != len(names):
            raise RuntimeError(f"the daemon has only {lease.hit_blocks} of {len(names)} blocks")
        if self._is_view:
            self._view = self._leased.enter_context(lease.view(timeout_s=_TIMEOUT_S))
            for block in self._view.blocks():  # One byte of each page, as `lmcache_local` does.
                block[:, ::_PAGE].sum()
            return  # The view is left after its bytes were compared.
        for _ in lease.load(into=into, timeout_s=_TIMEOUT_S, release=True):
            pass

    def copy_out(self, names: Any, blocks: Sequence[Bytes]) -> None:
        if self._is_view:
            for layer, into in enumerate(self._layers(self._memory.target, blocks)):
                np.concatenate([np.frombuffer(piece, np.uint8) for (piece,) in self._view.slices(layer)], out=into)
            self._leased.close()

    def settle(self, names: Any) -> None:
        if self._is_viewed_before:
            with self._cache.lookup(names) as lease, lease.view(timeout_s=_TIMEOUT_S):
                pass
        if self._is_on_ssd:
            evicted = self._client.evict(names, "dram", timeout_s=_TIMEOUT_S)
            if evicted.held:
                raise RuntimeError(f"{evicted.held} blocks were not evicted from DRAM")

    def drop(self, names: Any) -> None:
        self._client.admin.discard(names)
        moved = self._client.stats()
        others = (set(moved.loaded_bytes) | set(moved.saved_bytes)) - {self._transport}
        if others and not self._is_view:
            raise RuntimeError(f"{self._transport} was to be measured, and bytes went through {', '.join(others)}")

    def close(self) -> None:
        self._client.close()

    def _layers(self, memory: Bytes, blocks: Sequence[Bytes]) -> list[Bytes]:
        """The same memory, layer by layer: a layer has the slices of all blocks."""
        layers: list[Bytes] = np.split(memory[: len(blocks) * self._block_bytes], _LAYERS)
        return layers


def _layout(block_bytes: int) -> Layout:
    """32 MiB is Llama-3-8B in bfloat16: 8 KV heads of 128."""
    half = block_bytes // _LAYERS // _BLOCK_TOKENS // 2  # Bytes of keys, and of values, of one token in one layer.
    head = min(half, 128)
    return Layout(
        f"peers-{block_bytes}", "uint8", layers=_LAYERS, kv_heads=half // head, k_head_dim=head, v_head_dim=head
    )


if __name__ == "__main__":
    main(KVService)
