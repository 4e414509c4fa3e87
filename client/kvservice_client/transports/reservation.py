"""Blocks that the caller writes in place: space in the daemon's arena, reserved until it is committed or abandoned."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvservice_api.errors import InvalidFrame, InvalidRequest, ReservationEnded, UnknownClient
from kvservice_api.image import block_geometry, checksum
from kvservice_api.keys import BlockChain
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import arguments, forks
from kvservice_client.buffers import Bytes
from kvservice_client.retry import Deadline
from kvservice_client.transports.base import SaveResult, SaveSet
from kvservice_client.transports.grpc import save_results


class Reservation:
    """Blocks whose slices the caller writes into the daemon's shared memory itself. Made by `BlockCache.reserve`.

    For each layer: write all of `slices`, then `seal`. After the last layer `commit` stores the blocks; no other client
    sees them before. A context manager: leaving it without a commit abandons the blocks, as does dropping it and all
    arrays that it has returned. Do not write into these after `seal`, and never after `commit` or `abandon`: the space
    then belongs to other blocks.

    Any thread may write, and any may seal a layer that is written. `commit` and `abandon` may be called from any thread
    once none writes any more. In a forked child it counts as ended, and in the parent it continues.
    """

    def __init__(
        self,
        saved: SaveSet,
        answer: pb.ReserveBlocksResponse,
        arena: Bytes,
        commit: Callable[[bytes, Deadline], pb.SaveBlocksResponse],
        end: Callable[[bool], None],
        deadline: Callable[[float | None], Deadline],
    ) -> None:
        """`commit` sends checksums. `end` is called once, with whether the reservation must be abandoned.

        Raises InvalidFrame for an answer that does not fit the save and the arena; `end` is not called then.
        """
        counts = saved.token_counts
        if len(answer.offsets) != len(answer.blocks) or max(answer.blocks, default=0) >= len(counts):
            raise InvalidFrame("the daemon reserved space for other blocks than those of the save")
        self._chains: Sequence[BlockChain] = saved.chains
        self._arena = arena
        self._commit = commit
        self._end = end
        self._deadline = deadline
        self._generation = forks.generation
        geometries = [block_geometry(saved.layout, saved.shard, counts[each]) for each in answer.blocks]
        places = list(zip(answer.offsets, geometries, strict=True))
        if any(offset + geometry.image_bytes > len(arena) for offset, geometry in places):
            raise InvalidFrame("the daemon reserved space outside the arena")
        self.positions: list[int] = list(answer.blocks)  # Of the reserved blocks, among those of all chains.
        # Where each slice begins and ends in `memory`: i64, shape [layer, block, 2].
        self.ranges: NDArray[np.int64] = np.empty((saved.shard.layers, len(places), 2), np.int64)
        unlike = {id(each): each for each in geometries}.values()  # Blocks of as many tokens share one.
        within = {id(each): np.array([piece[:2] for piece in each.slices], np.int64) for each in unlike}
        for number, (offset, geometry) in enumerate(places):
            self.ranges[:, number] = within[id(geometry)] + offset
        self.sums: NDArray[np.uint64] = np.zeros((len(places), saved.shard.layers), "<u8")
        self._is_sealed = np.zeros(self.sums.shape, bool)
        self._abandon = weakref.finalize(self, end, True)
        self.on_commit: Callable[[float], None] | None = None  # Called with the seconds of the commit.
        self._abandon.atexit = False  # The daemon then sees the end of the process.

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """The blocks to write, in the order of `slices`: (position in `saves`, position in this chain).

        The others are stored already, refused, or also part of an earlier chain; `commit` says which.
        """
        of_all = [(number, block) for number, chain in enumerate(self._chains) for block in range(len(chain))]
        return [of_all[position] for position in self.positions]

    @property
    def size_bytes(self) -> int:
        """Bytes of all slices to write."""
        return int(np.diff(self.ranges).sum())

    def slices(self, layer: int) -> list[Bytes]:
        """The memory of one layer: for each of `blocks` its slice, ``[K, V][head][token][dim]``, as flat bytes.

        Writable, with undefined content. `layer` counts from the shard's first. Raises InvalidRequest for another
        layer, ReservationEnded.
        """
        self._check_open()
        ranges = self.ranges[self._checked(layer)]
        held = np.asarray(_Held(self._arena, self))
        return [held[begin:end] for begin, end in ranges.tolist()]

    def seal(self, layer: int, number: int | None = None) -> None:
        """Compute the checksums of a layer that is written, or only of its slice at this position in `blocks`.

        It is fastest right after a slice's last byte, while the slice is in the processor's cache. Raises as `slices`;
        InvalidRequest for another number.
        """
        self._check_open()
        ranges = self.ranges[self._checked(layer)].tolist()
        last = len(ranges) - 1
        numbers = range(last + 1) if number is None else (arguments.whole(number, "number", 0, last),)
        for each in numbers:
            begin, end = ranges[each]
            self.sums[each, layer] = checksum(self._arena[begin:end].data)
            self._is_sealed[each, layer] = True

    def commit(self, timeout_s: float | None = None) -> list[SaveResult]:
        """Store the blocks, and end the reservation. Returns the result of each chain, as `BlockCache.save_many`.

        Waits for the daemon for at most `timeout_s`, by default the client's. Raises InvalidRequest while a layer is
        not sealed (the reservation continues); ReservationEnded if it was committed or abandoned, or if the client's
        attachment has ended, as at a restart of the daemon: reserve and write again; DaemonUnavailable,
        DeadlineExceeded: whether the blocks are stored is then unknown.
        """
        self._check_open()
        missing = np.flatnonzero(~self._is_sealed.all(axis=0))
        if missing.size:
            raise InvalidRequest(f"layer {missing[0]} is not sealed: its bytes may not be written", field="layer")
        deadline = self._deadline(timeout_s)
        begin_s = deadline.clock.now_s()
        try:
            results = self.commit_sealed(deadline)
        except UnknownClient as error:
            raise ReservationEnded("the reservation has ended with the client's attachment: reserve again") from error
        if self.on_commit is not None:
            self.on_commit(deadline.clock.now_s() - begin_s)
        return results

    def commit_sealed(self, deadline: Deadline) -> list[SaveResult]:
        """As `commit`, with the checksums in `sums`. Raises the daemon's errors; the reservation has ended then too."""
        try:
            answer = self._commit(self.sums.tobytes(), deadline)
        except BaseException:
            self._abandon()
            raise
        if self._abandon.detach() is not None:
            self._end(False)
        return save_results(answer, self._chains)

    def abandon(self) -> None:
        """Free the space, and let other clients save the blocks. No thread may write any more.

        Does not block: a thread tells the daemon. No effect if the reservation has ended.
        """
        if self._generation == forks.generation:
            self._abandon()

    @property
    def memory(self) -> Bytes:
        """The arena, writable. It does not keep the reservation."""
        return self._arena

    def slice_sizes(self, layer: int) -> list[int]:
        sizes: list[int] = np.diff(self.ranges[layer]).ravel().tolist()
        return sizes

    def _checked(self, layer: int) -> int:
        return arguments.whole(layer, "layer", 0, len(self.ranges) - 1)

    def _check_open(self) -> None:
        if self._generation != forks.generation:
            raise ReservationEnded("the reservation was made before fork() and is the parent's; reserve here again")
        if not self._abandon.alive:
            raise ReservationEnded("the reservation was committed or abandoned: reserve again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abandon()


class _Held:
    """The arena's memory for NumPy. Arrays of it keep the reservation, so that its space is not reused under them."""

    def __init__(self, arena: Bytes, reservation: Reservation) -> None:
        self._kept = (arena, reservation)
        self.__array_interface__ = arena.__array_interface__


@runtime_checkable
class InPlaceWriter(Protocol):
    """A transport by which the caller can write blocks into the daemon's memory itself."""

    def reserve(self, saved: SaveSet, deadline: Deadline) -> Reservation:
        """Waits, as a save does, for other saves of the same blocks, and for space. Raises NotShared, NoWriterLock."""
