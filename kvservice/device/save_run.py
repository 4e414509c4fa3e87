"""One save from pages: they are copied to the blocks' places layer by layer, and their checksums are computed there."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.device.registration import ChainOrder, Registration
from kvservice.store.types import FilledUpload, SaveHeader, SaveOutcome
from kvservice_api.errors import DeviceUnavailable
from kvservice_api.image import block_geometry, checksum

_AHEAD = 2  # Layers that are queued while an earlier one is copied.
_HASHED_AT_ONCE = 16  # Slices, for one hand-over to a thread.


class _Part(NamedTuple):
    """Consecutive blocks of one chain that are to be written, at these numbers of the save's places."""

    order: ChainOrder
    first_token: int
    token_counts: Sequence[int]
    first_place: int


class SaveRun:
    """Made by `CudaIpc.save`. Called on the event loop."""

    def __init__(
        self,
        registration: Registration,
        upload: FilledUpload,
        header: SaveHeader,
        chains: Sequence[ChainOrder],
        arena: NDArray[np.uint8],
        hashing: Executor,
        on: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        """`on` runs work on the registration's thread."""
        self._registration, self._upload, self._on, self._hashing = registration, upload, on, hashing
        self._arena = arena
        self._chains = chains
        request = upload.request
        self._counts: list[Sequence[int]] = []  # Of each chain.
        begin = 0
        for chain in header.chains:
            self._counts.append(request.token_counts[begin : begin + len(chain.keys)])
            begin += len(chain.keys)
        places, layers = upload.places, registration.shard.layers
        self._blocks = [  # By place: the offset in the arena, and the geometry.
            (
                place.extent.offset_bytes,
                block_geometry(request.layout, request.shard, request.token_counts[place.position]),
            )
            for place in places
        ]
        self._parts = list(self._consecutive([place.position for place in places]))
        self._sums: NDArray[np.uint64] = np.zeros((len(places), layers), np.uint64)
        self._hashed: list[Future[None]] = []
        self._is_idle = True

    def _consecutive(self, positions: Sequence[int]) -> list[_Part]:
        parts: list[_Part] = []
        first = place = 0
        for order, counts in zip(self._chains, self._counts, strict=True):
            starts = list(accumulate(counts, initial=order.first_token))
            blocks = [each - first for each in positions if first <= each < first + len(counts)]
            begin = 0
            while begin < len(blocks):
                end = begin + 1
                while end < len(blocks) and blocks[end] == blocks[end - 1] + 1:
                    end += 1
                block = blocks[begin]
                parts.append(_Part(order, starts[block], counts[block : block + end - begin], place + begin))
                begin = end
            first, place = first + len(counts), place + len(blocks)
        return parts

    async def check(self) -> None:
        """Raises InvalidRequest, before a page is read."""
        await self._on(partial(self._registration.check_chains, list(zip(self._chains, self._counts, strict=True))))

    async def gather(self) -> AsyncGenerator[int, None]:
        """Read the pages. Yields how many layers are read.

        Raises DeviceUnavailable, RegistrationEnded, InvalidRequest.
        """
        layers = self._registration.shard.layers
        if not self._parts:
            yield layers
            return
        self._is_idle = False
        events: deque[Any] = deque()
        for layer in range(layers + _AHEAD):
            if layer < layers:
                events.append(await self._on(partial(self._begin, layer)))
            if (gathered := layer - _AHEAD) >= 0:
                await self._on(events.popleft().synchronize)
                self._hash(gathered)
                yield gathered + 1
        self._is_idle = True

    def _slices(self, layer: int, first_place: int, count: int) -> Iterator[tuple[int, int]]:
        """Offset in the arena, and size. On a thread: all of a large save's take long."""
        for offset, geometry in self._blocks[first_place : first_place + count]:
            begin, end = geometry.slice_range(layer)
            yield offset + begin, end - begin

    def _begin(self, layer: int) -> Any:
        """On the registration's thread."""
        self._registration.check()
        base = int(self._arena.ctypes.data)
        for part in self._parts:
            slices = self._slices(layer, part.first_place, len(part.token_counts))
            runs = [[(base + offset, size)] for offset, size in slices]
            self._registration.gather(layer, part.order, part.first_token, part.token_counts, runs)
        return self._registration.end_of_reads()

    def _hash(self, layer: int) -> None:
        for first in range(0, len(self._blocks), _HASHED_AT_ONCE):
            self._hashed.append(self._hashing.submit(self._sum, layer, first))

    def _sum(self, layer: int, first: int) -> None:
        """On a thread."""
        for number, (offset, size) in enumerate(self._slices(layer, first, _HASHED_AT_ONCE), first):
            self._sums[number, layer] = checksum(self._arena[offset : offset + size].data)

    async def commit(self, *, on_ssd: bool) -> SaveOutcome:
        """Make the blocks visible. Raises IncompleteSave."""
        await self._hashes()
        return await self._upload.commit(self._sums.reshape(-1), on_ssd=on_ssd)

    async def _hashes(self) -> None:
        hashed, self._hashed = self._hashed, []
        await asyncio.gather(*map(asyncio.wrap_future, hashed))

    async def stop(self) -> None:
        """On return nothing is written to the blocks' places, or read from them."""
        with suppress(DeviceUnavailable):  # What is queued on a broken device does not run.
            if not self._is_idle:
                await self._on(self._registration.wait_for_reads)
        await self._hashes()
