"""A tier of a kind that the product does not have: a folder with one file per extent, and a pause before each call.

The configuration names it as ``kind = "tests.slow_directory:SlowDirectory"``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent, TierName
from kvservice.tiers.base import StoreMismatch
from kvservice.tiers.extents import SpaceMap, extent_size, lie_within
from kvservice.tiers.files import WRITE, IoPool
from kvservice.tiers.kinds import TierOptions
from kvservice_api.errors import TierFull
from kvservice_api.image import PAGE_BYTES

T = TypeVar("T")
_PAUSE_S = 0.002


class SlowDirectory:
    """Implements `DurableTier`. The offset of an extent names its file."""

    is_direct = False

    def __init__(self, path: Path, name: TierName, capacity_bytes: int, io_threads: int) -> None:
        """Use `open`."""
        self._path, self._name = path, name
        self._space = SpaceMap(capacity_bytes // PAGE_BYTES * PAGE_BYTES)
        self._pool = IoPool(io_threads)
        self._unsynced: set[Path] = set()
        self._flush_failures = 0
        self.refusing_because = ""

    @classmethod
    def open(cls, options: TierOptions) -> SlowDirectory:
        owner = options.path / "store_id"
        if options.may_create and not owner.exists():
            options.path.mkdir(parents=True, exist_ok=True)
            owner.write_bytes(options.store_id)
        if not owner.exists() or owner.read_bytes() != options.store_id:
            raise StoreMismatch(f"{options.path} is missing or belongs to another store")
        return cls(options.path, options.name, options.capacity_bytes, options.io_threads)

    @property
    def capacity_bytes(self) -> int:
        return self._space.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._space.used_bytes

    def could_hold(self, size_bytes: int) -> bool:
        return extent_size(size_bytes) <= self.capacity_bytes

    async def grown(self) -> bool:
        return False

    def reserve(self, size_bytes: int) -> Extent:
        try:
            return Extent(0, self._space.reserve(size_bytes), extent_size(size_bytes))
        except TierFull as error:
            raise TierFull(error.message, tier=self._name) from None

    def release(self, extent: Extent) -> None:
        self._space.release(extent.offset_bytes, extent.size_bytes)
        with contextlib.suppress(OSError):  # Its space is free nevertheless; the next write overwrites it.
            self._file(extent).unlink(missing_ok=True)

    def holds(
        self, segments: NDArray[np.generic], offsets: NDArray[np.generic], sizes: NDArray[np.generic]
    ) -> NDArray[np.bool_]:
        inside: NDArray[np.bool_] = lie_within(offsets, sizes, np.uint64(self.capacity_bytes)) & (segments == 0)
        return inside

    def adopt(self, segments: NDArray[np.generic], offsets: NDArray[np.generic], sizes: NDArray[np.generic]) -> None:
        self._space.adopt(offsets.astype(np.int64), sizes.astype(np.int64))

    async def write(
        self, extent: Extent, offset_bytes: int, data: memoryview, first: Callable[[memoryview], object] | None = None
    ) -> None:
        assert offset_bytes + len(data) <= extent.size_bytes
        file = self._file(extent)

        def work() -> None:
            if first is not None:
                first(data)
            time.sleep(_PAUSE_S)
            self._unsynced.add(file)
            fd = os.open(file, os.O_WRONLY | os.O_CREAT)
            try:
                os.pwrite(fd, data, offset_bytes)
            finally:
                os.close(fd)

        await self._pool.run(WRITE, work)

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

        def work() -> T | None:
            time.sleep(_PAUSE_S)
            with self._file(extent).open("rb") as file:  # The pool converts an OSError to StorageFailed.
                count = os.preadv(file.fileno(), [into], offset_bytes)
            into[count:] = bytes(len(into) - count)  # What was never written.
            return then(into) if then is not None else None

        return await self._pool.run(priority, work)

    def flush_failures(self, extent: Extent) -> int:
        return self._flush_failures

    def sync(self) -> None:
        for file in [*list(self._unsynced), self._path]:  # The folder last: it has the files' names.
            with contextlib.suppress(FileNotFoundError):  # Released meanwhile.
                fd = os.open(file, os.O_RDONLY)
                try:
                    os.fsync(fd)
                except OSError:
                    self._flush_failures += 1  # Of any file: all extents that are not recorded yet are written again.
                    raise
                finally:
                    os.close(fd)
            self._unsynced.discard(file)

    def close(self) -> None:
        self._pool.close()

    def _file(self, extent: Extent) -> Path:
        return self._path / f"{extent.offset_bytes:016x}"


class TroubledDirectory(SlowDirectory):
    """Follows the file ``FOLDER.trouble`` beside its folder: a write or a sync hangs or fails."""

    async def write(
        self, extent: Extent, offset_bytes: int, data: memoryview, first: Callable[[memoryview], object] | None = None
    ) -> None:
        def trouble(data: memoryview) -> None:
            self._trouble("write")
            if first is not None:
                first(data)

        await super().write(extent, offset_bytes, data, trouble)

    async def read(
        self,
        extent: Extent,
        offset_bytes: int,
        into: memoryview,
        then: Callable[[memoryview], T] | None = None,
        *,
        priority: float = 0.0,
    ) -> T | None:
        if self._path.with_suffix(".trouble").exists():
            raise RuntimeError("not even an error of the kinds that a tier may raise")
        return await super().read(extent, offset_bytes, into, then, priority=priority)

    def sync(self) -> None:
        self._trouble("sync")
        super().sync()

    def _trouble(self, call: str) -> None:
        file = self._path.with_suffix(".trouble")
        while file.exists() and file.read_text() == f"{call} hangs":
            time.sleep(0.01)
        once = file.exists() and file.read_text() == f"{call} fails once and hangs"
        if once:
            file.write_text(f"{call} hangs")
        if once or (file.exists() and file.read_text() == f"{call} fails"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
