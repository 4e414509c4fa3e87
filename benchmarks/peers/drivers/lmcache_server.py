"""LMCache's server for `lm://`, through its own connector: one message per block, on one connection per client.

The connector does not wait for an answer to a put. So a put of the benchmark ends with the answer to a question for the
last block, which the server reads after the blocks. The server deletes nothing, so all turns use the same keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.storage_backend.connector.lm_connector import LMCServerConnector

from benchmarks.peers.drivers.lmcache_local import cpu_backend, keys_of
from benchmarks.peers.drivers.loop import Bytes, Client, Memory, Servers, System, free_port, main, program


class Server(System):
    def start(self, servers: Servers) -> None:
        self.port = free_port()
        environment = {"LMCACHE_TRACK_USAGE": "false"}
        servers.run([program("lmcache_server"), "127.0.0.1", str(self.port), "cpu"], port=self.port, env=environment)

    def client(self, memory: Memory, number: int) -> Client:
        return ServerClient(self.port, 2 * len(memory.source), number)


class ServerClient(Client):
    def __init__(self, port: int, size_bytes: int, number: int) -> None:
        self._number = number
        self._loop = asyncio.new_event_loop()
        self._connector = LMCServerConnector("127.0.0.1", port, self._loop, cpu_backend(size_bytes))
        self._held: list[Any] = []

    def names(self, turn: str, block_bytes: int, blocks: int) -> Any:
        return keys_of([f"{self._number}-{block}" for block in range(blocks)])

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        async def put() -> None:
            for key, block in zip(names, blocks, strict=True):
                await self._connector.put(key, _in_place(block))
            if not await self._connector.exists(names[-1]):
                raise RuntimeError("LMCache's server does not have the last block")

        self._loop.run_until_complete(put())

    def get(self, names: Any, blocks: Sequence[Bytes]) -> Sequence[Any]:
        async def get() -> list[Any]:
            return [await self._connector.get(key) for key in names]

        self._held = self._loop.run_until_complete(get())
        if None in self._held:
            raise RuntimeError("LMCache's server does not have all blocks")
        return [held.byte_array for held in self._held]

    def drop(self, names: Any) -> None:
        for held in self._held:
            held.ref_count_down()
        self._held = []


def _in_place(block: Bytes) -> TensorMemoryObj:
    """The client's own memory as one of LMCache's objects: nothing is copied."""
    shape = torch.Size([1, 1, 1, len(block)])
    about = MemoryObjMetadata(shape, torch.uint8, 0, len(block), 1, fmt=MemoryFormat.KV_2LTD)
    return TensorMemoryObj(torch.from_numpy(block), about, None)


if __name__ == "__main__":
    main(Server)
