"""Leased blocks in their place in the arena: their slices, their checksums, and the fence that detects reuse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NoReturn, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvservice_api import spans
from kvservice_api.cached_property import cached_property
from kvservice_api.copying import NO_RUNS, Table, copy_slices
from kvservice_api.errors import ChecksumMismatch, InvalidFrame, InvalidRequest, KVError, LeaseExpired, NotShared
from kvservice_api.image import checksums_of_trailers
from kvservice_api.layout import LayerGroup, Shard
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client.arena_map import ArenaMap, ArenaObserver
from kvservice_client.buffers import Bytes
from kvservice_client.channel import Answers
from kvservice_client.retry import TransferDeadline
from kvservice_client.transports.base import LoadOrder, Mismatch
from kvservice_client.transports.stored_forms import SHARD_BYTES, CopyTables, Form, copy_tables

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
        if max(first.offsets, default=0) > len(arena.data):
            raise InvalidFrame("the daemon located blocks outside the arena")
        self._offsets: NDArray[np.int64] = np.array(first.offsets, np.int64)
        self._generations: NDArray[np.uint32] = np.array(first.generations, np.uint32)
        self._trailer_checksums: NDArray[np.uint64] = np.array(first.trailer_checksums, np.uint64)
        self._packed_shards = first.shards
        self._forms, self._form_of = self._checked(list(first.token_counts))
        self.layers_ready = first.layers_ready

    def _checked(self, token_counts: list[int]) -> tuple[list[Form], list[int]]:
        """The forms of the blocks, which most of them share, and the number of each block's form. Raises InvalidFrame
        if the answer does not fit the request.
        """
        order, count = self._order, self._order.block_count
        shards = [self._packed_shards[at : at + SHARD_BYTES] for at in range(0, count * SHARD_BYTES, SHARD_BYTES)]
        columns = (self._offsets, self._generations, self._trailer_checksums)
        if token_counts != list(order.token_counts) or len(self._packed_shards) != count * SHARD_BYTES:
            raise InvalidFrame("the daemon located other blocks than those that were requested")
        if any(len(column) != count for column in columns):
            raise InvalidFrame("the daemon located other blocks than those that were requested")
        numbers: dict[tuple[bytes, int], int] = {}
        form_of = [numbers.setdefault(each, len(numbers)) for each in zip(shards, token_counts, strict=True)]
        decoded = [(Shard.decode(shard), tokens) for shard, tokens in numbers]
        whole = Shard.whole(order.layout)
        if not all(shard.covers(order.shard) and whole.covers(shard) for shard, _ in decoded):
            raise InvalidFrame("the daemon located blocks that lack a part of the request, or exceed the layout")
        forms = [Form.of(order, shard, tokens) for shard, tokens in decoded]
        ends = self._offsets + np.array([form.geometry.image_bytes for form in forms], np.int64)[form_of]
        if (ends > len(self._arena.data)).any():
            raise InvalidFrame("the daemon located blocks outside the arena")
        return forms, form_of

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
        return all(form.is_whole for form in self._forms)

    @property
    def memory(self) -> Bytes:
        """The arena, read-only."""
        return self._arena.data

    def slices(self, layer: int) -> list[tuple[Bytes, ...]]:
        """The requested bytes of each block's slice: one array, or two, of keys and of values."""
        data, table = self._arena.data, self.whole_slices(layer)
        begins, ends = table[:, 1].tolist(), (table[:, 1] + table[:, 2]).tolist()
        if self.are_whole:  # The usual case, with little work per block.
            return [(data[begin:end],) for begin, end in zip(begins, ends, strict=True)]
        runs = [form.runs(self._order, layer) for form in self._forms]
        return [
            tuple(data[begin + first : begin + last] for first, last in runs[form] or [(0, end - begin)])
            for begin, end, form in zip(begins, ends, self._form_of, strict=True)
        ]

    def blocks(self) -> list[Bytes]:
        """All requested bytes of each block, shape [layer, byte]. Raises InvalidRequest if they have no such shape."""
        if not self.are_whole:
            raise InvalidRequest("the blocks were stored with more heads than were looked up: use `slices`")
        data, shapes = self._arena.data, [form.shape() for form in self._forms]
        return [
            np.ndarray(shape, np.uint8, data, offset + begin, (step, 1))
            for offset, form in zip(self._offsets.tolist(), self._form_of, strict=True)
            for begin, step, shape in [shapes[form]]
        ]

    def whole_slices(self, layer: int) -> Table:
        """Slices for `copy_slices` from `memory`, without runs: one layer of each block, with all stored heads."""
        of_layer = self._copies.slices[layer * self.block_count : (layer + 1) * self.block_count].copy()
        of_layer[:, 3] = 0
        return of_layer

    def copies(self, layers: range) -> tuple[Table, Table]:
        """Slices and runs for `copy_slices` from `memory`: the requested bytes, layer after layer and in each block
        after block, each layer to its own target, whose slices are those of the order. All slices have as many runs.
        Do not change them.
        """
        slices, runs, are_alike = self._copies
        each = len(runs) // len(slices)
        begin, end = layers.start * self.block_count, layers.stop * self.block_count
        if are_alike:  # Those of the first layers, which stay in the processor's cache.
            return slices[begin:end], runs[: (end - begin) * each]
        of_layers = runs[begin * each : end * each].copy()
        of_layers[:, 0] -= layers.start
        return slices[begin:end], of_layers

    @cached_property
    def _copies(self) -> CopyTables:
        """Those of all layers, in the arena."""
        order = self._order
        tables = copy_tables(order.layout, order.shard, self._packed_shards, tuple(order.token_counts))
        slices = tables.slices.copy()
        slices.reshape(-1, self.block_count, 4)[:, :, 1] += self._offsets
        return tables._replace(slices=slices)

    def checksums(self, layers: range) -> NDArray[np.uint64]:
        """Those of these layers' slices, in the order of `copies`. Raises InPlaceMismatch if a block's trailer is not
        the stored one.
        """
        sums, are_known = self._checksums
        if not are_known.all():
            raise InPlaceMismatch(f"the trailer of block {int(are_known.argmin())} is not the one that was stored")
        return sums[layers.start : layers.stop].ravel()

    def first_mismatch(self, layer: int, found: NDArray[np.uint64]) -> int | None:
        """The first block whose slice does not have this checksum, or whose trailer is not the stored one."""
        sums, are_known = self._checksums
        are_right = are_known & (sums[layer] == found)
        return None if are_right.all() else int(are_right.argmin())

    @cached_property
    def _checksums(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """Those of the requested slices, shape [layer, block], from the trailers; and whose trailer is the stored one.

        All trailers are read and summed in one call per form.
        """
        sums = np.zeros((self.layer_count, self.block_count), np.uint64)
        are_known = np.zeros(self.block_count, np.bool_)
        form_of = np.array(self._form_of)
        for number, form in enumerate(self._forms):
            which = np.flatnonzero(form_of == number)
            size_bytes = form.geometry.image_bytes - form.geometry.trailer_offset
            trailers = np.empty((len(which), size_bytes), np.uint8)
            slices, runs = np.zeros((len(which), 4), np.int64), np.zeros((len(which), 6), np.int64)
            slices[:, 1], slices[:, 2:] = self._offsets[which] + form.geometry.trailer_offset, (size_bytes, 1)
            runs[:, 1], runs[:, 3:5] = np.arange(len(which)) * size_bytes, (1, size_bytes)
            found = copy_slices([self.memory], [trailers.reshape(-1)], slices, runs)
            stored, have_form = checksums_of_trailers(trailers, form.shard)
            first = self._order.shard.layer_begin - form.shard.layer_begin
            sums[:, which] = stored[:, first : first + self.layer_count].T
            are_known[which] = have_form & (found == self._trailer_checksums[which])
        return sums, are_known

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
        block = self._blocks.first_mismatch(layer, sums)
        if block is not None:
            self.check()  # Another block's bytes may be there by now, which is not damage.
            raise SliceMismatch(layer, block)
        self.check()  # The bytes that were verified are those of the leased block.
        self._verified_layers.add(layer)

    def blocks(self) -> list[Bytes]:
        """The bytes of each block, read-only: one array of shape [layer, byte], whose rows are those of `slices`.

        For a caller that uses whole blocks: it takes the time of one layer's `slices`. Waits for all layers, and
        verifies all of them, as `slices` does for one; raises what it raises. Also InvalidRequest if the layers differ
        in size, or if the blocks were stored with more heads than were looked up.
        """
        self._check_with_reason()
        blocks = self._blocks.blocks()  # First: what has no such shape is not waited for.
        for layer in range(self.layer_count):
            if self._blocks.layers_ready <= layer or self._must_verify(layer):
                self._traced_slices(layer, verify=self._have_verified is not None)
        return blocks

    def _must_verify(self, layer: int) -> bool:
        return self._have_verified is not None and layer not in self._verified_layers

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
        try:
            self._compare(layer, copy_slices([self._blocks.memory], [], self._blocks.whole_slices(layer), NO_RUNS))
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
        shards=located.shards[begin * SHARD_BYTES : end * SHARD_BYTES],
        layers_ready=located.layers_ready,
    )
