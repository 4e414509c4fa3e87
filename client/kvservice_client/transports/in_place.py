"""Leased blocks in their place in the arena: their slices, their checksums, and the fence that detects reuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Literal, NoReturn, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvservice_api import spans
from kvservice_api.cached_property import cached_property
from kvservice_api.copying import NO_RUNS, Table, copy_slices
from kvservice_api.errors import ChecksumMismatch, InvalidFrame, InvalidRequest, KVError, LeaseExpired, NotShared
from kvservice_api.image import BlockGeometry, Trailer, block_geometry, checksum
from kvservice_api.layout import LayerGroup, Layout, Shard
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client.arena_map import ArenaMap, ArenaObserver
from kvservice_client.buffers import Bytes
from kvservice_client.channel import Answers
from kvservice_client.retry import TransferDeadline
from kvservice_client.transports.base import LoadOrder, Mismatch

_SHARD_BYTES = 8
_KEPT_SLICES_MAX = 8192  # Of a load whose tables are kept: they have up to a MiB.

Verify = Literal["once", "always"]
VERIFY: tuple[Verify, ...] = ("once", "always")


class InPlaceMismatch(Mismatch):
    """Bytes in place are not the stored ones. The next transport loads them, so that the daemon verifies them."""


class SliceMismatch(InPlaceMismatch):
    """A slice of a view is not what its checksum says: see `View.report`."""

    def __init__(self, layer: int, block: int) -> None:
        super().__init__(f"layer {layer} of block {block} of this view is not what its checksum says")
        self.layer, self.block = layer, block


class InPlace:
    """The blocks of a load order, in place. A context manager: after leaving it, the daemon may move the blocks.

    Bytes that were read in place count only after a later `check` that did not raise.
    """

    def __init__(
        self, arena: ArenaMap, order: LoadOrder, located: Answers[pb.LocateBlocksResponse] | pb.LocateBlocksResponse
    ) -> None:
        """`located` are the answers of LocateBlocks, or one by which all layers are in place: then only the lease keeps
        the blocks there. Raises NotShared if the blocks are not in this arena.
        """
        self._answers = None if isinstance(located, pb.LocateBlocksResponse) else located
        first = located if isinstance(located, pb.LocateBlocksResponse) else next(located, None)
        if first is None:
            raise InvalidFrame("the daemon ended the call without an answer")
        if first.not_in_place_because:
            raise NotShared(first.not_in_place_because)
        if first.arena_id != arena.arena_id:
            raise NotShared("the daemon has replaced its arena")
        self._arena = arena
        self._order = order
        self._places: list[int] = list(first.offsets)
        if max(self._places, default=0) > len(arena.data) or len(first.shards) % _SHARD_BYTES:
            raise InvalidFrame("the daemon located blocks outside the arena, or a part of a shard")
        self._offsets: NDArray[np.int64] = np.array(self._places, np.int64)
        self._generations: NDArray[np.uint32] = np.array(first.generations, np.uint32)
        self._trailer_checksums = list(first.trailer_checksums)
        self._trailers: dict[int, Trailer] = {}
        shards = _pieces(first.shards, _SHARD_BYTES)
        unlike = {data: Shard.decode(data) for data in set(shards)}  # Few: most blocks are cut in the same way.
        self._shards = [unlike[data] for data in shards]
        self._geometries = self._checked(list(first.token_counts), unlike.values())
        # Of each block, those of the requested layers.
        self._stored = [
            geometry.slices[order.shard.layer_begin - shard.layer_begin :]
            for geometry, shard in zip(self._geometries, self._shards, strict=True)
        ]
        # Each shard covers the request's.
        self._is_whole = [shard.heads == order.shard.heads for shard in self._shards]
        self.layers_ready = first.layers_ready

    def _checked(self, token_counts: list[int], unlike: Iterable[Shard]) -> list[BlockGeometry]:
        """The blocks' geometries. Raises InvalidFrame if the answer does not fit the request."""
        order, count = self._order, self._order.block_count
        columns = (self._offsets, self._generations, self._trailer_checksums, self._shards)
        if token_counts != list(order.token_counts) or any(len(column) != count for column in columns):
            raise InvalidFrame("the daemon located other blocks than those that were requested")
        whole = Shard.whole(order.layout)
        if not all(shard.covers(order.shard) and whole.covers(shard) for shard in unlike):
            raise InvalidFrame("the daemon located blocks that lack a part of the request, or exceed the layout")
        found = [
            block_geometry(order.layout, shard, tokens)
            for shard, tokens in zip(self._shards, token_counts, strict=True)
        ]
        ends = self._offsets + [geometry.image_bytes for geometry in found]
        if (ends > len(self._arena.data)).any():
            raise InvalidFrame("the daemon located blocks outside the arena")
        return found

    @property
    def are_held(self) -> bool:
        """Whether a call of LocateBlocks keeps the blocks in their place, beside the lease."""
        return self._answers is not None

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

    def group_of(self, layer: int) -> LayerGroup:
        return self._order.layout.group_of(self._order.shard.layer_begin + layer)

    def wait_for_layer(self, layer: int) -> None:
        """Wait until the layer of every block is in place. Raises the error if it will not be."""
        while self.layers_ready <= layer:
            answer = None if self._answers is None else next(self._answers, None)
            if answer is None:
                raise InvalidFrame("the daemon ended the call before all layers had arrived")
            self.layers_ready = answer.layers_ready

    @property
    def are_whole(self) -> bool:
        """Whether all bytes of all stored slices are requested."""
        return all(self._is_whole)

    @property
    def memory(self) -> Bytes:
        """The arena, read-only."""
        return self._arena.data

    def place(self, block: int, layer: int) -> tuple[int, int]:
        """Begin and end in `memory` of one stored slice, with all heads; `layer` counts from the first requested."""
        begin, end = self._stored[block][layer][:2]
        offset = self._places[block]
        return offset + begin, offset + end

    def slice(self, block: int, layer: int) -> Bytes:
        """The bytes at `place`."""
        begin, end = self.place(block, layer)
        return self._arena.data[begin:end]

    def runs(self, block: int, layer: int) -> list[tuple[int, int]] | None:
        """The requested bytes of one slice: keys, then values. None if all bytes are requested."""
        if self._is_whole[block]:
            return None
        stored = self._stored[block][layer]
        wanted = self._order.layout.heads_of(self._order.shard, layer + self._order.shard.layer_begin)
        if (stored.head_begin, stored.head_end) == wanted:
            return None
        return list(stored.head_runs(*wanted))

    def slices(self, layer: int) -> list[tuple[Bytes, ...]]:
        """The requested bytes of each block's slice: one array, or two, of keys and of values."""
        data = self._arena.data
        if self.are_whole:  # The usual case, with little work per block.
            ranges = [stored[layer][:2] for stored in self._stored]
            return [(data[at + begin : at + end],) for at, (begin, end) in zip(self._places, ranges, strict=True)]
        return [
            tuple(data[begin + first : begin + last] for first, last in self.runs(block, layer) or [(0, end - begin)])
            for block in range(self.block_count)
            for begin, end in [self.place(block, layer)]
        ]

    def copies(self, layers: range) -> tuple[Table, Table]:
        """Slices and runs for `copy_slices` from `memory`: the requested bytes, layer after layer and in each block
        after block, each layer to its own target, whose slices are those of the order. All slices have as many runs.
        """
        slices, runs = self._copies
        each = len(runs) // len(slices)
        begin, end = layers.start * self.block_count, layers.stop * self.block_count
        of_layers = runs[begin * each : end * each].copy()
        of_layers[:, 0] -= layers.start
        return slices[begin:end], of_layers

    @cached_property
    def _copies(self) -> tuple[Table, Table]:
        """Those of all layers."""
        order = self._order
        slices, runs = tables_of(order.layout, order.shard, tuple(self._shards), tuple(order.token_counts))
        slices = slices.copy()
        slices.reshape(-1, self.block_count, 4)[:, :, 1] += self._offsets
        return slices, runs

    def checksums(self, layers: range) -> NDArray[np.uint64]:
        """Those of these layers' slices, in the order of `copies`. Raises as `expected`."""
        return self._checksums[layers.start * self.block_count : layers.stop * self.block_count]

    @cached_property
    def _checksums(self) -> NDArray[np.uint64]:
        columns = []
        for block, stored in enumerate(self._shards):
            first = self._order.shard.layer_begin - stored.layer_begin
            columns.append(self._trailer(block).checksums[first : first + self.layer_count])
        return np.array(columns, np.uint64).T.ravel()

    def expected(self, block: int, layer: int) -> int:
        """The slice's checksum. Raises InPlaceMismatch if the block's trailer is not the stored one."""
        first = self._order.shard.layer_begin - self._shards[block].layer_begin
        return int(self._trailer(block).checksums[first + layer])

    def _trailer(self, block: int) -> Trailer:
        trailer = self._trailers.get(block)
        if trailer is None:
            trailer = self._trailers[block] = self._read_trailer(block)
        return trailer

    def _read_trailer(self, block: int) -> Trailer:
        geometry, offset = self._geometries[block], self._places[block]
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

    def check_with_reason(self) -> None:
        """As `check`. If the daemon has ended the call by an error, and so released the blocks, raises that error.

        It may wait for the error. For the thread that waits for layers.
        """
        try:
            self.check()
        except LeaseExpired:
            if self.are_replaced and self.layers_ready < self.layer_count:
                self.wait_for_layer(self.layer_count - 1)
            raise

    def close(self) -> None:
        """End the call, which ends the daemon's hold on the blocks."""
        if self._answers is not None:
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

    @property
    def layer_count(self) -> int:
        return self._blocks.layer_count

    def group_of(self, layer: int) -> LayerGroup:
        """The geometry of a layer, counted from the first requested one."""
        return self._blocks.group_of(layer)

    def slices(self, layer: int) -> list[tuple[Bytes, ...]]:
        """For each block the bytes of one layer, read-only: one array `[K, V][head][token][dim]`.

        If a block was stored with more heads than were looked up, two arrays: keys, and values. Waits for the layer if
        the view was made with `layer_timeout_s`. Raises LeaseExpired, Cancelled; with ``verify="always"`` also
        ChecksumMismatch, after which the daemon has dropped the block; while it waits also DeadlineExceeded,
        ChecksumMismatch, StorageFailed, DaemonUnavailable.
        """
        return self._traced_slices(layer, verify=self._have_verified is not None)

    def slices_to_verify(
        self, layer: int
    ) -> tuple[list[tuple[Bytes, ...]], Callable[[NDArray[np.uint64]], None] | None]:
        """As `slices`, for a caller that copies them and takes their xxh3-64 in one pass: they are not verified yet.

        The second is to be called with the checksums, one per block, after the copy; any thread may, as long as the
        view is open. It raises LeaseExpired, Cancelled, and SliceMismatch, to be given to `report`. None if nothing is
        left to verify.
        """
        if self._have_verified is None or layer in self._verified_layers or not self._blocks.are_whole:
            return self.slices(layer), None
        return self._traced_slices(layer, verify=False), partial(self._compare, layer)

    def _compare(self, layer: int, sums: NDArray[np.uint64]) -> None:
        for block, found in enumerate(sums.tolist()):
            try:
                is_right = found == self._blocks.expected(block, layer)
            except InPlaceMismatch:
                is_right = False
            if not is_right:
                self.check()  # Another block's bytes may be there by now, which is not damage.
                raise SliceMismatch(layer, block)
        self.check()  # The bytes that were verified are those of the leased block.
        self._verified_layers.add(layer)

    def _traced_slices(self, layer: int, *, verify: bool) -> list[tuple[Bytes, ...]]:
        if not 0 <= layer < self._blocks.layer_count:
            raise InvalidRequest(f"layer {layer} is not one of {self._blocks.layer_count}", field="layer")
        if self.span is None:
            return self._slices(layer, verify=verify)
        with self.span.attached(), spans.span("kvservice.layer", "client", layer=layer):
            return self._slices(layer, verify=verify)

    def _slices(self, layer: int, *, verify: bool) -> list[tuple[Bytes, ...]]:
        self._check_with_reason()
        if self._blocks.layers_ready <= layer:
            with self._deadline.layer():
                self._blocks.wait_for_layer(layer)
            self._check_with_reason()
        if verify and layer not in self._verified_layers:
            self._verify(layer)
        return self._blocks.slices(layer)

    def _verify(self, layer: int) -> None:
        places = [self._blocks.place(block, layer) for block in range(self.block_count)]
        slices = np.array([(0, begin, end - begin, 0) for begin, end in places], np.int64)
        try:
            self._compare(layer, copy_slices([self._blocks.memory], [], slices, NO_RUNS))
        except SliceMismatch as damaged:
            self.report(damaged)

    def report(self, damaged: SliceMismatch) -> NoReturn:
        """Have the daemon verify the slice, and drop the block. Raises ChecksumMismatch."""
        assert self._have_verified is not None
        position = self._blocks.first_block + damaged.block
        try:
            self._have_verified(damaged.block, damaged.layer)
        except ChecksumMismatch:
            raise
        except KVError as error:
            why = f"{damaged}; the daemon could not verify it: {error.message}"
            raise ChecksumMismatch(why, block=position) from error
        raise ChecksumMismatch(f"{damaged}, but the daemon now finds it valid", block=position)

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
            if self._is_open:
                with self._deadline.layer():
                    self._blocks.check_with_reason()
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

    @property
    def is_mapped(self) -> bool:
        """Whether the memory is mapped, so that a load needs no more than the places of blocks. Waits for nothing."""

    def observe_arenas(self, observer: ArenaObserver) -> None:
        """Have it follow the mappings of the daemon's memory, from now on. Waits for nothing."""

    def view(
        self, order: LoadOrder, deadline: TransferDeadline, have_verified: Callable[[int, int], None] | None = None
    ) -> View:
        """The blocks in place, without a copy. Raises NotShared if they cannot be read in place.

        Waits for all layers, unless the deadline is for each layer: the view then waits for them one by one.
        Without `have_verified` the daemon verifies bytes that it has not verified since its start. With it (block,
        layer) the view verifies each slice before it returns it.
        """


def part_of(located: pb.LocateBlocksResponse, begin: int, end: int) -> pb.LocateBlocksResponse:
    """The places of some of the blocks."""
    return pb.LocateBlocksResponse(
        arena_id=located.arena_id,
        offsets=located.offsets[begin:end],
        generations=located.generations[begin:end],
        trailer_checksums=located.trailer_checksums[begin:end],
        token_counts=located.token_counts[begin:end],
        shards=located.shards[begin * _SHARD_BYTES : end * _SHARD_BYTES],
        layers_ready=located.layers_ready,
    )


def tables_of(
    layout: Layout, wanted: Shard, stored: tuple[Shard, ...], token_counts: tuple[int, ...]
) -> tuple[Table, Table]:
    """Slices and runs of all layers, as `InPlace.copies` has them, with images that begin at 0. Do not change them."""
    is_small = wanted.layers * len(stored) <= _KEPT_SLICES_MAX
    make = _tables_of if is_small else _tables_of.__wrapped__
    return make(layout, wanted, stored, token_counts)


@lru_cache(maxsize=16)  # Loads of as many blocks as before begin a tenth of a millisecond earlier.
def _tables_of(
    layout: Layout, wanted: Shard, stored: tuple[Shard, ...], token_counts: tuple[int, ...]
) -> tuple[Table, Table]:
    blocks = zip(stored, token_counts, strict=True)
    tables = [_runs_of(layout, wanted, shard, tokens) for shard, tokens in blocks]
    ranges = np.stack([table[0] for table in tables], axis=1)  # [layer, block, begin and end]
    needed = np.stack([table[1] for table in tables], axis=1)  # [layer, block, run, begin and size]
    if not needed[:, :, 1, 1].any():
        needed = needed[:, :, :1]
    slices = np.zeros((ranges.shape[0] * ranges.shape[1], 4), np.int64)
    slices[:, 1] = ranges[..., 0].ravel()
    slices[:, 2] = (ranges[..., 1] - ranges[..., 0]).ravel()
    slices[:, 3] = needed.shape[2]
    sizes = needed[..., 1].reshape(len(needed), -1)
    runs = np.zeros((sizes.size, 6), np.int64)
    runs[:, 0] = np.repeat(np.arange(len(sizes)), sizes.shape[1])
    runs[:, 1] = (np.cumsum(sizes, axis=1) - sizes).ravel()
    runs[:, 2] = needed[..., 0].ravel()
    runs[:, 3] = 1
    runs[:, 4] = sizes.ravel()
    return slices, runs


@lru_cache(maxsize=1024)
def _runs_of(
    layout: Layout, wanted: Shard, stored: Shard, token_count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the wanted part of a block is in its image.

    For each wanted layer begin and end of its slice, shape [layer, 2]; and begin in the slice and size of the wanted
    keys, and of the wanted values, shape [layer, 2, 2]. Where all of a slice is wanted, it is all in the first.
    """
    ranges, runs = [], []
    slices = block_geometry(layout, stored, token_count).slices[wanted.layer_begin - stored.layer_begin :]
    for layer, each in zip(range(wanted.layer_begin, wanted.layer_end), slices, strict=False):
        heads = layout.heads_of(wanted, layer)
        ranges.append((each.start, each.end))
        if heads == (each.head_begin, each.head_end):
            runs.append(((0, each.end - each.start), (0, 0)))
        else:
            keys, values = each.head_runs(*heads)
            runs.append(((keys[0], keys[1] - keys[0]), (values[0], values[1] - values[0])))
    return np.array(ranges, np.int64), np.array(runs, np.int64)


def _pieces(data: bytes, size: int) -> Sequence[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]
