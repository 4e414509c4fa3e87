"""Leased blocks in their place in the arena: their slices, their checksums, and the fence that detects reuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NoReturn, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvservice_api import spans
from kvservice_api.errors import ChecksumMismatch, InvalidFrame, InvalidRequest, KVError, LeaseExpired, NotShared
from kvservice_api.image import BlockGeometry, Trailer, block_geometry, checksum
from kvservice_api.layout import Shard
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client.arena_map import ArenaMap
from kvservice_client.buffers import Bytes
from kvservice_client.channel import Answers
from kvservice_client.retry import TransferDeadline
from kvservice_client.transports.base import LoadOrder, NotCarried

_SHARD_BYTES = 8

Verify = Literal["once", "always"]
VERIFY: tuple[Verify, ...] = ("once", "always")


class InPlaceMismatch(NotCarried):
    """Bytes in place are not the stored ones. The next transport loads them, so that the daemon verifies them."""


class InPlace:
    """The blocks of a load order, in place. A context manager: after leaving it, the daemon may move the blocks.

    Bytes that were read in place count only after a later `check` that did not raise.
    """

    def __init__(self, arena: ArenaMap, order: LoadOrder, answers: Answers[pb.LocateBlocksResponse]) -> None:
        """`answers` are those of LocateBlocks. Raises NotShared if the blocks are not in this arena."""
        self._answers = answers
        first = next(answers, None)
        if first is None:
            raise InvalidFrame("the daemon ended the call without an answer")
        if first.not_in_place_because:
            raise NotShared(first.not_in_place_because)
        if first.arena_id != arena.arena_id:
            raise NotShared("the daemon has replaced its arena")
        self._arena = arena
        self._order = order
        self._offsets: NDArray[np.int64] = np.array(first.offsets, np.int64)
        self._generations: NDArray[np.uint32] = np.array(first.generations, np.uint32)
        self._trailer_checksums = list(first.trailer_checksums)
        self._trailers: dict[int, Trailer] = {}
        self._shards = [Shard.decode(data) for data in _pieces(first.shards, _SHARD_BYTES)]
        self._geometries = self._checked(list(first.token_counts))
        self.layers_ready = first.layers_ready

    def _checked(self, token_counts: list[int]) -> list[BlockGeometry]:
        """The blocks' geometries. Raises InvalidFrame if the answer does not fit the request."""
        order, count = self._order, self._order.block_count
        columns = (self._offsets, self._generations, self._trailer_checksums, self._shards)
        if token_counts != list(order.token_counts) or any(len(column) != count for column in columns):
            raise InvalidFrame("the daemon located other blocks than those that were requested")
        if not all(shard.covers(order.shard) for shard in self._shards):
            raise InvalidFrame("the daemon located blocks that lack a part of the request")
        found = [
            block_geometry(order.layout, shard, tokens)
            for shard, tokens in zip(self._shards, token_counts, strict=True)
        ]
        ends = self._offsets + [geometry.image_bytes for geometry in found]
        if (self._offsets < 0).any() or (ends > len(self._arena.data)).any():
            raise InvalidFrame("the daemon located blocks outside the arena")
        return found

    @property
    def first_block(self) -> int:
        """The position of the first block in the lease."""
        return self._order.first_block

    @property
    def block_count(self) -> int:
        return self._order.block_count

    @property
    def layer_count(self) -> int:
        return self._order.layer_count

    def wait_for_layer(self, layer: int) -> None:
        """Wait until the layer of every block is in place. Raises the error if it will not be."""
        while self.layers_ready <= layer:
            answer = next(self._answers, None)
            if answer is None:
                raise InvalidFrame("the daemon ended the call before all layers had arrived")
            self.layers_ready = answer.layers_ready

    def slice(self, block: int, layer: int) -> Bytes:
        """One stored slice, with all heads. `layer` counts from the first requested one."""
        slices = self._geometries[block].slices
        begin, end, *_ = slices[layer + self._order.shard.layer_begin - self._shards[block].layer_begin]
        offset = int(self._offsets[block])
        return self._arena.data[offset + begin : offset + end]

    def runs(self, block: int, layer: int) -> list[tuple[int, int]] | None:
        """The requested bytes of one slice: keys, then values. None if all bytes are requested."""
        if self._shards[block].heads == self._order.shard.heads:
            return None  # It covers the requested range, so it is the same range.
        model_layer = layer + self._order.shard.layer_begin
        stored = self._geometries[block].slices[model_layer - self._shards[block].layer_begin]
        wanted = self._order.layout.heads_of(self._order.shard, model_layer)
        if (stored.head_begin, stored.head_end) == wanted:
            return None
        return list(stored.head_runs(*wanted))

    def expected(self, block: int, layer: int) -> int:
        """The slice's checksum. Raises InPlaceMismatch if the block's trailer is not the stored one."""
        trailer = self._trailers.get(block)
        if trailer is None:
            trailer = self._trailers[block] = self._read_trailer(block)
        return int(trailer.checksums[layer + self._order.shard.layer_begin - self._shards[block].layer_begin])

    def _read_trailer(self, block: int) -> Trailer:
        geometry, offset = self._geometries[block], int(self._offsets[block])
        data = self._arena.data[offset + geometry.trailer_offset : offset + geometry.image_bytes].tobytes()
        if checksum(data) != self._trailer_checksums[block]:
            raise InPlaceMismatch(f"the trailer of block {block} is not the one that was stored")
        trailer = Trailer.decode(data)
        if trailer.shard != self._shards[block]:
            raise InPlaceMismatch(f"the trailer of block {block} is not the one that was stored")
        return trailer

    @property
    def are_replaced(self) -> bool:
        """Whether the daemon has moved or evicted blocks, which it does only after it has ended the call."""
        return bool((self._arena.generations(self._offsets) != self._generations).any())

    def check(self) -> None:
        """Call it after the last use of the bytes. Raises LeaseExpired if they may have been replaced."""
        if self.are_replaced:
            raise LeaseExpired("blocks were moved or evicted while they were read: look the prefix up again")
        if not self._order.is_usable():
            raise LeaseExpired("the lease is about to end: bytes in place are not used any more")

    def close(self) -> None:
        """End the call, which ends the daemon's hold on the blocks."""
        self._answers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class View:
    """Leased blocks in place, without a copy. A context manager: leaving it checks a last time.

    By default a view trusts bytes that were verified once since the daemon's start, and does not detect later damage
    to the memory. A view with ``verify="always"`` verifies each slice when `slices` first returns it.

    It is for one thread at a time; `Lease.cancel` may be called from another one.
    Do not use its arrays after `check` has raised, after leaving the view, or when the lease's time is nearly over.
    Results that were computed from them are valid only after a `check` that did not raise.
    """

    def __init__(
        self,
        blocks: InPlace,
        deadline: TransferDeadline,
        have_verified: Callable[[int, int], None] | None = None,
    ) -> None:
        """The deadline is for the waits for layers that are not in place yet.

        With `have_verified` (block, layer) the view verifies the slices that it returns, and calls it for a slice whose
        checksum does not match: the daemon then verifies the slice, and drops the block.
        """
        self._blocks = blocks
        self._deadline = deadline
        self._have_verified = have_verified
        self._verified_layers: set[int] = set()
        self._is_open = True
        self.span: spans.OpenSpan | None = None  # Of its use, until it is left; None if the request is not traced.

    @property
    def block_count(self) -> int:
        return self._blocks.block_count

    def slices(self, layer: int) -> list[tuple[Bytes, ...]]:
        """For each block the bytes of one layer, read-only: one array `[K, V][head][token][dim]`.

        If a block was stored with more heads than were looked up, two arrays: keys, and values. Waits for the layer if
        the view was made with `layer_timeout_s`. Raises LeaseExpired, Cancelled; with ``verify="always"`` also
        ChecksumMismatch, after which the daemon has dropped the block; while it waits also DeadlineExceeded,
        ChecksumMismatch, StorageFailed, DaemonUnavailable.
        """
        if not 0 <= layer < self._blocks.layer_count:
            raise InvalidRequest(f"layer {layer} is not one of {self._blocks.layer_count}", field="layer")
        if self.span is None:
            return self._slices(layer)
        with self.span.attached(), spans.span("kvservice.layer", "client", layer=layer):
            return self._slices(layer)

    def _slices(self, layer: int) -> list[tuple[Bytes, ...]]:
        self._check_with_reason()
        if self._blocks.layers_ready <= layer:
            with self._deadline.layer():
                self._blocks.wait_for_layer(layer)
            self._check_with_reason()
        if self._have_verified is not None and layer not in self._verified_layers:
            self._verify(layer, self._have_verified)
        return [self._slice(block, layer) for block in range(self.block_count)]

    def _verify(self, layer: int, have_verified: Callable[[int, int], None]) -> None:
        for block in range(self.block_count):
            try:
                is_right = checksum(self._blocks.slice(block, layer).data) == self._blocks.expected(block, layer)
            except InPlaceMismatch:
                is_right = False
            if not is_right:
                self.check()  # Another block's bytes may be there by now, which is not damage.
                self._report(block, layer, have_verified)
        self.check()  # The bytes that were verified are those of the leased block.
        self._verified_layers.add(layer)

    def _report(self, block: int, layer: int, have_verified: Callable[[int, int], None]) -> NoReturn:
        what = f"layer {layer} of block {block} of this view is not what its checksum says"
        try:
            have_verified(block, layer)
        except ChecksumMismatch:
            raise
        except KVError as error:
            why = f"{what}; the daemon could not verify it: {error.message}"
            raise ChecksumMismatch(why, block=self._blocks.first_block + block) from error
        raise ChecksumMismatch(f"{what}, but the daemon now finds it valid", block=self._blocks.first_block + block)

    def _slice(self, block: int, layer: int) -> tuple[Bytes, ...]:
        whole, runs = self._blocks.slice(block, layer), self._blocks.runs(block, layer)
        return (whole,) if runs is None else tuple(whole[start:end] for start, end in runs)

    def check(self) -> None:
        """Raises LeaseExpired if bytes of this view may have been replaced, Cancelled after `Lease.cancel`."""
        if not self._is_open:
            raise LeaseExpired("the view is closed: its bytes may have been replaced")
        self._deadline.check_cancelled()
        self._blocks.check()

    def _check_with_reason(self) -> None:
        """As `check`. If the daemon ended the call with an error, raises that."""
        try:
            self.check()
        except LeaseExpired:
            if self._is_open and self._blocks.are_replaced and self._blocks.layers_ready < self._blocks.layer_count:
                with self._deadline.layer():
                    self._blocks.wait_for_layer(self._blocks.layer_count - 1)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *exc: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self._is_open = False
            self._blocks.close()
            if self.span is not None:
                self.span.end(error)


@runtime_checkable
class InPlaceReader(Protocol):
    """A transport by which the client can also read the daemon's memory."""

    def view(
        self, order: LoadOrder, deadline: TransferDeadline, have_verified: Callable[[int, int], None] | None = None
    ) -> View:
        """The blocks in place, without a copy. Raises NotShared if they cannot be read in place.

        Waits for all layers, unless the deadline is for each layer: the view then waits for them one by one.
        Without `have_verified` the daemon verifies bytes that it has not verified since its start. With it (block,
        layer) the view verifies each slice before it returns it.
        """


def _pieces(data: bytes, size: int) -> Sequence[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]
