"""The interface of a storage medium."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent
from kvservice_api.errors import KVError, StorageFailed
from kvservice_api.file_parts import Ranges, sums_of

T = TypeVar("T")


class StoreMismatch(ValueError):
    """A file belongs to another store, or is not a file of KVService. The message names it and the remedy."""


def as_kv_error(error: Exception) -> KVError:
    """The error itself, or StorageFailed in its place: a tier of another kind may raise anything."""
    return error if isinstance(error, KVError) else StorageFailed(f"{type(error).__name__}: {error}")


class Tier(Protocol):
    """One storage medium: it reserves space, and stores bytes there.

    A tier does not know keys, recency, leases, or other tiers. ``store`` decides what to keep,
    promote, and evict; a tier executes the decision. All calls come from one thread, except those of
    `DurableTier.sync`.
    """

    @property
    def capacity_bytes(self) -> int: ...

    @property
    def used_bytes(self) -> int: ...

    @property
    def refusing_because(self) -> str:
        """Why the last write failed; empty after a write that succeeded."""

    def could_hold(self, size_bytes: int) -> bool:
        """Whether an extent of this size fits into the empty tier."""

    async def grown(self) -> bool:
        """Wait for space that is still being prepared. Returns False at once if there is none."""

    def reserve(self, size_bytes: int) -> Extent:
        """Reserve space. Raises TierFull; never evicts."""

    def release(self, extent: Extent) -> None:
        """Free the extent, sealed or not. Releasing twice is a caller's bug: it asserts."""

    def holds(
        self, segments: NDArray[np.generic], offsets: NDArray[np.generic], sizes: NDArray[np.generic]
    ) -> NDArray[np.bool_]:
        """Which of these extents lie within the tier."""

    def adopt(self, segments: NDArray[np.generic], offsets: NDArray[np.generic], sizes: NDArray[np.generic]) -> None:
        """Mark the extents of an earlier start as used: all in one call, before any other. Raises ValueError on
        overlap.
        """

    async def write(
        self, extent: Extent, offset_bytes: int, data: memoryview, first: Callable[[memoryview], object] | None = None
    ) -> None:
        """Fill part of a reserved extent. Parts may arrive in any order. Raises StorageFailed.

        `first` is called before with the data, on a thread; if it raises, nothing is written.
        """

    async def seal(self, extent: Extent) -> None:
        """Make the extent immutable: nothing is written to it any more."""

    async def read(
        self,
        extent: Extent,
        offset_bytes: int,
        into: memoryview,
        then: Callable[[memoryview], T] | None = None,
        *,
        priority: float = 0.0,
    ) -> T | None:
        """Fill `into` from a part of an extent. Raises StorageFailed.

        `then` is called with the bytes on the reading thread; returns its result. Lower priorities are read first.
        """


class PartRead(NamedTuple):
    """A part of an extent to read, and the ranges of its bytes to sum: rows of (begin, end), counted from its first."""

    extent: Extent
    offset_bytes: int
    into: memoryview
    ranges: Ranges


PartSums = NDArray[np.uint64] | KVError  # The xxh3-64 of a part's ranges, or why it could not be read.


async def read_together(
    tier: Tier,
    segment: int,
    take: Callable[[], Sequence[PartRead]],
    then: Callable[[list[PartSums]], None],
    *,
    priority: float,
) -> None:
    """Read the parts that `take` returns, all in this segment. `then` is called with what was found, part by part.

    A tier may have a method of this name, which reads many small parts with one hand-over to a thread, and calls both
    there: `take` once the thread is free. Raises what they raise; a tier of another kind may raise anything.
    """
    together = getattr(tier, "read_together", None)  # `isinstance` of a protocol takes longer than a hand-over.
    if together is not None:
        await together(segment, take, then, priority=priority)
        return
    found: list[PartSums] = []
    for extent, offset_bytes, into, ranges in take():
        try:
            sums = await tier.read(extent, offset_bytes, into, partial(sums_of, ranges=ranges), priority=priority)
        except Exception as error:
            found.append(as_kv_error(error))
        else:
            assert sums is not None
            found.append(sums)
    then(found)


@runtime_checkable
class Resizable(Protocol):
    """A tier whose size the settings may change. It grows when it is opened; this makes it smaller.

    In this order: `shrink` after `adopt`, the blocks beyond the new size move or leave, `truncate`.
    """

    @property
    def is_too_large(self) -> bool:
        """Whether the settings ask for less than the tier has."""

    def shrink(self) -> None:
        """Reserve nothing beyond the new size any more."""

    def truncate(self) -> None:
        """Cut off what is beyond the new size. No block may be there. Raises OSError."""


class DurableTier(Tier, Protocol):
    """A tier below the first one: its bytes survive a power cut once `sync` has returned."""

    @property
    def is_direct(self) -> bool:
        """Whether I/O bypasses the page cache."""

    def flush_failures(self, extent: Extent) -> int:
        """How often the extent's medium could not be flushed.

        Bytes that were written before such a failure may be lost, and no later flush reports that: the kernel
        reports an error once. An extent is sound only if the number is the same as before its first write.
        """

    def sync(self) -> None:
        """Make everything durable that was written before the call.

        Raises StorageFailed if that is not true of extents whose `flush_failures` it has incremented; any other error
        is one of all extents. Called on the index's committer thread, before the records of these bytes are committed.
        """

    def close(self) -> None:
        """Wait for the running I/O and close the files."""
