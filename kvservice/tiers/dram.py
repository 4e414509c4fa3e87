"""The DRAM tier: extents of the arena, readable and writable in place."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent
from kvservice.tiers.arena import Arena
from kvservice.tiers.extents import SpaceMap, extent_size, lie_within
from kvservice.tiers.files import on_thread

T = TypeVar("T")


class DramTier:
    """The tier over an arena. Its capacity grows while the arena is being prepared."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena  # Clients of this host may map it: `Arena.share`.
        arena.prepare_first_step()
        self._space = SpaceMap(arena.ready_bytes)
        self._is_started = False
        self._more = asyncio.Event()

    def start(self) -> None:
        """Prepare the rest of the arena in the background. Call it on a running event loop."""
        loop = asyncio.get_running_loop()

        def grow(ready_bytes: int) -> None:
            self._space.grow(ready_bytes)
            self._more.set()
            self._more = asyncio.Event()

        def on_more(ready_bytes: int) -> None:
            with contextlib.suppress(RuntimeError):  # The loop is closed.
                loop.call_soon_threadsafe(grow, ready_bytes)

        self._is_started = True
        self.arena.prepare(on_more)

    @property
    def capacity_bytes(self) -> int:
        return self._space.capacity_bytes

    @property
    def configured_bytes(self) -> int:
        """Bytes that extents could take if nothing made the tier another size than the settings ask for."""
        return self.arena.wanted_bytes

    @property
    def used_bytes(self) -> int:
        return self._space.used_bytes

    @property
    def refusing_because(self) -> str:
        return "" if self.capacity_bytes else self.arena.short_because

    @property
    def short_because(self) -> str:
        """Why the tier is smaller than configured; empty if it is not."""
        return self.arena.short_because or self.arena.not_grown_because

    def view(self, extent: Extent) -> memoryview:
        """The extent's own bytes, writable. Valid until its release."""
        return self.arena.data[extent.offset_bytes : extent.offset_bytes + extent.size_bytes]

    def could_hold(self, size_bytes: int) -> bool:
        return extent_size(size_bytes) <= (self.arena.capacity_bytes if self._is_growing else self.capacity_bytes)

    async def grown(self) -> bool:
        if not self._is_growing:
            return False
        await self._more.wait()
        return True

    @property
    def _is_growing(self) -> bool:
        return self._is_started and self.capacity_bytes < self.arena.capacity_bytes and not self.arena.short_because

    def reserve(self, size_bytes: int) -> Extent:
        return Extent(0, self._space.reserve(size_bytes), extent_size(size_bytes))

    def release(self, extent: Extent) -> None:
        if self.arena.generations is not None:
            self.arena.generations.bump(extent.offset_bytes)  # First: clients that read in place must detect it.
        self._space.release(extent.offset_bytes, extent.size_bytes)

    def holds(
        self, segments: NDArray[np.generic], offsets: NDArray[np.generic], sizes: NDArray[np.generic]
    ) -> NDArray[np.bool_]:
        inside: NDArray[np.bool_] = (segments == 0) & lie_within(offsets, sizes, np.uint64(self.capacity_bytes))
        return inside

    def adopt(self, segments: NDArray[np.generic], offsets: NDArray[np.generic], sizes: NDArray[np.generic]) -> None:
        self._space.adopt(offsets.astype(np.int64), sizes.astype(np.int64))
        if self.arena.generations is not None:
            self.arena.generations.bump_all_except(offsets.astype(np.int64))

    def set_aside(self, offset_bytes: int, size_bytes: int) -> Extent | None:
        """Reserve a range that an earlier daemon's client may still be writing; None if a record has a part of it, or
        if it is beyond the tier.
        """
        places = np.array([offset_bytes], np.uint64), np.array([size_bytes], np.uint64)
        if not self.holds(np.zeros(1, np.uint64), *places).all() or not self._space.take(offset_bytes, size_bytes):
            return None
        return Extent(0, offset_bytes, size_bytes)

    def generations(self, offsets: NDArray[np.int64]) -> list[int]:
        """The generations of the extents that begin at `offsets`, for clients that read them in place."""
        assert self.arena.generations is not None
        found: list[int] = self.arena.generations.get_many(offsets).tolist()
        return found

    async def write(
        self, extent: Extent, offset_bytes: int, data: memoryview, first: Callable[[memoryview], object] | None = None
    ) -> None:
        assert offset_bytes + len(data) <= extent.size_bytes
        target = self.view(extent)[offset_bytes : offset_bytes + len(data)]

        def work() -> None:
            if first is not None:
                first(data)
            np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(data, np.uint8))

        await on_thread(work)

    async def seal(self, extent: Extent) -> None:
        pass

    async def read(
        self,
        extent: Extent,
        offset_bytes: int,
        into: memoryview,
        then: Callable[[memoryview], T] | None = None,
        *,
        priority: float = 0.0,
    ) -> T | None:
        assert offset_bytes + len(into) <= extent.size_bytes
        source = self.view(extent)[offset_bytes : offset_bytes + len(into)]

        def work() -> T | None:
            np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(source, np.uint8))
            return then(into) if then is not None else None

        return await on_thread(work)
