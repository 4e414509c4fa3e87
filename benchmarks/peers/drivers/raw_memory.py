"""The limit on one host: `np.copyto` from the client's memory to other memory of the process, and back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers.drivers.loop import Bytes, Client, Memory, System, main

_PIECE = 256 << 10


class RawMemory(System):
    """`threads` per client: each copies an equal share of the bytes."""

    def client(self, memory: Memory, number: int) -> Client:
        return RawMemoryClient(self.options["threads"], np.ones(len(memory.source), np.uint8))


class RawMemoryClient(Client):
    def __init__(self, threads: int, kept: Bytes) -> None:
        self._threads = threads
        self._kept = kept

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        self._copy([(mine, block) for block, mine in self._pairs(blocks)])

    def get(self, names: Any, blocks: Sequence[Bytes]) -> None:
        self._copy(self._pairs(blocks))

    def _pairs(self, blocks: Sequence[Bytes]) -> list[tuple[Bytes, Bytes]]:
        """Each block, and where it is kept."""
        size = len(blocks[0])
        return [(block, self._kept[at * size : (at + 1) * size]) for at, block in enumerate(blocks)]

    def _copy(self, pairs: Sequence[tuple[Bytes, Bytes]]) -> None:
        def work(number: int) -> None:
            for into, data in pairs:
                for start in range(number * _PIECE, len(data), self._threads * _PIECE):
                    np.copyto(into[start : start + _PIECE], data[start : start + _PIECE])

        others = [threading.Thread(target=work, args=(number,)) for number in range(1, self._threads)]
        for other in others:
            other.start()
        work(0)
        for other in others:
            other.join()


if __name__ == "__main__":
    main(RawMemory)
