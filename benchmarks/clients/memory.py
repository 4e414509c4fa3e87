"""The daemon's memory beside its arena, for sizing a container: ``python -m benchmarks.clients.memory``.

Clients save and load blocks of 32 MiB at one time, over `grpc` and over `bulk`, each kind with a daemon of its own,
without SSD. After each number of clients the table has the highest value since the start. Takes a minute.
"""

from __future__ import annotations

import argparse
import re
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks import leftovers
from benchmarks.client import parts
from benchmarks.client.wire import LAYOUT, layer_sizes, random_bytes, until_allocated
from benchmarks.report import markdown_table, where_and_when
from kvservice_api.keys import block_chain
from kvservice_client import Client

Transport = Literal["grpc", "bulk"]
TRANSPORTS: tuple[Transport, ...] = ("grpc", "bulk")
CLIENTS = (1, 8, 32)
_TURNS = 3  # Of each client: a save, then a load of what it saved.
_BLOCK_BYTES = LAYOUT.block_tokens * LAYOUT.bytes_per_token
_DRAM_BYTES = (_TURNS * max(CLIENTS) + 8) * _BLOCK_BYTES // 2  # The blocks of earlier turns are evicted.
_LOOK_EVERY_S = 0.01


class Observed:
    """The highest value of a process's memory while the block runs, in MiB."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory")
        self.highest_mib = self.now_mib()

    def now_mib(self, kind: str = "RssAnon") -> float:
        """`RssAnon`: what it has allocated. `RssFile`: programs and libraries. Neither has the arena."""
        found = re.search(rf"{kind}:\s+(\d+) kB", self._status.read_text())
        assert found is not None
        return int(found[1]) / 1024

    def __enter__(self) -> Observed:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self.highest_mib = max(self.highest_mib, self.now_mib())


def work(client: Client, number: int, layers: list[np.ndarray[tuple[int], np.dtype[np.uint8]]]) -> None:
    """Save blocks and load each of them again."""
    blocks = client.open_layout(LAYOUT)
    for turn in range(_TURNS):
        chain = block_chain(LAYOUT, np.full(LAYOUT.block_tokens, number), salt=secrets.token_bytes(16) + bytes([turn]))
        blocks.save(chain, layers)
        with blocks.lookup(chain) as lease:
            for _ in lease.load():
                pass


def measure(transport: Transport) -> list[list[str]]:
    """Rows of the table, for one transport."""
    layers = [random_bytes(size) for size in layer_sizes(LAYOUT, 1)]
    rows = []
    with ExitStack() as stack:
        folder = stack.enter_context(leftovers.own_folder(None))
        daemon = stack.enter_context(parts.daemon(folder, leftovers.SHARED_MEMORY, _DRAM_BYTES, 0))
        clients = [stack.enter_context(Client(daemon.address, transport=transport)) for _ in range(max(CLIENTS))]
        until_allocated(clients[0])
        observed = stack.enter_context(Observed(daemon.pid))
        files_mib = observed.now_mib("RssFile")
        rows.append([transport, "none has moved bytes", f"{observed.highest_mib:.0f}", f"{files_mib:.0f}"])
        threads = stack.enter_context(ThreadPoolExecutor(max(CLIENTS)))
        for count in CLIENTS:
            list(threads.map(lambda number: work(clients[number], number, layers), range(count)))
            rows.append([transport, f"{count} at one time", f"{observed.highest_mib:.0f}", ""])
    return rows


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.clients.memory", description=__doc__).parse_args()
    leftovers.begin(None)
    columns = ["Transport", "Clients", "allocated, MiB", "programs and libraries, MiB"]
    rows = [row for transport in TRANSPORTS for row in measure(transport)]
    print(where_and_when(), *markdown_table(columns, rows), sep="\n")


if __name__ == "__main__":
    main()
