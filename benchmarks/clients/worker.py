"""A process with some clients, one thread each, which load the same blocks again and again.

Run as a module with `Work` as JSON: prints a line once all clients are ready, begins at a line of its standard input,
and prints `Done` as JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvservice_client import BlockChain, Client, Layout, block_chain

# A megabyte per block, in four layers.
LAYOUT = Layout("clients", "uint8", layers=4, kv_heads=8, k_head_dim=128, v_head_dim=128, block_tokens=128)
BLOCK_BYTES = 1 << 20
_TIMEOUT_S = 60.0
_PERIOD = 1048583  # A prime, so that slices begin at different places of it.
_SHIFT = 4099
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Work:
    address: str
    transport: str
    clients: int
    blocks: int  # In each load.
    seconds: float  # After which no load begins.
    loads: int | None = None  # So many of each client, the first included, which is not repeated to warm up.
    until_told: bool = False  # No load begins once standard input has ended.


@dataclass(frozen=True, slots=True)
class Done:
    loads_s: list[float]  # The time of each load, its lookup included.
    begins_s: list[float]  # When each began.
    begin_s: float  # By the monotonic clock of this host.
    end_s: float
    cpu_s: float  # Of this process meanwhile.


def chain_of(blocks: int) -> BlockChain:
    return block_chain(LAYOUT, np.arange(blocks * LAYOUT.block_tokens), salt=str(blocks).encode())


def layers_of(blocks: int) -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    """The bytes of `chain_of`, by layer: views of one array, no two slices the same."""
    size = blocks * BLOCK_BYTES // LAYOUT.layers
    several = np.resize(_period(blocks), size + LAYOUT.layers * _SHIFT)
    return [several[layer * _SHIFT : layer * _SHIFT + size] for layer in range(LAYOUT.layers)]


def are_right(blocks: int, layers: Sequence[np.ndarray[Any, np.dtype[np.uint8]]]) -> bool:
    """Whether these are `layers_of`, without another copy of them."""
    for layer, data in enumerate(layers):
        expected = np.roll(_period(blocks), -layer * _SHIFT)
        for at in range(0, len(data), _PERIOD):
            part = data[at : at + _PERIOD]
            if not np.array_equal(part, expected[: len(part)]):
                return False
    return True


def _period(blocks: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(blocks).integers(0, 256, _PERIOD, np.uint8)


class OneClient:
    def __init__(self, work: Work, number: int) -> None:
        self._client = Client(work.address, name=f"c{number}", transport=work.transport, timeout_s=_TIMEOUT_S)  # type: ignore[arg-type]
        self._cache = self._client.open_layout(LAYOUT)
        self._chain = chain_of(work.blocks)
        self._into = [np.ones(work.blocks * BLOCK_BYTES // LAYOUT.layers, np.uint8) for _ in range(LAYOUT.layers)]
        self._work = work
        self.loads_s: list[float] = []
        self.begins_s: list[float] = []
        self.failed: BaseException | None = None

    def load(self) -> None:
        with self._cache.lookup(self._chain) as lease:
            assert lease.hit_blocks == self._work.blocks
            for _ in lease.load(into=self._into, timeout_s=_TIMEOUT_S):
                pass

    def spoil(self) -> None:
        """Until the next load a byte of each page is wrong: right bytes could be those of an earlier load otherwise."""
        for each in self._into:
            each[::_PAGE_BYTES] ^= 0xFF

    def check(self) -> None:
        """Raises AssertionError for wrong bytes, and for an order that another transport carried."""
        assert are_right(self._work.blocks, self._into)
        moved = {name for name, count in self._client.stats().loaded_bytes.items() if count}
        assert moved == {self._work.transport}, moved

    def run(self, end_s: float, told: threading.Event) -> None:
        try:
            while not self.loads_s or (time.monotonic() < end_s and not told.is_set()):
                self.spoil()
                begin_s = time.monotonic()
                self.load()
                self.loads_s.append(time.monotonic() - begin_s)
                self.begins_s.append(begin_s)
                if len(self.loads_s) == self._work.loads:
                    break
            self.check()
        except BaseException as error:
            self.failed = error

    def close(self) -> None:
        self._client.close()


def main() -> None:
    work = Work(**json.loads(sys.argv[1]))
    clients = [OneClient(work, number) for number in range(work.clients)]
    if work.loads is None:
        for client in clients:
            client.load()
    print("ready", flush=True)
    sys.stdin.readline()
    begin_s, cpu_before, told = time.monotonic(), time.process_time(), threading.Event()
    threads = [threading.Thread(target=client.run, args=(begin_s + work.seconds, told)) for client in clients]
    for thread in threads:
        thread.start()
    if work.until_told:
        sys.stdin.read()
        told.set()
    for thread in threads:
        thread.join()
    end_s, cpu_s = time.monotonic(), time.process_time() - cpu_before
    for client in clients:
        if client.failed is not None:
            raise client.failed
        client.close()
    loads_s = [each for client in clients for each in client.loads_s]
    begins_s = [each for client in clients for each in client.begins_s]
    print(json.dumps(asdict(Done(loads_s, begins_s, begin_s, end_s, cpu_s))))


if __name__ == "__main__":
    main()
