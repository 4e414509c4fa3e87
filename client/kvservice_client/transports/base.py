"""The interface of a transport: it moves the bytes of one load or one save."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice_api.cached_property import cached_property
from kvservice_api.errors import BulkUnavailable, KVError, NotShared, NoWriterLock, TransferEnded
from kvservice_api.image import checksum, layer_starts
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client.buffers import Bytes
from kvservice_client.retry import Deadline


class Durability(StrEnum):
    """When a save is acknowledged."""

    DRAM = "dram"  # The block survives a crash of the daemon, but not of the host.
    SSD = "ssd"  # The block also survives a power cut.


@dataclass(frozen=True, slots=True)
class KnownPlaces:
    """Where the daemon had the blocks of an order in its memory when it granted the lease: no call is needed."""

    located: pb.LocateBlocksResponse  # One entry per block of the order.
    are_verified: bool  # Whether the daemon has verified the blocks since its start.
    note_load: Callable[[float], None]  # Takes the seconds of a load from there, 0 for a view.


class OfferedLoad:
    """A load of all of a lease that the daemon has offered on its bulk port with the lease. Thread-safe.

    No call opens it, as long as its tickets are valid.
    """

    def __init__(self, offer: pb.OpenTransferResponse, asked_at_s: float) -> None:
        """`asked_at_s` is when the request was sent, by the client's clock."""
        self._tickets = list(offer.tickets)
        self._end_s = asked_at_s + offer.ttl_ms / 1e3
        self._lock = threading.Lock()

    def take(self, now_s: float) -> list[bytes]:
        """The tickets, one for each connection; none if they were taken, or if their time is over."""
        with self._lock:
            tickets, self._tickets = self._tickets, []
        return tickets if now_s < self._end_s else []


@dataclass(frozen=True)
class LoadOrder:
    """Blocks to load, and the buffers for their bytes: one per layer, block after block."""

    client_id: bytes
    lease_id: int
    first_block: int
    into: Sequence[Bytes] | None  # None: a new buffer per layer.
    layout: Layout
    shard: Shard  # The shard of the lookup.
    token_counts: Sequence[int]  # Per block.
    is_usable: Callable[[], bool]  # Whether bytes in place may still be used under the lease.
    first_layer: int = 0  # Layers before it are loaded already.
    places: KnownPlaces | None = None
    offered: OfferedLoad | None = None  # Of the same blocks.

    @property
    def block_count(self) -> int:
        return len(self.token_counts)

    @property
    def layer_count(self) -> int:
        return self.shard.layers

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all layers together."""
        return sum(starts[-1] for starts in self._layer_starts)

    @cached_property
    def _layer_starts(self) -> list[list[int]]:
        return layer_starts(self.layout, self.shard, self.token_counts)

    def block_starts(self, layer: int) -> list[int]:
        """Where each block's slice starts in a layer's buffer, and the buffer's size. Do not change it."""
        return self._layer_starts[layer]

    def layers_within(self, layer: int, size_bytes: int) -> int:
        """The end of the layers from `layer` on that have at most so many bytes together; at least one."""
        end, left_bytes = layer + 1, size_bytes - self.block_starts(layer)[-1]
        while end < self.layer_count and (left_bytes := left_bytes - self.block_starts(end)[-1]) >= 0:
            end += 1
        return end

    def buffer(self, layer: int) -> Bytes:
        return self.into[layer] if self.into is not None else np.empty(self.block_starts(layer)[-1], np.uint8)


@dataclass
class SaveSet:
    """The blocks of one save: those of its chains, one after the other. At least one chain, and none is empty."""

    client_id: bytes  # Differs per attachment: the same blocks may be sent again.
    chains: Sequence[BlockChain]
    durability: Durability
    layout: Layout
    shard: Shard

    @cached_property
    def token_counts(self) -> list[int]:
        """Of each block."""
        return [count for chain in self.chains for count in chain.token_counts]


@dataclass
class SaveOrder(SaveSet):
    """Blocks to save: for each layer, the slice of each block. Checksums are computed once, while a layer is sent."""

    layers: Sequence[Sequence[Bytes]]
    max_frame_bytes: int
    _checksums: NDArray[np.uint64] = field(init=False)
    _is_summed: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self._checksums = np.empty((len(self.layers[0]), len(self.layers)), "<u8")
        self._is_summed = np.zeros(self._checksums.shape, bool)

    def sum_slice(self, layer: int, block: int) -> None:
        """Compute a slice's checksum. Best right before it is sent: the bytes are read once from memory."""
        if not self._is_summed[block, layer]:
            self._checksums[block, layer] = checksum(self.layers[layer][block].data)
            self._is_summed[block, layer] = True

    def keep_checksums(self, slices: Sequence[tuple[int, int]], found: Sequence[int]) -> None:
        """Those of slices, by layer and block, computed by the transport."""
        layers, blocks = np.array(slices).T
        self._checksums[blocks, layers] = found
        self._is_summed[blocks, layers] = True

    def checksums(self, blocks: Sequence[int] | None = None) -> bytes:
        """Ordered by block, then by layer, as in SaveCommit. Only of some blocks: all of their slices have one."""
        if blocks is not None:
            return self._checksums[blocks].tobytes()
        for layer, slices in enumerate(self.layers):
            for block in range(len(slices)):
                self.sum_slice(layer, block)
        return self._checksums.tobytes()

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all slices together."""
        return sum(piece.size for layer in self.layers for piece in layer)


@dataclass(frozen=True, slots=True)
class SaveResult:
    """The outcome of a save, per block. Counts, except for `refused`: (position in the chain, reason)."""

    stored: int
    already_stored: int
    refused: list[tuple[int, KVError]]

    @property
    def is_complete(self) -> bool:
        return not self.refused


class NotCarried(Exception):
    """A transport cannot carry an order, or not all of it: the next transport carries the rest."""


class OfferRefused(NotCarried):
    """The daemon does not know the tickets of an offered load any more. The same transport carries it without them."""


class Mismatch(NotCarried):
    """Bytes that the client has read are not those that were stored. The next transport makes the daemon verify them,
    and drop the block if it has lost them.
    """


NOT_OFFERED = (NotShared, BulkUnavailable)
TRY_NEXT = (*NOT_OFFERED, NoWriterLock, TransferEnded, NotCarried)


class Transport(ABC):
    """One transport. Thread-safe. Errors are KVErrors; no method retries or counts.

    `load` and `save` raise an error of `TRY_NEXT` if the next transport must be tried.
    """

    name: ClassVar[str]
    bytes_min: int = 0  # Smaller orders are faster by the next transport. 0 where this one is demanded by name.

    @abstractmethod
    def check_offered(self, deadline: Deadline) -> None:
        """Raises an error of `NOT_OFFERED` unless client and daemon both offer this transport. May call the daemon for
        its capabilities.
        """

    @abstractmethod
    def load(self, order: LoadOrder, deadline: Deadline) -> Generator[Bytes, None, None]:
        """Each layer's buffer, in order, as soon as its last byte has arrived. Closing the generator ends the load."""

    @abstractmethod
    def save(self, order: SaveOrder, deadline: Deadline) -> tuple[list[SaveResult], int]:
        """Send the blocks that are not stored yet, and commit. Returns the result of each chain, and the payload bytes
        sent.

        The buffers may change once this has returned.
        """

    @abstractmethod
    def close(self) -> None:
        """Release resources that are shared by orders. No order begins after this."""
