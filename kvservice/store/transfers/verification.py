"""Compares blocks in DRAM with their checksums, once after the daemon's start: for a view that waits, or ahead of it.

Blocks that clients write into the arena are stored unverified. Where there is a tier below DRAM, write-behind verifies
them while it copies them. Without one they are verified here, while no client reads or saves, so that the first view of
them does not wait. That begins with the first view that had to wait: where clients take no views, no byte is read.

Called on the event loop's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import partial

from kvservice.blocks import Rows
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store import image_check
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.tasks import Tasks, all_of
from kvservice.tiers.dram import DramTier
from kvservice.tiers.files import on_thread
from kvservice_api.errors import ChecksumMismatch

_VERIFIERS = 2  # One thread does not fill the memory bus.
# For a view, at a time: a hand-over to a thread takes up to half a millisecond, in which it could sum 10 MiB. And how
# many rows are looked up in one turn of the event loop.
_PART_BYTES, _PART_ROWS = 64 << 20, 128
_AHEAD_BYTES = 16 << 20  # Ahead of views, at a time: a millisecond, which a read that begins meanwhile has beside it.
_REST = 3.0  # It rests so many times as long as it works: the engine may need the memory bus while it calls nothing.
_AHEAD_BLOCKS_MAX = 1 << 16  # That wait. Views verify those that do not fit.
# The first one lets a save's answer be sent. Each later one, until no client is active, is twice as long as the one
# before: a client may keep a lease for hours.
_PAUSE_S, _PAUSE_S_MAX = 0.02, 0.32

_Part = list[tuple[int, image_check.StoredImage]]


class Verification:
    def __init__(
        self,
        lifecycle: BlockLifecycle,
        dram: DramTier,
        clock: Clock,
        counters: Counters,
        tasks: Tasks,
        executor: Executor,
        *,
        is_idle: Callable[[], bool],
    ) -> None:
        """`is_idle` says whether no client reads or saves: only then is anything verified ahead."""
        self._lifecycle = lifecycle
        self._blocks = lifecycle.blocks
        self._dram = dram
        self._clock = clock
        self._counters = counters
        self._tasks = tasks
        self._executor = executor
        self._is_idle = is_idle
        self._has_views = False
        self._waiting = deque[tuple[int, int]](maxlen=_AHEAD_BLOCKS_MAX)  # Rows and their generations.
        self._is_running = False
        self._pause_s = _PAUSE_S

    async def verify(self, rows: Rows) -> None:
        """Verify those in DRAM that were not verified since the start. The caller holds them, so they stay where they
        are. Raises ChecksumMismatch; the damaged block is dropped then.
        """
        blocks = self._blocks
        unseen = rows[~blocks.verified[rows] & blocks.lie_in(rows, blocks.first_tier)]
        if not len(unseen):
            return
        self._has_views = True
        waiting = iter(dict.fromkeys(unseen.tolist()))
        await all_of(self._verify_all(waiting, _PART_BYTES) for _ in range(min(_VERIFIERS, len(unseen))))

    def add(self, rows: Iterable[int]) -> None:
        """Verify them later, ahead of views, if there are views."""
        if self._has_views:
            self._waiting.extend((row, int(self._blocks.generation[row])) for row in rows)
            self._pause_s = _PAUSE_S
            if self._waiting and not self._is_running:
                self._is_running = True
                self._tasks.start(self._run(), "verify blocks ahead of views")

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._clock.sleep(self._pause_s)
                self._pause_s = min(2 * self._pause_s, _PAUSE_S_MAX)
                while self._waiting and self._is_idle():
                    began_s = self._clock.monotonic_s()
                    await self._verify_next()
                    await self._clock.sleep(_REST * (self._clock.monotonic_s() - began_s))
        finally:
            self._is_running = False

    async def _verify_next(self) -> None:
        blocks, rows, size_bytes = self._blocks, list[int](), 0
        for _ in range(min(len(self._waiting), _PART_ROWS)):  # Also of blocks that are gone, or verified by a view.
            row, generation = self._waiting.popleft()
            if blocks.generation[row] == generation and blocks.live[row] and not blocks.verified[row]:
                rows.append(row)
                size_bytes += self._lifecycle.geometry(row).image_bytes
                if size_bytes >= _AHEAD_BYTES:
                    break
        self._lifecycle.hold(rows)
        try:
            await self._verify_all(iter(rows), _AHEAD_BYTES, self._count)
        except ChecksumMismatch:
            pass  # The block is dropped, and counted.
        finally:
            self._lifecycle.unhold(rows)

    def _count(self, part: _Part) -> None:
        self._counters.verified_ahead_bytes += sum(len(image.image) for _, image in part)

    async def _verify_all(
        self, waiting: Iterator[int], part_bytes: int, then: Callable[[_Part], None] | None = None
    ) -> None:
        blocks = self._blocks
        while part := self._next_part(waiting, part_bytes):
            generations = blocks.generation[[row for row, _ in part]].tolist()
            verify = partial(image_check.damages, [image for _, image in part])
            damages = await on_thread(verify, self._executor)
            if then is not None:
                then(part)
            for (row, image), generation, what in zip(part, generations, damages, strict=True):
                if what:
                    await self._lifecycle.quarantine(row, generation, blocks.first_tier, what)
                    key = image.key.hex()
                    raise ChecksumMismatch(f"{what} of block {key} is damaged in dram", key=key)
                blocks.verified[row] = True

    def _next_part(self, waiting: Iterator[int], part_bytes: int) -> _Part:
        """The next rows that are not verified yet, and where their images are; none at the end."""
        blocks, part, size_bytes = self._blocks, _Part(), 0
        for row in waiting:
            extent = blocks.extent(row, blocks.first_tier)
            if extent is None or blocks.verified[row]:
                continue
            geometry = self._lifecycle.geometry(row)
            image = self._dram.view(extent)[: geometry.image_bytes]
            identity = blocks.key_of(row), blocks.shard_of(row), int(blocks.trailer_checksum[row])
            part.append((row, image_check.StoredImage(image, geometry, *identity)))
            size_bytes += geometry.image_bytes
            if size_bytes >= part_bytes or len(part) == _PART_ROWS:
                break
        return part
