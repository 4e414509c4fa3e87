"""Mooncake Store over TCP: a master, one process that gives its memory, and clients with registered buffers.

A put and a get are one batch call for all blocks of a client, from and into its own memory.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from typing import Any

from mooncake.store import MooncakeDistributedStore

from benchmarks.leftovers import end_with_parent
from benchmarks.peers.drivers.loop import (
    Bytes,
    Client,
    Memory,
    Servers,
    System,
    free_port,
    main,
    program,
)

_BUFFER_BYTES = 64 << 20


class Mooncake(System):
    def start(self, servers: Servers) -> None:
        port, metadata, metrics = free_port(), free_port(), free_port()
        servers.run(
            [
                *(program("mooncake_master"), f"--rpc_port={port}", "--rpc_address=127.0.0.1"),
                *("--enable_http_metadata_server=true", "--http_metadata_server_host=127.0.0.1"),
                *(f"--http_metadata_server_port={metadata}", "--metrics_host=127.0.0.1", f"--metrics_port={metrics}"),
            ],
            port=metadata,
        )
        self.addresses = f"http://127.0.0.1:{metadata}/metadata", f"127.0.0.1:{port}"
        forked = multiprocessing.get_context("fork")
        ready, theirs = forked.Pipe()
        segment_bytes = 2 * self.bytes_max + (256 << 20)
        forked.Process(target=_give_memory, args=(self.addresses, segment_bytes, theirs), daemon=True).start()
        theirs.close()
        ready.recv()

    def client(self, memory: Memory, number: int) -> Client:
        return MooncakeClient(self.addresses, memory)


class MooncakeClient(Client):
    def __init__(self, addresses: tuple[str, str], memory: Memory) -> None:
        self._store = _store(addresses, 0)
        for buffer in (memory.source, memory.target):
            _check(self._store.register_buffer(buffer.ctypes.data, len(buffer)), "register a buffer")

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        for result in self._store.batch_put_from(names, *_places(blocks)):
            _check(result, "put a block")

    def get(self, names: Any, blocks: Sequence[Bytes]) -> None:
        for result in self._store.batch_get_into(names, *_places(blocks)):
            _check(result, "get a block")

    def drop(self, names: Any) -> None:
        for name in names:
            _check(self._store.remove(name, True), "remove a block")


def _places(blocks: Sequence[Bytes]) -> tuple[list[int], list[int]]:
    return [block.ctypes.data for block in blocks], [len(block) for block in blocks]


def _store(addresses: tuple[str, str], segment_bytes: int) -> Any:
    store = MooncakeDistributedStore()
    metadata, master = addresses
    _check(store.setup("127.0.0.1", metadata, segment_bytes, _BUFFER_BYTES, "tcp", "", master), "connect")
    return store


def _give_memory(addresses: tuple[str, str], segment_bytes: int, ready: Any) -> None:
    end_with_parent()
    store = _store(addresses, segment_bytes)
    ready.send(None)
    while store:
        time.sleep(3600)


def _check(result: int, what: str) -> None:
    if result < 0:
        raise RuntimeError(f"Mooncake could not {what}: error {result}")


if __name__ == "__main__":
    main(Mooncake)
