"""The limit of the disk: `O_DIRECT` writes and reads of a file that has its space already, in pieces of up to 4 MiB."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.peers.drivers.loop import Bytes, Client, Memory, Servers, System, main

_PIECE = 4 << 20


class RawDisk(System):
    """`threads` per client: the most reads or writes that are under way at a time."""

    def start(self, servers: Servers) -> None:
        self.folder = servers.folder

    def client(self, memory: Memory, number: int) -> Client:
        return RawDiskClient(self.folder / f"limit-{number}", len(memory.source), self.options["threads"])


class RawDiskClient(Client):
    def __init__(self, path: Path, size_bytes: int, threads: int) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._file, 0, size_bytes)
        self._threads = ThreadPoolExecutor(threads)

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        self._move(os.pwritev, blocks)
        os.fdatasync(self._file)

    def get(self, names: Any, blocks: Sequence[Bytes]) -> None:
        self._move(os.preadv, blocks)

    def _move(self, call: Callable[[int, list[Any], int], int], blocks: Sequence[Bytes]) -> None:
        size = len(blocks[0])

        def work(block: int, start: int) -> None:
            piece = blocks[block][start : start + _PIECE]
            if call(self._file, [piece.data], block * size + start) != len(piece):
                raise OSError("a read or write of the disk's limit was cut short")

        moved = [
            self._threads.submit(work, block, start) for block in range(len(blocks)) for start in range(0, size, _PIECE)
        ]
        for each in moved:
            each.result()


if __name__ == "__main__":
    main(RawDisk)
