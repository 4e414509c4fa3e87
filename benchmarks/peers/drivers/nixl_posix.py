"""NIXL's POSIX backend: one file per client, opened with `O_DIRECT`. It has neither keys nor a lookup."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nixl._api import nixl_agent, nixl_agent_config

from benchmarks.peers.drivers.loop import Bytes, Client, Memory, Servers, System, main
from benchmarks.peers.drivers.nixl_ucx import run


class Posix(System):
    def start(self, servers: Servers) -> None:
        self.folder = servers.folder

    def client(self, memory: Memory, number: int) -> Client:
        return PosixClient(memory, number, self.folder / f"nixl-{number}")


class PosixClient(Client):
    def __init__(self, memory: Memory, number: int, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._file, 0, len(memory.source))
        self._agent = nixl_agent(f"client-{number}", nixl_agent_config(backends=["POSIX"]))
        for buffer in (memory.source, memory.target):
            self._agent.register_memory([(buffer.ctypes.data, len(buffer), 0, "")], "DRAM")
        self._agent.register_memory([(0, len(memory.source), self._file, "")], "FILE")
        self._memory = memory

    def names(self, turn: str, block_bytes: int, blocks: int) -> Any:
        """The prepared transfers of the put and the get."""
        places = range(0, blocks * block_bytes, block_bytes)
        file = self._agent.get_xfer_descs([(place, block_bytes, self._file) for place in places], "FILE")
        return [
            self._agent.initialize_xfer(
                operation,
                self._agent.get_xfer_descs([(memory.ctypes.data + place, block_bytes, 0) for place in places], "DRAM"),
                file,
                self._agent.name,
            )
            for operation, memory in (("WRITE", self._memory.source), ("READ", self._memory.target))
        ]

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        run(self._agent, names[0])
        os.fdatasync(self._file)

    def get(self, names: Any, blocks: Sequence[Bytes]) -> None:
        run(self._agent, names[1])

    def drop(self, names: Any) -> None:
        for transfer in names:
            self._agent.release_xfer_handle(transfer)


if __name__ == "__main__":
    main(Posix)
