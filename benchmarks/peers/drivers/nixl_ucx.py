"""NIXL's UCX backend over TCP. It moves bytes and stores none: blocks have places in another process's memory.

So it has neither keys nor a lookup, which makes its part the easiest. The transfers are prepared before they are timed.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from typing import Any

os.environ["UCX_TLS"] = "tcp"  # Read when the library is loaded. Otherwise UCX takes shared memory on one host.
os.environ["UCX_NET_DEVICES"] = "lo"

from nixl._api import nixl_agent, nixl_agent_config

from benchmarks.leftovers import end_with_parent
from benchmarks.peers.drivers.loop import Bytes, Client, Memory, System, main


class Ucx(System):
    def client(self, memory: Memory, number: int) -> Client:
        return UcxClient(memory, number)


class UcxClient(Client):
    """With a process of its own that has as much memory as it: what a server would be is not NIXL's part."""

    def __init__(self, memory: Memory, number: int) -> None:
        forked = multiprocessing.get_context("fork")
        pipe, theirs = forked.Pipe()
        store = forked.Process(target=_keep, args=(len(memory.source), number, theirs))
        store.start()
        theirs.close()
        self._agent = nixl_agent(f"client-{number}", nixl_agent_config(backends=["UCX"]))
        for buffer in (memory.source, memory.target):
            self._agent.register_memory([(buffer.ctypes.data, len(buffer), 0, "")], "DRAM")
        pipe.send(self._agent.get_agent_metadata())
        metadata, self._address = pipe.recv()
        self._store = self._agent.add_remote_agent(metadata)
        self._pipe = pipe
        self._memory = memory

    def names(self, turn: str, block_bytes: int, blocks: int) -> Any:
        """The prepared transfers of the put and the get."""
        return [
            self._agent.initialize_xfer(
                operation,
                self._agent.get_xfer_descs(_places(memory.ctypes.data, block_bytes, blocks), "DRAM"),
                self._agent.get_xfer_descs(_places(self._address, block_bytes, blocks), "DRAM"),
                self._store,
            )
            for operation, memory in (("WRITE", self._memory.source), ("READ", self._memory.target))
        ]

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        run(self._agent, names[0])

    def get(self, names: Any, blocks: Sequence[Bytes]) -> None:
        run(self._agent, names[1])

    def drop(self, names: Any) -> None:
        for transfer in names:
            self._agent.release_xfer_handle(transfer)


def run(agent: Any, transfer: Any) -> None:
    state = agent.transfer(transfer)
    while state == "PROC":
        time.sleep(0.0002)  # Rarely: the agent's own thread moves the bytes, on the same cores.
        state = agent.check_xfer_state(transfer)
    if state != "DONE":
        raise RuntimeError(f"NIXL's transfer ended in state {state}")


def _places(address: int, block_bytes: int, blocks: int) -> list[tuple[int, int, int]]:
    return [(address + block * block_bytes, block_bytes, 0) for block in range(blocks)]


def _keep(size_bytes: int, number: int, pipe: Any) -> None:
    end_with_parent()
    memory = Memory.of(size_bytes).source
    agent = nixl_agent(f"store-{number}", nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(memory.ctypes.data, len(memory), 0, "")], "DRAM")
    agent.add_remote_agent(pipe.recv())
    pipe.send((agent.get_agent_metadata(), memory.ctypes.data))
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main(Ucx)
