"""Redis or Valkey through redis-py, with hiredis: one `SET` or `GET` per block, on one connection per client.

A `GET` returns a `bytes` object of its own, and is not asked to copy that into the client's memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import redis

from benchmarks.peers.drivers.loop import Bytes, Client, Memory, Servers, System, free_port, main


class Redis(System):
    def start(self, servers: Servers) -> None:
        program = shutil.which("valkey-server") or shutil.which("redis-server")
        if program is None:
            raise FileNotFoundError("neither valkey-server nor redis-server is installed")
        self.port = free_port()
        servers.run(
            [
                *(program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
                *("--maxmemory", str(2 * self.bytes_max + (256 << 20)), "--maxmemory-policy", "allkeys-lru"),
            ],
            port=self.port,
        )

    def client(self, memory: Memory, number: int) -> Client:
        return RedisClient(self.port)


class RedisClient(Client):
    def __init__(self, port: int) -> None:
        self._redis = redis.Redis("127.0.0.1", port)
        self._redis.ping()

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        for name, block in zip(names, blocks, strict=True):
            self._redis.set(name, block.data)

    def get(self, names: Any, blocks: Sequence[Bytes]) -> Sequence[Any]:
        return [self._redis.get(name) for name in names]

    def drop(self, names: Any) -> None:
        self._redis.unlink(*names)


if __name__ == "__main__":
    main(Redis)
