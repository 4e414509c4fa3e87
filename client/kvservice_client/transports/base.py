"""The interface of a transport: it moves the bytes of one load or one save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice_api.errors import KVError
from kvservice_api.image import checksum, layer_starts
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from kvservice_client.buffers import Bytes
from kvservice_client.retry import Deadline


class Durability(StrEnum):
    """When a save is acknowledged."""

    DRAM = "dram"  # The block survives a crash of the daemon, but not of the host.
    SSD = "ssd"  # The block also survives a power cut.


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

    @property
    def block_count(self) -> int:
        return len(self.token_counts)

    @property
    def layer_count(self) -> int:
        return self.shard.layers

    @property
    def size_bytes(self) -> int:
        """Bytes of all layers together."""
        return sum(starts[-1] for starts in self._layer_starts)

    @cached_property
    def _layer_starts(self) -> list[list[int]]:
        return layer_starts(self.layout, self.shard, self.token_counts)

    def block_starts(self, layer: int) -> list[int]:
        """Where each block's slice starts in a layer's buffer, and the buffer's size. Do not change it."""
        return self._layer_starts[layer]

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
    _is_summed: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self._checksums = np.empty((len(self.layers[0]), len(self.layers)), "<u8")
        self._is_summed = [False] * len(self.layers)

    def sum_layer(self, layer: int) -> None:
        """Compute a layer's checksums. Best right before it is sent: the bytes are read once from memory."""
        if not self._is_summed[layer]:
            self._checksums[:, layer] = [checksum(piece.data) for piece in self.layers[layer]]
            self._is_summed[layer] = True

    def checksums(self) -> bytes:
        """Ordered by block, then by layer, as in SaveCommit."""
        for layer in range(len(self.layers)):
            self.sum_layer(layer)
        return self._checksums.tobytes()

    @property
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


class Transport(ABC):
    """One transport. Thread-safe. Errors are KVErrors; no method retries or counts.

    `load` and `save` raise NotShared, NoWriterLock or NotCarried if the next transport must be tried.
    """

    name: ClassVar[str]

    @abstractmethod
    def check_offered(self, deadline: Deadline) -> None:
        """Raises NotShared unless client and daemon both offer this transport. May call the daemon for its
        capabilities.
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
