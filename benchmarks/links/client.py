"""The host that loads and saves: measures plain connections and the client library, in rotated order.

Run as a module with `Orders` as JSON: prints `Measured` as JSON.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.client.wire import LAYOUT, layer_sizes, random_bytes
from benchmarks.links import raw_tcp
from kvservice_api.keys import BlockChain, block_chain
from kvservice_client import Client

Measured = dict[str, dict[str, float]]
"""By way, such as ``bulk load``: `gbit_per_s`, and for ours `cpu_s_per_gb` of both hosts together."""

_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Orders:
    """What to measure. `peer` is the port of `raw_tcp` on the daemon's host, `pid` the daemon's."""

    address: str
    peer: int
    pid: int
    transports: list[str]
    connections: list[int]  # Of the plain transfers.
    blocks: int  # Of 32 MiB each, in each transfer.
    rounds: int


class _Ours:
    """Loads and saves of the same blocks, by one transport."""

    def __init__(self, orders: Orders, transport: str) -> None:
        self._client = Client(orders.address, name="links", transport=transport, timeout_s=_TIMEOUT_S)  # type: ignore[arg-type]
        self._cache = self._client.open_layout(LAYOUT)
        self._blocks = orders.blocks
        sizes = layer_sizes(LAYOUT, orders.blocks)
        self._layers = [random_bytes(size) for size in sizes]
        self._into = [np.ones(size, np.uint8) for size in sizes]
        self._turn = 0
        self._transport = transport
        self._loaded = self._stored()

    def load(self) -> None:
        with self._cache.lookup(self._loaded) as lease:
            assert lease.hit_blocks == self._blocks
            for _ in lease.load(into=self._into, timeout_s=_TIMEOUT_S):
                pass

    def save(self) -> Callable[[], object]:
        """Returns what is to be done after it, and is not part of it."""
        chain = self._stored()
        return lambda: self._client.admin.discard(chain)

    def close(self) -> None:
        self._client.admin.discard(self._loaded)
        self._client.close()

    def check(self) -> None:
        """Raises AssertionError if wrong bytes were loaded, or another transport carried them."""
        assert all(np.array_equal(*both) for both in zip(self._layers, self._into, strict=True))
        stats = self._client.stats()
        for moved in (stats.loaded_bytes, stats.saved_bytes):
            assert {name for name, count in moved.items() if count} == {self._transport}, moved

    def _stored(self) -> BlockChain:
        self._turn += 1
        tokens = np.arange(self._blocks * LAYOUT.block_tokens) + self._turn
        chain = block_chain(LAYOUT, tokens, salt=self._transport.encode())
        result = self._cache.save(chain, self._layers, timeout_s=_TIMEOUT_S)
        assert result.is_complete and result.stored == len(chain), result
        return chain


def measure(orders: Orders) -> Measured:
    size_bytes = orders.blocks * LAYOUT.block_tokens * LAYOUT.bytes_per_token
    peer = (orders.address.partition(":")[0], orders.peer)
    ways: dict[str, Callable[[], Callable[[], object] | None]] = {}
    ours = [_Ours(orders, transport) for transport in orders.transports]
    for connections in orders.connections:
        for move in (raw_tcp.load, raw_tcp.save):
            ways[f"TCP x {connections} {move.__name__}"] = lambda m=move, c=connections: m(peer, size_bytes, c)  # type: ignore[misc]
    for transport, each in zip(orders.transports, ours, strict=True):
        ways[f"{transport} load"], ways[f"{transport} save"] = each.load, each.save
    rates: dict[str, list[float]] = {way: [] for way in ways}
    cpu_s = dict.fromkeys(ways, 0.0)
    names = list(ways)
    for number in range(orders.rounds):
        at = number * len(names) // orders.rounds
        for way in [*names[at:], *names[:at]]:
            cpu_before, begin_s = _cpu_s(orders.pid), time.perf_counter()
            after = ways[way]()
            seconds = time.perf_counter() - begin_s
            rates[way].append(size_bytes * 8 / seconds / 1e9)
            cpu_s[way] += _cpu_s(orders.pid) - cpu_before
            if after is not None:
                after()
    for each in ours:
        each.check()
        each.close()
    found: Measured = {way: {"gbit_per_s": median(rates[way])} for way in ways}
    for name in orders.transports:
        for way in (f"{name} load", f"{name} save"):
            found[way]["cpu_s_per_gb"] = cpu_s[way] / (orders.rounds * size_bytes / 1e9)
    return found


def round_trip_ms(orders: Orders) -> float:
    """The median of connecting, which is one round trip."""
    times = []
    for _ in range(21):
        begin_s = time.perf_counter()
        socket.create_connection((orders.address.partition(":")[0], orders.peer)).close()
        times.append(time.perf_counter() - begin_s)
    return median(times) * 1e3


def _cpu_s(pid: int) -> float:
    """CPU seconds of this process and of the daemon, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / 100


def command(orders: Orders) -> list[str]:
    return [sys.executable, "-m", __spec__.name, json.dumps(asdict(orders))]


def main() -> None:
    orders = Orders(**json.loads(sys.argv[1]))
    found: dict[str, Any] = {"round_trip_ms": round_trip_ms(orders), "ways": measure(orders)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
