"""Counts one load, and measures it until its first layer and until its end: for the metrics, and for its trace."""

from __future__ import annotations

import asyncio
import functools
from typing import Any, Literal

from kvservice.blocks import BlockTable, Rows
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store.leases import Lease
from kvservice_api import spans
from kvservice_api.layout import Layout, Shard

InPlacePath = Literal["in_place", "cuda_ipc"]  # Read by the client, or copied to its GPU by the daemon.


class LoadTimes:
    """One load of `rows`, which are those of blocks of a lease. Made when it begins, because then the tiers of the rows
    are known.
    """

    def __init__(
        self,
        blocks: BlockTable,
        lease: Lease,
        of_lease: range,
        rows: Rows,
        clock: Clock,
        counters: Counters,
        path: Literal["stream", "bulk"] | InPlacePath,
    ) -> None:
        self._clock = clock
        self._counters = counters
        counts = blocks.count_by_fastest(rows)
        slowest = max((position for position, count in enumerate(counts) if count), default=0)
        self._labels = path, blocks.tiers[slowest]
        self._began_s = clock.monotonic_s()
        self._has_first_layer = False
        self._trace = spans.current()
        self._blocks, self._lease, self._of_lease = blocks, lease, of_lease
        self._layers_ready, self._layer_began_s = 0, self._began_s

    def first_layer(self) -> None:
        """The first layer of all blocks is verified, in memory. Later calls have no effect."""
        if not self._has_first_layer:
            self._has_first_layer = True
            self._counters.first_layer_times[self._labels].observe(self._clock.monotonic_s() - self._began_s)

    def first_layer_sent(self, sending: asyncio.Future[Any]) -> None:
        """As `first_layer`, called at the end of its sending; not counted if that failed."""
        if not sending.cancelled() and sending.exception() is None:
            self.first_layer()

    def layer_begins(self, layer: int) -> None:
        """This layer is read from now on, and not since the layer before it was ready."""
        if self._trace is not None:
            self._layers_ready, self._layer_began_s = layer, self._clock.monotonic_s()

    def layers_ready(self, count: int) -> None:
        """So many layers of all blocks are in memory. Those that were not before have a span, if the load is traced."""
        if self._trace is None or count == self._layers_ready:
            return
        now_s, layers = self._clock.monotonic_s(), range(self._layers_ready, count)
        tokens = self._blocks.token_count[self._lease.rows[self._of_lease.start : self._of_lease.stop]].sum()
        shard = self._lease.shard
        token_bytes = sum(self._lease.layout.shard_slice_bytes(shard, shard.layer_begin + layer, 1) for layer in layers)
        spans.record(
            "kvservice.store.layers",
            now_s - self._layer_began_s,
            self._trace,
            layer=layers.start,
            layers=len(layers),
            blocks=len(self._of_lease),
            bytes=int(tokens) * token_bytes,
            tier=str(self._labels[1]),
        )
        self._layers_ready, self._layer_began_s = count, now_s

    def ended(self) -> None:
        """The client has all layers."""
        self._counters.load_times[self._labels].observe(self._clock.monotonic_s() - self._began_s)


@functools.lru_cache(maxsize=256)
def bytes_per_token(layout: Layout, shard: Shard) -> int:
    """KV bytes of one token in all layers and heads of the shard."""
    return sum(layout.shard_slice_bytes(shard, layer, 1) for layer in range(shard.layer_begin, shard.layer_end))
