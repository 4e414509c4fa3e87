"""What a transport does: move the bytes of one load or one save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kvservice_api.image import checksum, layer_starts
from kvservice_api.layout import Layout, Shard
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client.buffers import Bytes
from kvservice_client.retry import Deadline

if TYPE_CHECKING:
    from kvservice_client.transports.in_place import View

Verify = Literal["once", "always"]
VERIFY: tuple[Verify, ...] = ("once", "always")


@dataclass(frozen=True)
class LoadOrder:
    """Blocks to load, and where their bytes go: one buffer a layer, block after block."""

    client_id: bytes
    lease_id: int
    first_block: int
    into: Sequence[Bytes] | None  # None: a new buffer a layer.
    layout: Layout
    shard: Shard  # What was looked up.
    token_counts: Sequence[int]  # Of each block.
    usable_until_s: Callable[[], float]  # Monotonic: how long bytes in place may be used under the lease.
    first_layer: int = 0  # Those before it are there already.

    @property
    def block_count(self) -> int:
        return len(self.token_counts)

    @property
    def layer_count(self) -> int:
        return self.shard.layers

    @property
    def size_bytes(self) -> int:
        """Of all layers together."""
        return sum(starts[-1] for starts in self._layer_starts)

    @cached_property
    def _layer_starts(self) -> list[list[int]]:
        return layer_starts(self.layout, self.shard, self.token_counts)

    def block_starts(self, layer: int) -> list[int]:
        """Where each block's slice starts in a layer's buffer, and the buffer's size. Do not change it."""
        return self._layer_starts[layer]

    def buffer(self, layer: int) -> Bytes:
        return self.into[layer] if self.into is not None else np.empty(self.block_starts(layer)[-1], np.uint8)


@dataclass(frozen=True)
class SaveOrder:
    """Blocks to save: for each layer, the slice of each block. Checksums are computed once, on the way."""

    header: pb.SaveHeader
    layers: Sequence[Sequence[Bytes]]
    max_frame_bytes: int
    layout: Layout
    shard: Shard
    token_counts: Sequence[int]  # Of each block.
    _checksums: NDArray[np.uint64] = field(init=False)
    _is_summed: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_checksums", np.empty((len(self.layers[0]), len(self.layers)), "<u8"))
        object.__setattr__(self, "_is_summed", [False] * len(self.layers))

    def sum_layer(self, layer: int) -> None:
        """Compute a layer's checksums. Best right before it is sent: the bytes are read once from memory."""
        if not self._is_summed[layer]:
            self._checksums[:, layer] = [checksum(piece.data) for piece in self.layers[layer]]
            self._is_summed[layer] = True

    def checksums(self) -> bytes:
        """Block by block, and in each by layer, as SaveCommit wants them."""
        for layer in range(len(self.layers)):
            self.sum_layer(layer)
        return self._checksums.tobytes()


class Transport(Protocol):
    """Thread-safe. Errors are KVErrors; no method tries again."""

    name: str

    def load(self, order: LoadOrder, deadline: Deadline) -> Iterator[Bytes]:
        """Each layer's buffer, in order, as soon as its last byte is there. Leaving the iterator ends the load."""

    def view(self, order: LoadOrder, deadline: Deadline, verify: Verify) -> View:
        """The blocks where they lie, without a copy. Raises NotShared where this transport moves bytes.

        "once": bytes are verified that were not since the daemon's start. "always": the view verifies each slice
        before it gives it out.
        """

    def save(self, order: SaveOrder, deadline: Deadline) -> pb.SaveBlocksResponse:
        """Send everything and commit. The buffers may change once this has returned."""
